"""The mesh of devices: `data` repeats the weights, `fsdp` splits them, `frames` splits clips.

Clips are split over `data` and `fsdp`, the frames of a clip over `frames`. All are Auto axes: the
compiler places what lies between the named inputs and outputs of a jitted function
(`parallel.sharding`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from v3d_jax import errors

DATA = "data"
FSDP = "fsdp"
FRAMES = "frames"
AXES = (DATA, FSDP, FRAMES)


@dataclass(frozen=True)
class MeshConfig:
    """How many devices share one copy of the weights, and how many one clip; the others repeat.

    `fsdp` devices hold the weights between them. `frames` devices compute one clip between them
    and must divide its frames. `devices` > 0 uses so many of one process's devices, and leaves the
    rest alone.
    """

    fsdp: int = 1
    devices: int = 0
    frames: int = 1


def make(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh [data, fsdp, frames] over `devices`, by default all of them in all processes.

    Raises `UserError` if there are too few devices, no multiple of fsdp x frames, or if a clip's
    frames would lie in several processes.
    """
    devices = jax.devices() if devices is None else devices
    if config.devices > len(devices):
        raise errors.UserError(f"{config.devices} devices are asked for, {len(devices)} are here")
    devices = devices[: config.devices] if config.devices else devices
    if min(config.fsdp, config.frames) < 1 or len(devices) % (config.fsdp * config.frames):
        product = "" if config.frames == 1 else f" x {config.frames} (fsdp x frames)"
        raise errors.UserError(
            f"{len(devices)} devices cannot be split into groups of {config.fsdp}{product}: "
            "choose an fsdp size that divides them"
        )
    shape = (len(devices) // (config.fsdp * config.frames), config.fsdp, config.frames)
    kinds = (AxisType.Auto,) * len(AXES)
    if config.devices:
        return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=kinds)
    # make_mesh orders all devices so that neighbours on an axis are near in the network.
    mesh = jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices)
    groups = mesh.devices.reshape(-1, config.frames)
    if any(len({device.process_index for device in group}) > 1 for group in groups):
        raise errors.UserError(
            f"the frames of a clip on {config.frames} devices would lie in several processes: "
            "choose mesh.frames to divide the devices of one"
        )
    return mesh


def clips(mesh: Mesh | AbstractMesh) -> int:
    """How many devices, or groups that share a clip, a batch is split over."""
    return mesh.shape[DATA] * mesh.shape[FSDP]
