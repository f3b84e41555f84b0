"""Another form of the forward kernel, for comparison: one splat at a time, as gsplat's CUDA does.

Every thread reads a splat's fields for itself, where `v3d_jax.splat.kernels.tiles.forward` shares
them in a warp. K splats are unrolled.
"""

import triton
import triton.language as tl

from v3d_jax.splat.kernels import tiles as t


@triton.jit
def forward(
    table, rank, offsets,
    columns, rows, parts, tiles,
    channels, left, starts, live,
    K: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """As `tiles.forward`, but that nothing is saved."""
    tile = tl.program_id(0)
    begin, end = tl.load(offsets + tile), tl.load(offsets + tile + 1)
    centre_x, centre_y = t._centre(tile, columns, rows, parts)
    u, v = t._pixels()
    x, y = centre_x + u, centre_y + v
    p = tl.arange(0, t.PIXELS)
    through = tl.full([t.PIXELS], 1.0, tl.float32)
    red = tl.zeros([t.PIXELS], tl.float32)
    green, blue, depth, covered = red, red, red, red
    at = begin
    going = begin < end
    while going:
        for k in tl.static_range(K):
            there = at + k < end
            owner = tl.load(rank + at + k, mask=there, other=0).to(tl.int64)
            row = table + owner * t.FIELDS
            dx, dy = x - tl.load(row), y - tl.load(row + 1)
            square, slope = tl.load(row + 2) * dx * dx, tl.load(row + 3) * dx
            log_alpha = (tl.load(row + 5, mask=there, other=t.HIDDEN) - square) - (
                tl.load(row + 4) * dy + slope
            ) * dy
            alpha = tl.exp2(tl.minimum(log_alpha, tl.load(row + 6)))
            alpha = tl.where(log_alpha >= t.LOG2_ALPHA_MIN, alpha, 0.0)
            after = through * (1.0 - alpha)
            weight = tl.where(after > t.T_MIN, alpha * through, 0.0)
            red += weight * tl.load(row + 7)
            green += weight * tl.load(row + 8)
            blue += weight * tl.load(row + 9)
            depth += weight * tl.load(row + 10)
            covered += weight
            through = after
        at += K
        going = (at < end) & (tl.max((through > t.T_MIN).to(tl.int32), 0) > 0)
    pixel = tile.to(tl.int64) * t.PIXELS + p
    plane = tl.cast(tiles, tl.int64) * t.PIXELS
    tl.store(left + pixel, 1.0 - covered)
    tl.store(channels + pixel, red)
    tl.store(channels + plane + pixel, green)
    tl.store(channels + 2 * plane + pixel, blue)
    tl.store(channels + 3 * plane + pixel, depth)
