"""Compositing whole tiles on NVIDIA GPUs: the device code, in Triton.

A program owns one tile of 8 x 8 pixels and walks its list in chunks of K splats: all pairs of K
splats and 64 pixels are one array whose pixels lie across the threads of a warp and whose splats
lie one behind the other in a thread's registers. So what runs down a list (transmittance, and what
lies behind) is a plain chain inside a thread, and what is summed over pixels (gradients) is a
product with a constant matrix, on the tensor cores.

- `ordered` puts the table that tiles read from in the order of depth.
- `forward` stops a tile when its last pixel is finished, and notes how many chunks it went through
  and the transmittance at the start of each.
- `backward` walks the same chunks. Every slot's gradient is written once, at its own place: no
  atomics. `v3d_jax.splat.kernels.owners` adds them up.

Semantics and notation are those of `v3d_jax.splat.chunk`: E logarithm of alpha before its cap, T
transmittance in front of a splat, w weight, q what a unit of weight adds to the loss, S what lies
behind a splat. Importing this module needs `triton`; `v3d_jax.splat.kernels.nvidia` launches.
"""

from typing import no_type_check

import triton
import triton.language as tl

TILE = tl.constexpr(8)
PIXELS = tl.constexpr(64)
MOMENTS = tl.constexpr(6)
CHANNELS = tl.constexpr(4)
# Floats of a row of the table. Pixel x and y; half the conic's xx, its xy, half its yy, the opacity
# and the opacity below the cap, all as logarithms to base 2; channels; none.
FIELDS = tl.constexpr(12)
FOUND = tl.constexpr(10)  # floats of a slot's gradient: moments, channels
LOG2_ALPHA_MIN = tl.constexpr(-7.994353436858858)  # of 1 / 255
BELOW_CAP = tl.constexpr(0.9899995)  # the cap, 0.99, is a power of 2 that is rounded
T_MIN = tl.constexpr(1e-4)
HIDDEN = tl.constexpr(-1e30)  # logarithm of the opacity of padding


@triton.jit
@no_type_check
def ordered(table, order, number, out, B: tl.constexpr):
    """Rows of the table in this order [number]; B of them a program."""
    r, column = tl.program_id(0) * B + tl.arange(0, B), tl.arange(0, 16)
    inside = r < number
    source = tl.load(order + r, mask=inside, other=0).to(tl.int64)[:, None] * FIELDS
    target = r.to(tl.int64)[:, None] * FIELDS
    used = inside[:, None] & (column < FIELDS)[None, :]
    row = tl.load(table + source + column[None, :], mask=used)
    tl.store(out + target + column[None, :], row, mask=used)


@triton.jit
@no_type_check
def _pixels():
    """Pixel centres from the centre of the tile, x and y."""
    p = tl.arange(0, PIXELS)
    return (p % TILE).to(tl.float32) - 3.5, (p // TILE).to(tl.float32) - 3.5


@triton.jit
@no_type_check
def _centre(tile, columns, rows, parts):
    """Centre of a tile in pixels of its view; tiles are numbered as `bin.Tiling` does."""
    place = tile // parts
    x = (place % columns) * TILE + TILE // 2
    y = (place // columns % rows) * TILE + TILE // 2
    return x.to(tl.float32), y.to(tl.float32)


@triton.jit
@no_type_check
def _owners(rank, at, k, begin, end):
    """Rows of the chunk that begins at `at`, and whether there is a splat."""
    s = at + k
    there = (s >= begin) & (s < end)
    return tl.load(rank + s, mask=there, other=0).to(tl.int64), there


@triton.jit
@no_type_check
def _splats(table, owner, there):
    """The fields of a chunk's splats, each [k].

    They are fetched while the chunk before is computed: also, what a loop carries is held once in a
    warp, where the compiler would have every thread load it for itself.
    """
    row = table + owner * FIELDS
    return (
        tl.load(row),
        tl.load(row + 1),
        tl.load(row + 2),
        tl.load(row + 3),
        tl.load(row + 4),
        tl.load(row + 5, mask=there, other=HIDDEN),
        tl.load(row + 6),
        tl.load(row + 7),
        tl.load(row + 8),
        tl.load(row + 9),
        tl.load(row + 10),
    )


@triton.jit
@no_type_check
def _alphas(splat, x, y):
    """Alpha of every splat on the pixels at (x, y) [k, p]."""
    dx, dy = x[None, :] - splat[0][:, None], y[None, :] - splat[1][:, None]
    # The pixels of one thread share their column: what only takes dx is computed once for them.
    square, slope = splat[2][:, None] * dx * dx, splat[3][:, None] * dx
    log_alpha = (splat[5][:, None] - square) - (splat[4][:, None] * dy + slope) * dy
    # The form is never negative; a rounded one may be, inside a needle: no more than the opacity.
    alpha = tl.exp2(tl.minimum(log_alpha, splat[6][:, None]))
    return tl.where(log_alpha >= LOG2_ALPHA_MIN, alpha, 0.0)


@triton.jit
@no_type_check
def _through(left_incl, left_excl, right_incl, right_excl):
    """Products of two stretches of a list: with and without the last splat."""
    return left_incl * right_incl, left_incl * right_excl


@triton.jit
@no_type_check
def _last(left, right):
    """The last of a list (as a reduction in a thread's registers, it takes no instruction)."""
    return right


@triton.jit
@no_type_check
def _transmittances(alpha, t, first):
    """T behind and in front of every splat of a chunk that starts at `t`."""
    through = 1.0 - alpha
    start = tl.where(first, t[None, :], 1.0)
    return tl.associative_scan((start * through, start), 0, _through)


@triton.jit
@no_type_check
def forward(
    table, rank, offsets,
    columns, rows, parts, tiles,
    channels, left, starts, live,
    K: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Channels [4, tiles, 64] and the transmittance left [tiles, 64].

    Rows of `table` are looked up by `rank` [slots]. With SAVE: the transmittance at the start of
    every chunk gone through (`starts`, from row begin // K + tile of a tile), and their number.
    """
    tile = tl.program_id(0)
    begin, end = tl.load(offsets + tile), tl.load(offsets + tile + 1)
    centre_x, centre_y = _centre(tile, columns, rows, parts)
    u, v = _pixels()
    x, y = centre_x + u, centre_y + v
    p, k = tl.arange(0, PIXELS), tl.arange(0, K)
    first = (k == 0)[:, None]
    t = tl.full([PIXELS], 1.0, tl.float32)
    red = tl.zeros([PIXELS], tl.float32)
    green, blue, depth, covered = red, red, red, red
    start = starts + (begin // K + tile).to(tl.int64) * PIXELS + p
    at = begin
    owner, there = _owners(rank, at, k, begin, end)
    splat = _splats(table, owner, there)
    owner, there = _owners(rank, at + K, k, begin, end)
    going = begin < end
    while going:
        if SAVE:
            tl.store(start, t)
            start += PIXELS
        at += K
        following = _splats(table, owner, there)
        owner, there = _owners(rank, at + K, k, begin, end)
        alpha = _alphas(splat, x, y)
        after, before = _transmittances(alpha, t, first)
        unfinished = after > T_MIN
        weight = tl.where(unfinished, alpha * before, 0.0)
        red += tl.sum(weight * splat[7][:, None], 0)
        green += tl.sum(weight * splat[8][:, None], 0)
        blue += tl.sum(weight * splat[9][:, None], 0)
        depth += tl.sum(weight * splat[10][:, None], 0)
        covered += tl.sum(weight, 0)
        t, splat = tl.reduce(after, 0, _last), following
        going = (at < end) & (tl.max((t > T_MIN).to(tl.int32), 0) > 0)
    pixel = tile.to(tl.int64) * PIXELS + p
    plane = tl.cast(tiles, tl.int64) * PIXELS
    tl.store(left + pixel, 1.0 - covered)
    tl.store(channels + pixel, red)
    tl.store(channels + plane + pixel, green)
    tl.store(channels + 2 * plane + pixel, blue)
    tl.store(channels + 3 * plane + pixel, depth)
    if SAVE:
        tl.store(live + tile, (at - begin) // K)


@triton.jit
@no_type_check
def _high(x):
    """The part of a float32 that the tensor cores' 19 bits hold exactly."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def _times_exact(x, exact):
    """x @ exact to float32's precision, where `exact` fits the tensor cores' type."""
    high = _high(x)
    found = tl.dot(x - high, exact, input_precision="tf32")
    return tl.dot(high, exact, found, input_precision="tf32")


@triton.jit
@no_type_check
def _times(x, high, low):
    """x @ (high + low), without the product of both small parts."""
    high_x = _high(x)
    found = tl.dot(x - high_x, high, input_precision="tf32")
    found = tl.dot(high_x, low, found, input_precision="tf32")
    return tl.dot(high_x, high, found, input_precision="tf32")


@triton.jit
@no_type_check
def _column(array, column, index):
    return tl.sum(tl.where((column == index)[None, :], array, 0.0), 1)


@triton.jit
@no_type_check
def backward(
    table, rank, slot, offsets, starts, live, channels, left, v_channels, v_left,
    columns, rows, parts, tiles,
    sums, place,
    K: tl.constexpr, SAVED: tl.constexpr,
):  # fmt: skip
    """Gradients of the slots gone through (`sums`, [slots, 10], in order of tile).

    Six moments of the loss's gradient in E about the splat, and four of its channels. `place`,
    which starts as zeros, tells for every slot in order of owner where its gradient is, counting
    from 1.

    SAVED: from the last chunk to the first, each from its saved start, so that what lies behind is
    a sum. Otherwise from the first to the last, and what lies behind is what is left of the total.
    """
    tile = tl.program_id(0)
    begin, end = tl.load(offsets + tile), tl.load(offsets + tile + 1)
    centre_x, centre_y = _centre(tile, columns, rows, parts)
    u, v = _pixels()
    x, y = centre_x + u, centre_y + v
    p, k, column = tl.arange(0, PIXELS), tl.arange(0, K), tl.arange(0, 8)
    first = (k == 0)[:, None]
    pixel = tile.to(tl.int64) * PIXELS + p
    plane = tl.cast(tiles, tl.int64) * PIXELS
    v_red, v_green = tl.load(v_channels + pixel), tl.load(v_channels + plane + pixel)
    v_blue = tl.load(v_channels + 2 * plane + pixel)
    v_depth = tl.load(v_channels + 3 * plane + pixel)
    behind = tl.load(left + pixel) * tl.load(v_left + pixel)
    if not SAVED:
        behind += v_red * tl.load(channels + pixel)
        behind += v_green * tl.load(channels + plane + pixel)
        behind += v_blue * tl.load(channels + 2 * plane + pixel)
        behind += v_depth * tl.load(channels + 3 * plane + pixel)
    # Sums over pixels are products: of the loss's gradient with 1, u, v, u^2, uv, v^2 (exact in few
    # bits), of the weights with the cotangents.
    x_power = ((column == 1) | (column == 4)).to(tl.int32) + 2 * (column == 3).to(tl.int32)
    y_power = ((column == 2) | (column == 4)).to(tl.int32) + 2 * (column == 5).to(tl.int32)
    pu, pv = u[:, None], v[:, None]
    by_x = tl.where((x_power == 1)[None, :], pu, tl.where((x_power == 2)[None, :], pu * pu, 1.0))
    by_y = tl.where((y_power == 1)[None, :], pv, tl.where((y_power == 2)[None, :], pv * pv, 1.0))
    powers = tl.where((column < MOMENTS)[None, :], by_x * by_y, 0.0)
    cotangents = tl.load(
        v_channels + pixel[:, None] + column[None, :] * plane,
        mask=(column < CHANNELS)[None, :],
        other=0.0,
    )
    high = _high(cotangents)
    low = cotangents - high
    at = begin
    if SAVED:
        chunks = tl.load(live + tile)
        start = starts + (begin // K + tile + chunks - 1).to(tl.int64) * PIXELS + p
        at += (chunks - 1) * K
    t = tl.full([PIXELS], 1.0, tl.float32)
    step: tl.constexpr = -K if SAVED else K
    owner, there = _owners(rank, at, k, begin, end)
    splat = _splats(table, owner, there)
    owner, there = _owners(rank, at + step, k, begin, end)
    going = (begin < end) & (at >= begin)
    while going:
        following = _splats(table, owner, there)
        present = at + k < end
        mine = tl.load(slot + at + k, mask=present, other=0)
        tl.store(place + mine, at + k + 1, mask=present)
        to_moments = sums + (at + k).to(tl.int64)[:, None] * FOUND + column[None, :]
        if SAVED:
            t = tl.load(start)
            start -= PIXELS
        at += step
        owner, there = _owners(rank, at + step, k, begin, end)
        alpha = _alphas(splat, x, y)
        after, before = _transmittances(alpha, t, first)
        unfinished = after > T_MIN
        weight = tl.where(unfinished, alpha * before, 0.0)
        q = v_red[None, :] * splat[7][:, None]
        q += v_green[None, :] * splat[8][:, None]
        q += v_blue[None, :] * splat[9][:, None]
        q += v_depth[None, :] * splat[10][:, None]
        share = weight * q
        ahead = tl.cumsum(share, 0)
        root = tl.rsqrt(1.0 - alpha)
        # No gradient where the cap or the cut holds alpha, or the pixel was finished.
        free = unfinished & (alpha < BELOW_CAP)
        ratio = tl.where(free, alpha * root * root, 0.0)
        slope = after * q + ahead
        total = tl.reduce(ahead, 0, _last)
        if SAVED:
            behind += total
        slope = (slope - behind[None, :]) * ratio
        if SAVED:
            going = at >= begin
        else:
            behind -= total
            t = tl.reduce(after, 0, _last)
            going = (at < end) & (tl.max((t > T_MIN).to(tl.int32), 0) > 0)
        moments = _times_exact(slope, powers)
        colors = _times(weight, high, low)
        # The moments' origin moves from the tile's centre to the splat.
        du, dv = splat[0] - centre_x, splat[1] - centre_y
        g = _column(moments, column, 0)
        gu, gv = _column(moments, column, 1), _column(moments, column, 2)
        gx, gy = gu - du * g, gv - dv * g
        moved = tl.where((column == 1)[None, :], (du * g)[:, None], 0.0)
        moved = tl.where((column == 2)[None, :], (dv * g)[:, None], moved)
        moved = tl.where((column == 3)[None, :], (du * (gu + gx))[:, None], moved)
        moved = tl.where((column == 4)[None, :], (du * gv + dv * gx)[:, None], moved)
        moved = tl.where((column == 5)[None, :], (dv * (gv + gy))[:, None], moved)
        splat = following
        present = present[:, None]
        tl.store(to_moments, moments - moved, mask=present & (column < MOMENTS)[None, :])
        to_colors = to_moments + MOMENTS
        tl.store(to_colors, colors, mask=present & (column < CHANNELS)[None, :])
