"""Where every array lives: one rule for weights, one for batches.

Weights (and whatever has their shapes: moments, averages) are split along their largest dimension
that the `fsdp` axis divides; small ones are repeated on every device. Batches are split by clip
over all devices.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from v3d_jax.parallel import mesh as mesh_axes

# Below this many elements, gathering a weight costs more than keeping it everywhere.
SMALL = 2**16


def rule(shape: tuple[int, ...], fsdp: int, small: int = SMALL) -> PartitionSpec:
    """The split of one weight: its largest dimension divisible by `fsdp`, if it is not small."""
    divisible = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or int(np.prod(shape)) < small or not divisible:
        return PartitionSpec()
    # Of equal dimensions the last one, a kernel's outputs.
    chosen = max(divisible, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*(None,) * chosen, mesh_axes.FSDP)


def weights(abstract: Any, mesh: Mesh, small: int = SMALL) -> Any:
    """The rule over a tree of arrays or abstract arrays, such as a whole train state."""
    fsdp = mesh.shape[mesh_axes.FSDP]
    return jax.tree.map(lambda leaf: NamedSharding(mesh, rule(leaf.shape, fsdp, small)), abstract)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch(mesh: Mesh) -> NamedSharding:
    """The leading axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec((mesh_axes.DATA, mesh_axes.FSDP)))


def put_batch(local: Any, mesh: Mesh) -> Any:
    """Global arrays from this process's share of a batch, a tree of numpy arrays.

    Returns before the copies are done. The global batch must divide by the number of devices.
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
