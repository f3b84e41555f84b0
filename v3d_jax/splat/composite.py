"""Compositing of binned splats into tiles, and its gradient; bitwise repeatable.

Tiles' lists are cut into chunks that are all computed side by side, in three passes:

1. every chunk's own product of 1 - alpha; a scan down each tile then gives the transmittance at
   the start of every chunk;
2. chunks that start with some pixel unfinished are composited: an early exit by not entering. Their
   channels are summed tile by tile;
3. backwards, the scan of pass 2's sums weighted with the cotangents gives what lies behind every
   chunk, so that again all chunks are independent.

Each pass is a loop over blocks of chunks, as many as there are: time follows the scene, memory the
capacity. With P = 64 pixels and K = 16 splats, per-chunk arrays are [c, P], one float for every
K / P of a slot, and nothing of slots x pixels is ever stored but one block's. Sums (over tiles,
over the slots of a Gaussian) run over contiguous entries through a segment tree: no atomics.

Axes: n (view, Gaussian), g tile, c chunk, b chunk of a block, p pixel, d channel.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from v3d_jax.ops import binning
from v3d_jax.splat import chunk as chunks
from v3d_jax.splat.bin import TILE, Bins, Tiling
from v3d_jax.splat.chunk import CHUNK, HIDDEN, PIXELS, SHAPE


class Layout(NamedTuple):
    """Static sizes (all but the last decide shapes)."""

    tiles: Tiling
    block: int  # chunks computed at a time
    unroll: bool | None  # see `chunk.per_platform`


class _Chunks(NamedTuple):
    table: Float[Array, "c f"]  # features of 16 splats, x and y from the tile's centre
    slot: Int32[Array, "c k"]  # in order of owner; distinct and past the last slot for padding
    tile: Int32[Array, "c"]
    first: Bool[Array, "c"]  # of its tile
    last: Bool[Array, "c"]
    offsets: Int32[Array, "g"]  # first chunk of each tile [tiles + 1]
    total: Int32[Array, ""]


class _Live(NamedTuple):
    """Chunks that start unfinished, in order, moved to the front."""

    chunk: Int32[Array, "c"]
    count: Int32[Array, ""]
    offsets: Int32[Array, "g"]  # first live chunk of each tile [tiles + 1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def composite(
    layout: Layout, fields: tuple[Float[Array, "n"], ...], bins: Bins
) -> tuple[Float[Array, "d g p"], Float[Array, "g p"]]:
    """Channels, and the transmittance left behind them, of every pixel of every tile.

    `fields` are pixel x, y, half the conic's xx, its xy, half its yy, log opacity, then the
    channels. Differentiable in them by `custom_vjp`; sums are ordered, so gradients repeat bit for
    bit.
    """
    return _forward(layout, fields, bins)[0]


def _forward(layout: Layout, fields: tuple[Array, ...], bins: Bins) -> tuple[Any, Any]:
    channels = len(fields) - SHAPE
    # Without the barrier whatever made the fields may become a part of stacking them, where
    # neighbouring threads of a GPU write different fields: each would go through all branches.
    features = jnp.stack(lax.optimization_barrier(fields), axis=1)
    cut = _cut(layout, features, bins)
    start = _transmittance(layout, channels, cut)
    live = _find_live(cut, start)
    start = start[live.chunk]

    def one_block(at: Array, into: Array) -> Array:
        index = _rows(live.chunk, at, layout.block)
        part = chunks.per_platform(
            functools.partial(_composite_block, channels),
            layout.unroll,
            *(cut.table, index, _rows(start, at, layout.block), cut.last[index]),
        )
        for d, plane in enumerate((*part.channels, part.left)):
            into = lax.dynamic_update_slice(into, plane[None], (jnp.int32(d), at, jnp.int32(0)))
        return into

    parts = jnp.zeros((channels + 1, *start.shape), start.dtype)
    parts = _loop(one_block, live.count, layout.block, parts)
    begin, end = live.offsets[:-1], live.offsets[1:]
    tiles = jax.vmap(lambda part: binning.run_sums(part, begin, end, start.shape[0]))(parts)
    left = jnp.where((begin < end)[:, None], tiles[-1], 1.0)
    return (tiles[:-1], left), (features, bins, cut, live, start, parts, left)


def _composite_block(channels: int, unroll: bool, *arrays: Array) -> chunks.Composite:
    return chunks.composite(unroll, channels, *arrays)


def _backward(
    layout: Layout, saved: Any, cotangents: tuple[Array, Array]
) -> tuple[tuple[Array, ...], None]:
    features, bins, cut, live, start, parts, left = saved
    channels = features.shape[1] - SHAPE
    v_channels, v_left = cotangents
    tile = cut.tile[live.chunk]
    ahead = sum(v_channels[d][tile] * parts[d] for d in range(channels))
    alive = (jnp.arange(tile.shape[0]) < live.count)[:, None]
    ahead = lax.optimization_barrier(jnp.where(alive, ahead, 0.0))
    # What later chunks add: the inclusive scan of the next chunk of the same tile. (Subtracting a
    # chunk's own share from its inclusive scan would cancel.)
    next_tile = jnp.concatenate([tile[1:], jnp.full(1, -1, tile.dtype)])
    same = (next_tile == tile)[:, None]
    behind = lax.optimization_barrier(binning.run_scan(jnp.add, ahead, ~same[:, 0], reverse=True))
    behind = jnp.where(same, jnp.roll(behind, -1, axis=0), 0.0) + (left * v_left)[tile]

    size = SHAPE + channels
    capacity = bins.slot.shape[0]

    def one_block(at: Array, into: Array) -> Array:
        index = _rows(live.chunk, at, layout.block)
        of_tile = cut.tile[index]
        found = chunks.per_platform(
            chunks.gradient,
            layout.unroll,
            *(cut.table, index, _rows(start, at, layout.block), _rows(behind, at, layout.block)),
            tuple(v[of_tile] for v in v_channels),
        )
        number = at + jnp.arange(layout.block, dtype=jnp.int32)
        padding = capacity + number[:, None] * CHUNK + jnp.arange(CHUNK, dtype=jnp.int32)[None]
        used = (number < live.count)[:, None] & (cut.slot[index] < capacity)
        target = jnp.where(used, cut.slot[index], padding).reshape(-1)
        return into.at[target].set(found.reshape(-1, size), mode="drop", unique_indices=True)

    slots = jnp.zeros((capacity, size), features.dtype)
    slots = _loop(one_block, live.count, layout.block, slots)
    tiles = layout.tiles.rows * layout.tiles.columns
    # The barrier, or a GPU would search the tree anew for every product below.
    owners = lax.optimization_barrier(binning.run_sums(slots, bins.run_start, bins.run_end, tiles))
    g, gx, gy, gxx, gxy, gyy = (owners[:, i] for i in range(SHAPE))
    half_xx, xy, half_yy = (features[bins.order, i] for i in (2, 3, 4))
    own = (2 * half_xx * gx + xy * gy, xy * gx + 2 * half_yy * gy, -gxx, -gxy, -gyy, g)
    owners = jnp.concatenate([jnp.stack(own, axis=1), owners[:, SHAPE:]], axis=1)
    result = jnp.zeros_like(features).at[bins.order].set(owners, unique_indices=True)
    return tuple(result[:, i] for i in range(size)), None


composite.defvjp(_forward, _backward)


def _cut(layout: Layout, features: Array, bins: Bins) -> _Chunks:
    """Cuts tiles' lists into chunks and writes their splats side by side."""
    num_tiles, capacity = bins.offsets.shape[0] - 1, bins.slot.shape[0]
    count = bins.offsets[1:] - bins.offsets[:-1]
    needed = capacity // CHUNK + num_tiles
    needed += -needed % layout.block
    cut = binning.chunks(bins.offsets, CHUNK, needed)
    tile = jnp.minimum(cut.group, num_tiles - 1)
    end = jnp.cumsum(-(-count // CHUNK))
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), end])
    number = jnp.arange(needed, dtype=jnp.int32)

    k = jnp.arange(CHUNK, dtype=jnp.int32)[None]
    there = k < cut.length[:, None]
    index = jnp.where(there, cut.start[:, None] + k, 0)
    # One permutation of all owners first: gathers of slots then stay within neighbours' rows.
    splats = features[bins.order][bins.rank[index]]  # [c, k, f]
    place = tile // layout.tiles.parts  # row and column in the last places
    x = (place % layout.tiles.columns) * TILE + 0.5 * TILE
    y = (place // layout.tiles.columns % layout.tiles.rows) * TILE + 0.5 * TILE
    # Whole rows at once: stacked columns would have a GPU's threads take a branch for each.
    column = jnp.arange(features.shape[1])[None, None]
    centre = jnp.where(column == 0, x[:, None, None], y[:, None, None])
    table = splats - jnp.where(column < 2, centre, 0.0)
    table = jnp.where(there[..., None] | (column != SHAPE - 1), table, HIDDEN)
    table = table.reshape(needed, -1)
    slot = jnp.where(there, bins.slot[index], capacity + number[:, None] * CHUNK + k)
    first = number == offsets[tile]
    last = number == offsets[tile + 1] - 1
    return _Chunks(table, slot, tile, first, last, offsets, cut.total)


def _transmittance(layout: Layout, channels: int, cut: _Chunks) -> Float[Array, "c p"]:
    """Transmittance at the start of every chunk, as if no pixel ever stopped."""

    def one_block(at: Array, into: Array) -> Array:
        index = at + jnp.arange(layout.block, dtype=jnp.int32)
        even, odd = chunks.per_platform(
            functools.partial(_pass_block, channels), layout.unroll, cut.table, index
        )
        return lax.dynamic_update_slice_in_dim(into, even * odd, at, axis=0)

    through = jnp.ones((cut.table.shape[0], PIXELS), cut.table.dtype)
    through = _loop(one_block, cut.total, layout.block, through)
    # The barrier, or whatever takes the result would each compute the scan's last levels.
    through = lax.optimization_barrier(binning.run_scan(jnp.multiply, through, cut.first))
    return jnp.where(cut.first[:, None], 1.0, jnp.roll(through, 1, axis=0))


def _pass_block(channels: int, unroll: bool, *arrays: Array) -> tuple[Array, Array]:
    return chunks.pass_through(unroll, channels, *arrays)


def _find_live(cut: _Chunks, start: Array) -> _Live:
    number = jnp.arange(start.shape[0], dtype=jnp.int32)
    alive = (number < cut.total) & jnp.any(start > chunks.T_MIN, axis=1)
    chunk, before = binning.compact(alive)
    return _Live(chunk, before[-1], before[cut.offsets])


def _loop(
    one_block: Callable[[Array, Any], Any], count: Int32[Array, ""], block: int, start: Any
) -> Any:
    """Runs one_block(first, carry) for every block of the first `count` entries."""

    def step(state: tuple[Array, Any]) -> tuple[Array, Any]:
        at, carry = state
        return at + block, one_block(at, carry)

    return lax.while_loop(lambda state: state[0] < count, step, (jnp.int32(0), start))[1]


def _rows(array: Array, at: Array, block: int) -> Array:
    return lax.dynamic_slice_in_dim(array, at, block)
