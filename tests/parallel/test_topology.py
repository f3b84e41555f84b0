"""Machines by name."""

import pytest
from jax.experimental import topologies

from v3d_jax import errors
from v3d_jax.parallel import topology


def test_names_tell_chips_and_their_wiring():
    pod = topology.find("v5e-256")
    assert (pod.count, pod.wiring, pod.accelerator) == (256, "v5e:16x16", "v5litepod-256")
    # Google Cloud's names of v5p count cores, two a chip.
    assert topology.find("v5p-8").count == 4
    for name, found in topology.TOPOLOGIES.items():
        sides = [int(side) for side in found.wiring.split(":")[1].split("x")]
        chips = 1
        for side in sides:
            chips *= side
        assert name == found.name
        assert chips == found.count if found.chip.platform == "tpu" else chips >= found.count


def test_an_unknown_name_is_one_line_with_the_known_ones():
    with pytest.raises(errors.UserError, match=r"unknown topology v5e-5: .*v5e-4, .*h200-8") as it:
        topology.find("v5e-5")
    assert "\n" not in str(it.value)


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    def missing(**settings):
        raise NotImplementedError("JAX TPU support not installed\nand more")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    monkeypatch.setattr(topology.os, "environ", {})
    with pytest.raises(errors.UserError, match=r"v5e-4: JAX TPU support not installed .*tpu-aot"):
        topology.devices(topology.find("v5e-4"))
