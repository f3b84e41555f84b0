"""Which Gaussians touch which tiles, tile by tile in the order of depth; static shapes.

A tile is 8 x 8 pixels of one view. Every visible (view, Gaussian) gets one slot for each tile of
the box around its footprint, the ellipse outside of which alpha is below 1/255; an exact test then
drops the tiles of the box that the ellipse misses. Two sorts with one uint32 key each give the
order: (view, Gaussian) by depth, then slots, stably, by tile.

Axes: n (view, Gaussian), s slot, g tile of any view. Slots exist twice: in order of owner, where
those of one Gaussian lie side by side, and in order of tile.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

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


def grid(width: int, height: int) -> tuple[int, int]:
    """Rows and columns of tiles that cover an image."""
    return -(-height // TILE), -(-width // TILE)


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
    rows, columns = grid(*size)
    flat = Projection(*(field.reshape(-1) for field in projection))
    distance = jnp.tile(reach(log_opacity), num_views)
    visible = flat.visible & (distance > 0.0)
    key = jnp.where(visible, binning.positive_bits(flat.depth), jnp.uint32(CULLED))
    order = jnp.arange(key.shape[0], dtype=jnp.int32)
    _, order = binning.sort_by_key(key, order)

    # From here on everything is in order of depth: slots then read their owners side by side.
    p = Projection(*(field[order] for field in flat))
    distance, visible, view = distance[order], visible[order], order // num_gaussians
    spread = jnp.sqrt(jnp.maximum(distance, 0.0))
    # variance * conic = 1 / (1 - correlation^2): in a needle, a conic's last bit moves the tip.
    half_x, half_y = (
        spread * jnp.sqrt(variance * (1.0 + STRETCH * variance * conic))
        for variance, conic in ((p.variance_x, p.conic_xx), (p.variance_y, p.conic_yy))
    )
    first_x, count_x = tile_range(p.mean_x, half_x, size[0])
    first_y, count_y = tile_range(p.mean_y, half_y, size[1])
    finite = jnp.isfinite(p.mean_x + p.mean_y + p.variance_x + p.variance_y)
    count = jnp.where(visible & finite, count_x * count_y, 0)
    runs = binning.expand(count, capacity)
    owner = jnp.maximum(runs.owner, 0)
    across = jnp.maximum(count_x, 1)[owner]
    column = first_x[owner] + runs.rank % across
    row = first_y[owner] + runs.rank // across
    hit = runs.valid & touches(
        (p.mean_x[owner], p.mean_y[owner]),
        (p.conic_xx[owner], p.conic_xy[owner], p.conic_yy[owner]),
        distance[owner],
        column,
        row,
        size,
    )
    num_tiles = num_views * rows * columns
    tile = (view[owner] * rows + row) * columns + column
    tile = jnp.where(hit, tile, num_tiles).astype(jnp.uint32)
    tile, slot = binning.sort_by_key(tile, jnp.arange(capacity, dtype=jnp.int32))
    end = jnp.cumsum(count)
    return Bins(
        order,
        jnp.clip(end - count, 0, capacity),
        jnp.clip(end, 0, capacity),
        owner[slot],
        slot,
        binning.sorted_offsets(tile, num_tiles),
        runs.total,
    )
