"""Machines by name."""

import math

import pytest
from jax.experimental import topologies

from v3d_jax import errors
from v3d_jax.parallel import topology


def test_names_tell_chips_and_their_wiring():
    pod = topology.find("v5e-256")
    assert (pod.count, pod.wiring, pod.accelerator) == (256, "v5e:16x16", "v5litepod-256")
    # Google Cloud's names of v5p count cores, two a chip.
    assert topology.find("v5p-8").count == 4
    assert topology.find("h200-64").wiring == "1x8x8"
    assert topology.find("h100-2").wiring == "1x1x2"
    for name, found in topology.TOPOLOGIES.items():
        sides = found.wiring.rpartition(":")[2].split("x")
        assert name == found.name
        assert math.prod(map(int, sides)) == found.count


def test_gpus_are_told_apart_and_told_whole():
    small, large = (topology.find(name).accelerator for name in ("h100-8", "h200-8"))
    assert "device_memory_size: 85520809984" in small  # 81,559 MiB
    assert "device_memory_size: 150754820096" in large
    assert '"NVIDIA H200"' in large
    assert large.count("{") == large.count("}") == 3


def test_an_unknown_name_is_one_line_with_the_known_ones():
    with pytest.raises(errors.UserError, match=r"unknown topology v5e-5: .*v5e-4, .*h200-8") as it:
        topology.find("v5e-5")
    assert "\n" not in str(it.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e-4", r"v5e-4: no compiler \(pip install '\.\[tpu-aot\]'\)"),
        ("h200-4", r"h200-4: no compiler \(pip install '\.\[cuda\]'\)"),
    ],
)
def test_without_a_compiler_it_says_what_to_install(name, message, monkeypatch):
    def missing(**settings):
        raise NotImplementedError("no compiler\nand more")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    monkeypatch.setattr(topology.os, "environ", {})
    with pytest.raises(errors.UserError, match=message):
        topology.devices(topology.find(name))
