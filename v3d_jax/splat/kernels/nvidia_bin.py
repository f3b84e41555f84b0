"""Binning on NVIDIA GPUs by the Triton kernels of `v3d_jax.splat.kernels.slots`.

Takes and gives what `v3d_jax.splat.bin.bin_splats` does, which is the plain twin. Both sorts, and
the boxes around Gaussians, are the same; the tile sort carries owners instead of positions. Axes
are those of `v3d_jax.splat.bin`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, UInt

from v3d_jax.ops import binning
from v3d_jax.splat import bin as plain
from v3d_jax.splat.bin import Bins, Boxes, Tiling
from v3d_jax.splat.kernels import launches
from v3d_jax.splat.kernels.launches import Launch, ints
from v3d_jax.splat.project import Projection


class Settings(NamedTuple):
    """How the kernels are built; results do not depend on it."""

    counts: int = 2048  # of a program that adds them up
    warps_counts: int = 8
    slots: int = 256  # of a program that emits them
    warps: int = 4
    tiles: int = 64  # of a program that searches their first slots, or blocks their owners
    warps_tiles: int = 2


def bin_splats(
    projection: Projection,
    log_opacity: Float[Array, "k"],
    size: tuple[int, int],
    capacity: int,
    settings: Settings | None = None,
) -> Bins:
    """Sorts the slots of all views into tiles, as `v3d_jax.splat.bin.bin_splats`.

    The ends of runs also hold where more than 2**31 slots are needed.
    """
    settings = settings or Settings()
    num_views, num_gaussians = projection.depth.shape
    tiles = plain.tiling(num_views, *size)
    order, distance = plain.by_depth(projection, log_opacity, tiles)
    boxes = plain.boxes_in_order(projection, order, distance, size)
    start, end = runs(settings, boxes.count, capacity)
    (edge,) = launches.run(edges(settings, end, capacity))
    emission = emit(
        settings, (edge, start, end), order, boxes, num_gaussians, tiles, size, capacity
    )
    key, rank = binning.sort_by_key(*launches.run(emission))
    # Ranks of the first part come before; what is not visible has no slots.
    second = jnp.sum(distance[: tiles.views * num_gaussians] > 0.0, dtype=jnp.int32)
    (first,) = launches.run(offsets(settings, key, rank, second, tiles))
    slot = positions(boxes, start, key, rank, tiles)
    return Bins(order, start, end, rank, slot, first, binning.saturating_sum(boxes.count))


def runs(
    settings: Settings, count: Int32[Array, "n"], capacity: int
) -> tuple[Int32[Array, "n"], Int32[Array, "n"]]:
    """First slot of every (view, Gaussian), and the one after its last, at most `capacity`."""
    (before,) = launches.run(sums(settings, count, capacity))
    start, end = launches.run(prefix(settings, count, before, capacity))
    return start, end


def sums(settings: Settings, count: Int32[Array, "n"], capacity: int) -> Launch:
    """What adds up blocks of counts."""
    numbers = (count.shape[0], capacity)
    grid = -(-count.shape[0] // settings.counts)
    static = {"B": settings.counts}
    return Launch(
        "slots", "sums", (count,), numbers, (ints(grid),), static, grid, settings.warps_counts
    )


def prefix(
    settings: Settings, count: Int32[Array, "n"], before: Int32[Array, "b"], capacity: int
) -> Launch:
    """What gives the runs, from the blocks' sums."""
    number = count.shape[0]
    return Launch(
        "slots",
        "prefix",
        (count, before),
        (number, capacity),
        (ints(number), ints(number)),
        {"B": settings.counts},
        before.shape[0],
        settings.warps_counts,
    )


def edges(settings: Settings, end: Int32[Array, "n"], capacity: int) -> Launch:
    """What gives the rank of the owner of the first slot of every block, and of the next."""
    blocks = -(-capacity // settings.slots)
    return Launch(
        "slots",
        "edges",
        (end,),
        (end.shape[0] - 1, blocks),
        (ints(blocks + 1),),
        {"S": settings.slots, "G": settings.tiles},
        -(-(blocks + 1) // settings.tiles),
        settings.warps_tiles,
    )


def emit(
    settings: Settings,
    runs: tuple[Int32[Array, "b"], Int32[Array, "n"], Int32[Array, "n"]],
    order: Int32[Array, "n"],
    boxes: Boxes,
    num_gaussians: int,
    tiles: Tiling,
    size: tuple[int, int],
    capacity: int,
) -> Launch:
    """What gives the tile in its part, `bin.tile_keys`, and the rank of the owner of every slot.

    `runs`: the owners at `edges`, the first slot of every owner and the one after its last.
    """
    view = order // num_gaussians % tiles.views
    corner = (view * tiles.rows + boxes.first_y) * tiles.columns + boxes.first_x
    short = jnp.uint16 if tiles.keys <= plain.MOST_SHORT else jnp.uint32
    return Launch(
        "slots",
        "emit",
        (*runs, corner, *boxes[:9]),
        (order.shape[0] - 1, tiles.columns, *size, tiles.keys, capacity),
        (jax.ShapeDtypeStruct((capacity,), short), ints(capacity)),
        {"S": settings.slots},
        -(-capacity // settings.slots),
        settings.warps,
    )


def offsets(
    settings: Settings,
    key: UInt[Array, "s"],
    rank: Int32[Array, "s"],
    second: Int32[Array, ""],
    tiles: Tiling,
) -> Launch:
    """What gives the first slot of each tile; `second` is the first rank of the second part."""
    return Launch(
        "slots",
        "offsets",
        (key, rank, second.reshape(1)),
        (key.shape[0], tiles.tiles),
        (ints(tiles.tiles + 1),),
        {"G": settings.tiles, "PARTS": tiles.parts},
        -(-(tiles.tiles + 1) // settings.tiles),
        settings.warps_tiles,
    )


def positions(
    boxes: Boxes,
    start: Int32[Array, "n"],
    key: UInt[Array, "s"],
    rank: Int32[Array, "s"],
    tiles: Tiling,
) -> Int32[Array, "s"]:
    """Position in order of owner of every slot in order of tile, from its place in the box.

    Only gradients need it: a compiled program without them does not compute it.
    """
    origin = start - boxes.first_y * boxes.across - boxes.first_x
    # One row of two, as in `bin.boxes_in_order`.
    pairs = lax.optimization_barrier(jnp.stack([origin, boxes.across], axis=1))[rank]
    tile = key.astype(jnp.int32)
    row, column = tile // tiles.columns % tiles.rows, tile % tiles.columns
    return pairs[:, 0] + row * pairs[:, 1] + column
