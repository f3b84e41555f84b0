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
    """A machine, or a slice of a pod.

    `wiring` is the compiler's word for it: libtpu's name of the slice, or as XLA counts GPUs, in
    machines of eight. `accelerator` is libtpu's name of its chips, or what XLA needs to know of a
    GPU.
    """

    name: str
    chip: Chip
    count: int
    wiring: str
    accelerator: str


GIB = 2**30
# Memory of TPUs is what libtpu's compiler allows a program, a little less than the chip has: 16, 96
# and 32 GiB. Of GPUs it is what JAX takes for itself unless XLA_PYTHON_CLIENT_MEM_FRACTION says
# otherwise: three quarters of the MiB that their driver names.
V5E = Chip("v5e", "tpu", int(15.75 * GIB), 197e12, "cloud.google.com/tpu/docs/v5e")
V5P = Chip("v5p", "tpu", int(95.74 * GIB), 459e12, "cloud.google.com/tpu/docs/v5p")
V6E = Chip("v6e", "tpu", int(31.25 * GIB), 918e12, "cloud.google.com/tpu/docs/v6e")
_DRIVER = {"h100": 81_559 * 2**20, "h200": 143_771 * 2**20}
H100 = Chip("h100", "gpu", _DRIVER["h100"] * 3 // 4, 989e12, "NVIDIA H100 SXM data sheet")
H200 = Chip("h200", "gpu", _DRIVER["h200"] * 3 // 4, 989e12, "NVIDIA H200 SXM data sheet")

# A Hopper GPU as XLA's compiler wants it told (GpuTargetConfigProto); sizes in bytes.
_HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA {name}"
"""
_BANDWIDTHS = {"h100": 3_350 * 10**9, "h200": 4_800 * 10**9}  # of memory, by the data sheets

_PLANES = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
# By chips.
_CUBES = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8",
    512: "8x8x8",
}  # fmt: skip


def _slice(count: int) -> Topology:
    """A v5p slice of `count` chips."""
    return Topology(f"v5p-{2 * count}", V5P, count, f"v5p:{_CUBES[count]}", f"v5p-{2 * count}")


def _gpus(chip: Chip, count: int) -> Topology:
    """GPUs, eight a machine, or a part of one machine."""
    name = chip.name
    told = _HOPPER.format(bandwidth=_BANDWIDTHS[name], memory=_DRIVER[name], name=name.upper())
    machines = max(1, count // 8)
    return Topology(f"{chip.name}-{count}", chip, count, f"1x{machines}x{count // machines}", told)


TOPOLOGIES = {
    topology.name: topology
    for topology in (
        *(
            Topology(f"{chip.name}-{count}", chip, count, f"{chip.name}:{grid}", f"{kind}-{count}")
            for chip, kind in ((V5E, "v5litepod"), (V6E, "v6e"))
            for count, grid in _PLANES.items()
        ),
        *(_slice(count) for count in _CUBES),
        *(_gpus(chip, count) for chip in (H100, H200) for count in (1, 2, 4, 8, 16, 32, 64)),
    )
}


def find(name: str) -> Topology:
    """The topology of this name; a `UserError` that lists the known ones if there is none."""
    if name not in TOPOLOGIES:
        raise errors.UserError(f"unknown topology {name}: choose one of {', '.join(TOPOLOGIES)}")
    return TOPOLOGIES[name]


def devices(topology: Topology) -> Sequence[jax.Device]:
    """Devices to compile for, none of which need be here: those of libtpu or of CUDA's plugin.

    Must come before anything that touches a device, and for GPUs with `jax_platforms` "cpu": JAX
    refuses to start a plugin whose driver is not here. Raises `UserError` where they are not
    installed.
    """
    from jax.experimental import topologies

    on_gpu = topology.chip.platform == "gpu"
    try:
        if on_gpu:
            found = topologies.get_topology_desc(
                platform="cuda",
                topology_name=topology.name,
                target_config=topology.accelerator,
                topology=topology.wiring,
            )
        else:
            # libtpu reads these once a process: which machine it is, and not to ask one or lock it.
            os.environ.update(
                TPU_ACCELERATOR_TYPE=topology.accelerator,
                TPU_WORKER_HOSTNAMES="localhost",
                TPU_SKIP_MDS_QUERY="1",
                ALLOW_MULTIPLE_LIBTPU_LOAD="1",
            )
            found = topologies.get_topology_desc(platform="tpu", topology_name=topology.wiring)
    except (ImportError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        extra = "cuda" if on_gpu else "tpu-aot"
        raise errors.UserError(
            f"cannot compile for {topology.name}: {reason} (pip install '.[{extra}]')"
        ) from None
    return found.devices
