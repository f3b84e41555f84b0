"""One sample on several devices: guidance's branches and a clip's frames split over a mesh.

Branches meet once a step. Frames meet in every layer across frames: statistics are summed,
convolutions get their neighbours' frames, attention gathers what it needs; the compiler places that
between the arrays that are pinned here. Weights are repeated on every device.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from v3d_jax import errors

BRANCH, FRAME = "branch", "frame"


@functools.cache
def mesh(devices: int, branches: int, frames: int) -> Mesh:
    """The mesh [branch, frame] of the first `devices`; both branches apart if they are even.

    Raises `UserError` if there are fewer, or the frames do not divide among them.
    """
    there = jax.devices()
    if devices > len(there):
        raise errors.UserError(f"{devices} devices are asked for, {len(there)} are here")
    apart = 2 if branches == 2 and devices % 2 == 0 else 1
    if frames % (devices // apart):
        usable = [n for n in range(1, branches * frames + 1) if _divides(n, branches, frames)]
        raise errors.UserError(
            f"{devices} devices cannot share {frames} frames evenly: "
            f"choose one of {', '.join(map(str, usable))}"
        )
    shape = (apart, devices // apart)
    return jax.make_mesh(
        shape, (BRANCH, FRAME), axis_types=(AxisType.Auto,) * 2, devices=there[:devices]
    )


def _divides(devices: int, branches: int, frames: int) -> bool:
    apart = 2 if branches == 2 and devices % 2 == 0 else 1
    return frames % (devices // apart) == 0


def repeat(tree: Any, mesh: Mesh) -> Any:
    """A whole copy of every array on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split_network(network: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """The network with its first argument and its result split by branch and by frame.

    A batch that the branches do not divide, as that of one branch alone, is split by frame.
    """

    def split(x: Float[Array, "b t h w c"], *args: Any) -> Float[Array, "b t h w o"]:
        branch = None if x.shape[0] % mesh.shape[BRANCH] else BRANCH
        placement = NamedSharding(mesh, PartitionSpec(branch, FRAME))
        x = jax.lax.with_sharding_constraint(x, placement)
        # Kernels that the compiler does not partition divide themselves by the mesh they see.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            out = network(x, *args)
        return jax.lax.with_sharding_constraint(out, placement)

    return split


def split_frames(x: Float[Array, "b t h w c"], mesh: Mesh) -> Float[Array, "b t h w c"]:
    """A clip without branches, its frames on all devices where they divide."""
    axes = (BRANCH, FRAME) if x.shape[1] % mesh.size == 0 else FRAME
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, axes)))
