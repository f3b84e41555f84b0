"""Which Gaussians touch which tiles, tile by tile in the order of depth; static shapes.

A tile is 8 x 8 pixels of one view. Every visible (view, Gaussian) gets one slot for each tile of
the box around its footprint, the ellipse outside of which alpha is below 1/255; an exact test then
drops the tiles of the box that the ellipse misses. Two sorts with one unsigned key each give the
order: (view, Gaussian) by depth, then slots, stably, by tile.

A key of 16 bits takes a radix sort half the passes, but 15 views of 512 x 512 already have all the
tiles that it can tell apart. With up to twice as many, the first sort puts one half of the views
before the other, through the sign bit that depths leave unused; the same tiles of both halves then
share a key, under which the second sort keeps the halves in this order. So tiles are numbered by
view in its half, row, column, half (`Tiling`).

Axes: n (view, Gaussian), s slot, g tile of any view. Slots exist twice: in order of owner, where
those of one Gaussian lie side by side, and in order of tile.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt

from v3d_jax.ops import binning
from v3d_jax.splat.project import Projection

TILE = 8
ALPHA_MIN = 1 / 255  # gsplat's cut: fainter contributions are dropped
LOG_ALPHA_MIN = math.log(ALPHA_MIN)
EXTENT = 3.33  # standard deviations; just beyond the cut at opacity 1
MARGIN = 1e-3  # pixels added around boxes, above the rounding of float32 positions
ROUNDING = 1e-6  # bound of float32 errors of a quadratic form, relative to its positive terms
STRETCH = 4e-7  # of float32 rounding of a conic on its variance, over 1 - correlation^2
CULLED = 0xFFFFFFFF
MOST_SHORT = 0xFFFF  # tiles that a key of 16 bits can tell apart


class Bins(NamedTuple):
    """Slots of every tile, front to back. Slots past the last valid one mean nothing."""

    order: Int32[Array, "n"]  # rank in depth -> flat (view, Gaussian)
    run_start: Int32[Array, "n"]  # first slot of each rank, in order of owner
    run_end: Int32[Array, "n"]
    rank: Int32[Array, "s"]  # of the owner of each slot, in order of tile
    slot: Int32[Array, "s"]  # position in order of owner of each slot in order of tile
    offsets: Int32[Array, "g"]  # first slot of each tile [tiles + 1], in order of tile
    total: Int32[
        Array, ""
    ]  # slots needed, saturating; above the capacity, the farthest are missing


class Tiling(NamedTuple):
    """How the tiles of all views are numbered: by view in its half, row, column, half."""

    parts: int  # 1: views are not halved
    views: int  # in a part; the last part may lack one
    rows: int
    columns: int

    @property
    def keys(self) -> int:
        """Tiles that the sort tells apart."""
        return self.views * self.rows * self.columns

    @property
    def tiles(self) -> int:
        """All of them."""
        return self.keys * self.parts


class Boxes(NamedTuple):
    """(view, Gaussian) in order of depth, and the tiles of the box around each."""

    mean_x: Float[Array, "n"]  # pixels
    mean_y: Float[Array, "n"]
    conic_xx: Float[Array, "n"]  # 1 / px^2
    conic_xy: Float[Array, "n"]
    conic_yy: Float[Array, "n"]
    reach: Float[Array, "n"]
    first_x: Int32[Array, "n"]  # tile of the box's corner
    first_y: Int32[Array, "n"]
    across: Int32[Array, "n"]  # tiles in a row of the box, at least 1
    count: Int32[Array, "n"]  # tiles in all of it, 0 where nothing is visible


def grid(width: int, height: int) -> tuple[int, int]:
    """Rows and columns of tiles that cover an image."""
    return -(-height // TILE), -(-width // TILE)


def tiling(views: int, width: int, height: int) -> Tiling:
    """The tiles of so many images; halved where that makes keys of 16 bits suffice."""
    whole = Tiling(1, views, *grid(width, height))
    halved = whole._replace(parts=2, views=-(-views // 2))
    return halved if halved.keys <= MOST_SHORT < whole.keys else whole


def reach(log_opacity: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Squared Mahalanobis distance at which alpha falls to 1/255; negative: nowhere above it."""
    return jnp.minimum(2.0 * (log_opacity - LOG_ALPHA_MIN), EXTENT * EXTENT)


def tile_range(
    mean: Float[Array, "*n"], half: Float[Array, "*n"], size: int
) -> tuple[Int32[Array, "*n"], Int32[Array, "*n"]]:
    """First tile, and number of tiles, with a pixel centre of the image in [mean -+ half]."""
    half = half * (1.0 + ROUNDING) + MARGIN
    first = jnp.clip(jnp.ceil(mean - half - 0.5), 0, size).astype(jnp.int32)
    last = jnp.clip(jnp.floor(mean + half - 0.5), -1, size - 1).astype(jnp.int32)
    return first // TILE, jnp.where(first <= last, last // TILE - first // TILE + 1, 0)


def touches(
    mean: tuple[Float[Array, "s"], Float[Array, "s"]],
    conic: tuple[Float[Array, "s"], Float[Array, "s"], Float[Array, "s"]],
    reach: Float[Array, "s"],
    column: Int32[Array, "s"],
    row: Int32[Array, "s"],
    size: tuple[int, int],
) -> Bool[Array, "s"]:
    """Whether the ellipse meets the rectangle of a tile's pixel centres; `size`: width, height.

    The least value of the quadratic form over a rectangle lies on a side that faces the mean, of
    which there are at most two: one minimum over a segment for each direction.
    """
    a, b, c = conic
    sides = [  # the rectangle, from the mean
        (
            tile * TILE + 0.5 - centre,
            jnp.minimum(tile * TILE + (TILE - 0.5), extent - 0.5) - centre,
        )
        for tile, centre, extent in zip((column, row), mean, size, strict=True)
    ]
    near_x, near_y = (jnp.clip(0.0, low, high) for low, high in sides)
    points = (
        (near_x, jnp.clip(-b * near_x / c, *sides[1])),
        (jnp.clip(-b * near_y / a, *sides[0]), near_y),
    )
    least = jnp.inf
    for x, y in points:
        squares = a * x * x + c * y * y
        least = jnp.minimum(least, squares + 2.0 * b * x * y - ROUNDING * squares)
    return least <= reach * (1.0 + ROUNDING) + 10 * ROUNDING


def bin_splats(
    projection: Projection, log_opacity: Float[Array, "k"], size: tuple[int, int], capacity: int
) -> Bins:
    """Sorts the slots of all views into tiles; `size` is width, height, `capacity` counts slots."""
    num_views, num_gaussians = projection.depth.shape
    tiles = tiling(num_views, *size)
    order, distance = by_depth(projection, log_opacity, tiles)
    view = order // num_gaussians
    boxes = boxes_in_order(projection, order, distance, size)
    runs = binning.expand(boxes.count, capacity)
    owner = jnp.maximum(runs.owner, 0)
    tile, slot = by_tile(tile_keys(boxes, runs, view, tiles, size), boxes, view, tiles)
    end = jnp.cumsum(boxes.count)
    # The barrier, or a GPU would do the gradient's index arithmetic in the kernel that adds up the
    # counts: 4 ms instead of next to nothing.
    ends = lax.optimization_barrier((end - boxes.count, end))
    return Bins(
        order,
        *(jnp.clip(part, 0, capacity) for part in ends),
        owner[slot],
        slot,
        binning.sorted_offsets(tile, tiles.tiles),
        runs.total,
    )


def by_depth(
    projection: Projection, log_opacity: Float[Array, "k"], tiles: Tiling
) -> tuple[Int32[Array, "n"], Float[Array, "n"]]:
    """Every (view, Gaussian), nearest first, and the `reach` of each, -1 where none is visible.

    All of one part of the views comes before the next; what is not visible comes last. The reach is
    in the order of the projection.
    """
    distance = jnp.tile(reach(log_opacity), projection.depth.shape[0])
    visible = projection.visible.reshape(-1) & (distance > 0.0)
    bits = binning.positive_bits(projection.depth.reshape(-1))
    order = jnp.arange(bits.shape[0], dtype=jnp.int32)
    part = order // (tiles.views * projection.depth.shape[1])
    key = jnp.where(visible, bits | part.astype(jnp.uint32) << 31, jnp.uint32(CULLED))
    return binning.sort_by_key(key, order)[1], jnp.where(visible, distance, -1.0)


def boxes_in_order(
    projection: Projection,
    order: Int32[Array, "n"],
    distance: Float[Array, "n"],
    size: tuple[int, int],
) -> Boxes:
    """The tiles of the box around every ellipse; `order` and `distance` are those of `by_depth`."""
    # As rows, because a GPU reads 32 bytes for every 4 that lie alone; the barrier, or the compiler
    # would take them apart again.
    table = jnp.stack([*(field.reshape(-1) for field in projection[:7]), distance], axis=1)
    rows = lax.optimization_barrier(table)[order]
    mean_x, mean_y, xx, xy, yy, variance_x, variance_y, distance = (rows[:, i] for i in range(8))
    spread = jnp.sqrt(jnp.maximum(distance, 0.0))
    # variance * conic = 1 / (1 - correlation^2): in a needle, a conic's last bit moves the tip.
    half_x, half_y = (
        spread * jnp.sqrt(variance * (1.0 + STRETCH * variance * conic))
        for variance, conic in ((variance_x, xx), (variance_y, yy))
    )
    first_x, count_x = tile_range(mean_x, half_x, size[0])
    first_y, count_y = tile_range(mean_y, half_y, size[1])
    finite = jnp.isfinite(mean_x + mean_y + variance_x + variance_y)
    count = jnp.where((distance > 0.0) & finite, count_x * count_y, 0)
    across = jnp.maximum(count_x, 1)
    return Boxes(mean_x, mean_y, xx, xy, yy, distance, first_x, first_y, across, count)


def tile_keys(
    boxes: Boxes,
    runs: binning.Runs,
    view: Int32[Array, "n"],
    tiles: Tiling,
    size: tuple[int, int],
) -> UInt[Array, "s"]:
    """The tile of every slot in its half; `tiles.keys` where the ellipse misses it or none is left.

    16 bits where that suffices.
    """
    owner = jnp.maximum(runs.owner, 0)
    own = Boxes(*(field[owner] for field in boxes))
    down = lax.div(runs.rank, own.across)  # neither is negative
    column, row = own.first_x + runs.rank - down * own.across, own.first_y + down
    conic = (own.conic_xx, own.conic_xy, own.conic_yy)
    hit = touches((own.mean_x, own.mean_y), conic, own.reach, column, row, size)
    tile = ((view % tiles.views)[owner] * tiles.rows + row) * tiles.columns + column
    tile = jnp.where(runs.valid & hit, tile, tiles.keys)
    return tile.astype(jnp.uint16 if tiles.keys <= MOST_SHORT else jnp.uint32)


def by_tile(
    key: UInt[Array, "s"], boxes: Boxes, view: Int32[Array, "n"], tiles: Tiling
) -> tuple[UInt[Array, "s"], Int32[Array, "s"]]:
    """The tile of every slot, ascending, and its position in order of owner."""
    slot = jnp.arange(key.shape[0], dtype=jnp.int32)
    tile, slot = binning.sort_by_key(key, slot)
    if tiles.parts == 1:
        return tile, slot
    first = binning.saturating_sum(jnp.where(view < tiles.views, boxes.count, 0))
    return 2 * tile.astype(jnp.uint32) + (slot >= first).astype(jnp.uint32), slot
