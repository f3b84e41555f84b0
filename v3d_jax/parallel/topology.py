"""Machines by name, without one at hand: chips, their memory and speed, and how they are wired.

A name is a chip and a number, as `v5e-256` or `h100-8`. For v5e, v6e and GPUs the number counts
chips; for v5p it counts cores, two a chip, as Google Cloud's accelerator types do.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import jax

from v3d_jax import errors


class Chip(NamedTuple):
    """One accelerator: bytes of memory a program may have, and dense bfloat16 FLOP a second."""

    name: str
    platform: str
    memory: int
    flops: float
    source: str


class Topology(NamedTuple):
    """A machine or a slice of a pod.

    `wiring` and `accelerator` are libtpu's names of the slice to compile for: of GPUs, whose
    compiler needs one, that of as many TPUs with as much memory.
    """

    name: str
    chip: Chip
    count: int
    wiring: str
    accelerator: str


GIB = 2**30
# Memory of TPUs is what libtpu's compiler allows a program, a little less than the chip has: 16, 96
# and 32 GiB. Of GPUs it is nine tenths of the data sheet's 80 and 141 GB: drivers, libraries and
# the allocator's gaps take a part.
V5E = Chip("v5e", "tpu", int(15.75 * GIB), 197e12, "cloud.google.com/tpu/docs/v5e")
V5P = Chip("v5p", "tpu", int(95.74 * GIB), 459e12, "cloud.google.com/tpu/docs/v5p")
V6E = Chip("v6e", "tpu", int(31.25 * GIB), 918e12, "cloud.google.com/tpu/docs/v6e")
H100 = Chip("h100", "gpu", 72 * 10**9, 989e12, "NVIDIA H100 SXM data sheet")
H200 = Chip("h200", "gpu", 127 * 10**9, 989e12, "NVIDIA H200 SXM data sheet")

_PLANES = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
# By chips.
_CUBES = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8",
    512: "8x8x8",
}  # fmt: skip


def _slice(name: str, chip: Chip, count: int) -> Topology:
    """A v5p slice of at least `count` chips."""
    chips = next(size for size in _CUBES if size >= count)
    return Topology(name, chip, count, f"v5p:{_CUBES[chips]}", f"v5p-{2 * chips}")


TOPOLOGIES = {
    topology.name: topology
    for topology in (
        *(
            Topology(f"{chip.name}-{count}", chip, count, f"{chip.name}:{grid}", f"{kind}-{count}")
            for chip, kind in ((V5E, "v5litepod"), (V6E, "v6e"))
            for count, grid in _PLANES.items()
        ),
        *(_slice(f"v5p-{2 * count}", V5P, count) for count in _CUBES),
        *(
            _slice(f"{chip.name}-{count}", chip, count)
            for chip in (H100, H200)
            for count in (1, 2, 4, 8, 16, 32, 64)
        ),
    )
}


def find(name: str) -> Topology:
    """The topology of this name; a `UserError` that lists the known ones if there is none."""
    if name not in TOPOLOGIES:
        raise errors.UserError(f"unknown topology {name}: choose one of {', '.join(TOPOLOGIES)}")
    return TOPOLOGIES[name]


def devices(topology: Topology) -> Sequence[jax.Device]:
    """Devices to compile for, none of which need be here: those of libtpu's compiler.

    Must come before anything that touches a device. Raises `UserError` where libtpu is not
    installed.
    """
    from jax.experimental import topologies

    # libtpu reads these once a process: which machine it is, and not to ask one or to lock it.
    os.environ.update(
        TPU_ACCELERATOR_TYPE=topology.accelerator,
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.wiring)
    except (ImportError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise errors.UserError(
            f"cannot compile for {topology.name}: {reason} (pip install '.[tpu-aot]')"
        ) from None
    return found.devices[: topology.count]
