"""The mesh of devices: axis `data` repeats the weights, axis `fsdp` splits them.

A batch is split over both axes. Both are Auto axes: the compiler places what lies between the
named inputs and outputs of a jitted function (`parallel.sharding`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from v3d_jax import errors

DATA = "data"
FSDP = "fsdp"


@dataclass(frozen=True)
class MeshConfig:
    """How many devices share one copy of the weights; the others repeat it.

    `devices` > 0 uses so many of one process's devices, and leaves the rest alone.
    """

    fsdp: int = 1
    devices: int = 0


def make(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh [data, fsdp] over `devices`, by default all of them in all processes.

    Raises `UserError` if there are too few devices, or no multiple of `config.fsdp`.
    """
    devices = jax.devices() if devices is None else devices
    if config.devices > len(devices):
        raise errors.UserError(f"{config.devices} devices are asked for, {len(devices)} are here")
    devices = devices[: config.devices] if config.devices else devices
    if config.fsdp < 1 or len(devices) % config.fsdp:
        raise errors.UserError(
            f"{len(devices)} devices cannot be split into groups of {config.fsdp}: "
            "choose an fsdp size that divides them"
        )
    shape = (len(devices) // config.fsdp, config.fsdp)
    if len(devices) == jax.device_count():
        # make_mesh orders all devices so that neighbours on an axis are near in the network.
        return jax.make_mesh(shape, (DATA, FSDP), axis_types=(AxisType.Auto,) * 2, devices=devices)
    grid = np.asarray(devices).reshape(shape)
    return Mesh(grid, (DATA, FSDP), axis_types=(AxisType.Auto,) * 2)
