"""Slots of tiles on NVIDIA GPUs: the device code of binning, in Triton.

Between the two sorts of `v3d_jax.splat.bin`, one pass over (view, Gaussian) and one over slots:

- `sums` and `prefix`: where the slots of each (view, Gaussian) begin and end, in two launches, the
  second of which adds up for itself what lies before its block;
- `edges`: the owner of the first slot of every block of slots is searched;
- `emit`: a program has a block of slots, so that all have the same work however large a Gaussian
  is. Every slot searches its owner, between those of its block's first and of the next one's; it
  tests its tile, and writes tile and owner;
- `offsets`: once slots are sorted by tile, every tile searches its first one.

A search in memory that the caches hold costs less than the passes that spread marks over all slots
and sum them. Results are those of `v3d_jax.splat.bin` operation by operation. Importing this module
needs `triton`; `v3d_jax.splat.kernels.nvidia_bin` launches.
"""

from typing import no_type_check

import triton
import triton.language as tl

TILE = tl.constexpr(8)
ROUNDING = tl.constexpr(1e-6)  # as in `v3d_jax.splat.bin`


@triton.jit
@no_type_check
def sums(count, number, limit, out, B: tl.constexpr):
    """Sum of every block of B counts, at most `limit`."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    total = tl.sum(tl.load(count + i, mask=i < number, other=0).to(tl.int64), 0)
    tl.store(out + tl.program_id(0), tl.minimum(total, tl.cast(limit, tl.int64)).to(tl.int32))


@triton.jit
@no_type_check
def prefix(count, before, number, limit, start, end, B: tl.constexpr):
    """Sums of the counts before each, and up to and with it, at most `limit`; `before`: `sums`."""
    program, i = tl.program_id(0), tl.arange(0, B)
    base, at = tl.cast(0, tl.int64), 0
    while at < program:
        base += tl.sum(tl.load(before + at + i, mask=at + i < program, other=0).to(tl.int64), 0)
        at += B
    i = program * B + i
    own = tl.load(count + i, mask=i < number, other=0).to(tl.int64)
    upto, most = base + tl.cumsum(own, 0), tl.cast(limit, tl.int64)
    tl.store(start + i, tl.minimum(upto - own, most).to(tl.int32), mask=i < number)
    tl.store(end + i, tl.minimum(upto, most).to(tl.int32), mask=i < number)


@triton.jit
@no_type_check
def _owner(end, slot, owner, size):
    """First i of [owner, owner + size) with end[i] > slot, or owner + size; of every slot."""
    while size > 0:
        half = (size + 1) // 2
        passed = tl.load(end + owner + (half - 1)) <= slot
        owner = tl.where(passed, owner + half, owner)
        size -= half
    return owner


@triton.jit
@no_type_check
def edges(end, final, blocks, out, S: tl.constexpr, G: tl.constexpr):
    """Owner of the first of every S slots, and of what would come after all [blocks + 1].

    It is `final`, the last owner, where no slot is left.
    """
    block = tl.program_id(0) * G + tl.arange(0, G)
    owner = _owner(end, block * S, tl.zeros([G], tl.int32), tl.cast(final, tl.int32))
    tl.store(out + block, owner, mask=block <= blocks)


@triton.jit
@no_type_check
def _min(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
@no_type_check
def _clip(x, low, high):
    return _min(tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL), high)


@triton.jit
@no_type_check
def _side(tile, centre, extent):
    """First and last pixel centre of tiles in an image of `extent` pixels, from `centre`."""
    pixel = tile * TILE
    last = _min(pixel.to(tl.float32) + (TILE - 0.5), extent - 0.5)
    return pixel.to(tl.float32) + 0.5 - centre, last - centre


@triton.jit
@no_type_check
def _least(a, b, c, x, y):
    """The quadratic form at (x, y), less the bound of its rounding."""
    squares = a * x * x + c * y * y
    return squares + 2.0 * b * x * y - ROUNDING * squares


@triton.jit
@no_type_check
def emit(
    edge, start, end, corner,
    mean_x, mean_y, conic_xx, conic_xy, conic_yy, reach, first_x, first_y, across,
    final, columns, width, height, keys, capacity,
    key, rank,
    S: tl.constexpr,
):  # fmt: skip
    """Tile and owner of every slot in the order of owners [capacity]; S of them a program.

    The tile is `keys` where the ellipse misses it or no slot is left, as in `bin.tile_keys`;
    `corner` is that of the box's first tile.
    """
    block = tl.program_id(0)
    slot = block * S + tl.arange(0, S)
    low, high = tl.load(edge + block), tl.load(edge + block + 1)
    owner = _owner(end, slot, low + tl.zeros([S], tl.int32), high - low)
    place = slot - tl.load(start + owner)
    wide = tl.load(across + owner)
    down = place // wide
    right_of = place - down * wide
    column, row = tl.load(first_x + owner) + right_of, tl.load(first_y + owner) + down
    a, b, c = tl.load(conic_xx + owner), tl.load(conic_xy + owner), tl.load(conic_yy + owner)
    left, right = _side(column, tl.load(mean_x + owner), tl.cast(width, tl.float32))
    top, bottom = _side(row, tl.load(mean_y + owner), tl.cast(height, tl.float32))
    near_x, near_y = _clip(0.0, left, right), _clip(0.0, top, bottom)
    least = _least(a, b, c, near_x, _clip(tl.div_rn(-b * near_x, c), top, bottom))
    least = _min(least, _least(a, b, c, _clip(tl.div_rn(-b * near_y, a), left, right), near_y))
    hit = least <= tl.load(reach + owner) * (1.0 + ROUNDING) + 10 * ROUNDING
    tile = tl.load(corner + owner) + down * columns + right_of
    tile = tl.where(hit & (slot < tl.load(end + final)), tile, keys)
    inside = slot < capacity
    tl.store(key + slot, tile.to(key.dtype.element_ty), mask=inside)
    tl.store(rank + slot, owner, mask=inside)


@triton.jit
@no_type_check
def offsets(key, rank, second, capacity, tiles, out, G: tl.constexpr, PARTS: tl.constexpr):
    """First slot of every tile, and the number of all [tiles + 1]; `key` [capacity] is sorted.

    With two PARTS, slots whose owner's rank is from second[0] on are of the second, and come after
    those of the first under the same key.
    """
    tile = tl.program_id(0) * G + tl.arange(0, G)
    slot, size = tl.zeros([G], tl.int32), tl.cast(capacity, tl.int32)
    while size > 0:
        half = (size + 1) // 2
        at = slot + (half - 1)
        found = tl.load(key + at).to(tl.int32) * PARTS
        if PARTS == 2:
            found += (tl.load(rank + at) >= tl.load(second)).to(tl.int32)
        slot = tl.where(found < tile, slot + half, slot)
        size -= half
    tl.store(out + tile, slot, mask=tile <= tiles)
