"""Where every array lives: one rule for weights, one for batches, one for clips in the network.

Weights (and whatever has their shapes: moments, averages) are split along their largest dimension
that the `fsdp` axis divides; small ones are repeated on every device. Batches are split by clip
over `data` and `fsdp`, and repeated over `frames`. In the network the frames of a clip are split
over `frames`: layers across frames then exchange sums, neighbours or keys, all others nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from v3d_jax import errors
from v3d_jax.parallel import mesh as mesh_axes

WHOLE = "whole"  # what policies of rematerialisation call a gathered weight

# Below this many elements, gathering a weight costs more than keeping it everywhere.
SMALL = 2**16


def rule(shape: tuple[int, ...], fsdp: int, small: int | None = None) -> PartitionSpec:
    """The split of one weight: its largest dimension divisible by `fsdp`, if it is not small."""
    small = SMALL if small is None else small
    divisible = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or int(np.prod(shape)) < small or not divisible:
        return PartitionSpec()
    # Of equal dimensions the last one, a kernel's outputs.
    chosen = max(divisible, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*(None,) * chosen, mesh_axes.FSDP)


def weights(abstract: Any, mesh: Mesh | AbstractMesh, small: int | None = None) -> Any:
    """The rule over a tree of arrays or abstract arrays, such as a whole train state."""
    fsdp = mesh.shape[mesh_axes.FSDP]
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, rule(np.shape(leaf), fsdp, small)), abstract
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch(mesh: Mesh) -> NamedSharding:
    """The leading axis split over all devices, or over the groups that share a clip."""
    return NamedSharding(mesh, PartitionSpec((mesh_axes.DATA, mesh_axes.FSDP)))


def check_batch(mesh: Mesh, clips: int, accumulate: int, frames: int) -> None:
    """Raises `UserError` if batches of `clips`, in `accumulate` parts, cannot be split so."""
    groups = mesh_axes.clips(mesh)
    if clips % (groups * accumulate):
        parts = f" in {accumulate} parts" if accumulate > 1 else ""
        shared = mesh.shape[mesh_axes.FRAMES]
        where = f"{groups} devices" if shared == 1 else f"{groups} groups of {shared} devices"
        raise errors.UserError(
            f"{clips} clips{parts} cannot be split over {where}: choose a batch size that is a "
            f"multiple of {groups * accumulate}"
        )
    if frames % mesh.shape[mesh_axes.FRAMES]:
        raise errors.UserError(
            f"{frames} frames cannot be split over {mesh.shape[mesh_axes.FRAMES]} devices: "
            "choose mesh.frames to divide them"
        )


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`function`, which when traced sees the mesh.

    By it `pin_clips` knows the axes, and kernels that the compiler does not partition divide
    their work among the devices.
    """

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def pin_clips(x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
    """Clips in the network, split by clip and by frame; the same clips where `on_mesh` is not.

    Left alone, the compiler gathers a batch where a kernel is split: every device then computes a
    share of the channels of all clips, for which none has room.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh_axes.FRAMES not in mesh.axis_names:
        return x
    spec = PartitionSpec((mesh_axes.DATA, mesh_axes.FSDP), mesh_axes.FRAMES)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def _automatic(*axes: str) -> AbstractMesh | None:
    """The mesh in context, if it has these axes and leaves splits along them to the compiler."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh if all(kinds.get(axis) is AxisType.Auto for axis in axes) else None


def whole(kernel: Array) -> Array:
    """A weight as a layer uses it: gathered from where the rule splits it; its gradient is split.

    To be called on what the layer computes with, in its type. Left alone, the compiler may rather
    gather a batch of activations, or leave a layer's channels split for the next to exchange: of
    V3D's UNet it moved three times the bytes of the weights so. Where `on_mesh` is not, or weights
    are not split, this is the weight itself.
    """
    mesh = _automatic(mesh_axes.FSDP)
    if mesh is None:
        return kernel
    split = rule(kernel.shape, mesh.shape[mesh_axes.FSDP])
    if split == PartitionSpec():
        return kernel
    made = _gathered(kernel, NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, split))
    return checkpoint_name(made, WHOLE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(kernel: Array, everywhere: NamedSharding, split: NamedSharding) -> Array:
    # Pinned before as well, or the cast that made it comes after the gathering, of twice the bytes.
    kernel = jax.lax.with_sharding_constraint(kernel, split)
    return jax.lax.with_sharding_constraint(kernel, everywhere)


def _gather(kernel: Array, everywhere: NamedSharding, split: NamedSharding) -> tuple[Array, None]:
    return _gathered(kernel, everywhere, split), None


def _scatter(everywhere: NamedSharding, split: NamedSharding, _: None, g: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(g, split),)


_gathered.defvjp(_gather, _scatter)


def each_clip(function: Callable[..., Any], *arrays: Array) -> Any:
    """`function`, which treats every clip alone, of arrays [b, ...], run where the clips lie.

    For kernels that the compiler does not partition: left alone, it has every device run them on
    all clips. Where devices share a clip, the function sees the mesh and whole arrays.
    """
    axes = (mesh_axes.DATA, mesh_axes.FSDP)
    mesh = _automatic(*axes)
    if mesh is None:
        return function(*arrays)
    groups = mesh_axes.clips(mesh)
    if groups == 1 or mesh.shape[mesh_axes.FRAMES] > 1 or arrays[0].shape[0] % groups:
        return function(*arrays)
    spec = PartitionSpec(axes)
    mapped = jax.shard_map(
        function, in_specs=(spec,) * len(arrays), out_specs=spec, axis_names=set(mesh.axis_names),
        check_vma=False,
    )  # fmt: skip
    return mapped(*arrays)


def each_frame(function: Callable[[Array], Array], x: Array) -> Array:
    """`function`, which treats every frame alone, of clips [b, t, ...], run where the frames lie.

    Such a function makes one axis of clips and frames, whose split the compiler cannot name: left
    alone, it has every device compute all frames of its clips.
    """
    mesh = _automatic(mesh_axes.FRAMES)
    if mesh is None:
        return function(x)
    parts = mesh.shape[mesh_axes.FRAMES]
    if parts == 1 or x.shape[1] % parts:
        return function(x)
    spec = PartitionSpec(None, mesh_axes.FRAMES)
    axes = {mesh_axes.FRAMES}
    return jax.shard_map(function, in_specs=spec, out_specs=spec, axis_names=axes)(x)


def split_clips(network: Callable[..., Any]) -> Callable[..., Any]:
    """The network with its first argument and its result split as `pin_clips` does."""

    def split(x: Float[Array, "b t h w c"], *args: Any) -> Float[Array, "b t h w o"]:
        return pin_clips(network(pin_clips(x), *args))

    return split


def put_batch(local: Any, mesh: Mesh) -> Any:
    """Global arrays from this process's share of a batch, a tree of numpy arrays.

    Returns before the copies are done. The global batch must divide as `check_batch` says.
    """
    placement = batch(mesh)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(placement, leaf), local)


def put(tree: Any, placements: Any) -> Any:
    """Places host arrays, which every process holds in full.

    `placements` is one sharding for all of them, or a tree of shardings.
    """
    if isinstance(placements, NamedSharding):
        placements = jax.tree.map(lambda _: placements, tree)

    def put_leaf(leaf, placement):
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, placement, lambda index: host[index])

    return jax.tree.map(put_leaf, tree, placements)
