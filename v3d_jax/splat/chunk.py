"""Compositing inside chunks: up to 16 splats of one tile, front to back, on its 64 pixels.

Axes: c chunk, p pixel of a tile, k splat of a chunk, f feature of a splat, d channel. Notation: E
is the logarithm of alpha before its cap, T the transmittance in front of a splat, w = alpha T its
weight, q = sum_d v_d colour_d what a unit of weight adds to the loss (v: cotangents of the
channels), S what everything behind the splat adds.

A chunk is a chain of 16 dependent steps on every pixel. Two forms of one chain:

- unrolled, for NVIDIA: features are gathered scalar by scalar from the table by an index that only
  depends on the chunk. XLA fuses the whole chain into one kernel whose state stays in registers
  (slices instead of gathers are not fused: each would be a kernel of its own);
- scanned, for everything else: one step at a time, quick to compile.

The transmittance carries a sign: once it would fall to 1e-4 or below, the pixel is finished, and
it stays at its last value, negated. That is gsplat's sequential stop, which leaves the splat that
would cross the line out.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from v3d_jax.splat.bin import LOG_ALPHA_MIN, TILE

CHUNK = 16  # splats: the longest chain whose registers fit a GPU thread
PIXELS = TILE * TILE
ALPHA_MAX = 0.99
T_MIN = 1e-4
SHAPE = 6  # features before the channels: x, y, xx / 2, xy, yy / 2 of the conic, log opacity
HIDDEN = -1e30  # log opacity of padding

# Features of one splat for every chunk of a block; each [c, p] or [c, 1].
Splat = list[Array]
# Per splat of a chunk: a list (unrolled) or arrays with a leading axis k (scanned).
PerSplat = Any


class Composite(NamedTuple):
    """What a block of chunks adds to its tiles."""

    channels: tuple[Float[Array, "c p"], ...]
    left: Float[Array, "c p"]  # transmittance of pixels that end in this chunk, else 0


def per_platform(run: Callable[..., Any], unroll: bool | None, *arrays: Any) -> Any:
    """run(unroll, *arrays), where None unrolls on NVIDIA only."""
    if unroll is None:
        unrolled, scanned = functools.partial(run, True), functools.partial(run, False)
        result = lax.platform_dependent(*arrays, cuda=unrolled, default=scanned)
    else:
        result = run(unroll, *arrays)
    # A chain that is fused with whatever takes its result is split, or computed twice.
    return lax.optimization_barrier(result)


def features(
    unroll: bool, table: Float[Array, "a b"], chunk: Int32[Array, "c"], channels: int
) -> PerSplat:
    """Splats of some chunks from a table with one row a chunk, splat by splat."""
    size = SHAPE + channels
    if not unroll:
        rows = table[chunk].reshape(-1, CHUNK, size)
        return list(jnp.moveaxis(rows, 0, 2)[..., None].swapaxes(0, 1))  # f times [k, c, 1]
    flat = table.reshape(-1)
    # Unsigned, because negative indices would count from the end: a select for every feature.
    # The barrier hides how the number came about, which is simplified anew for every feature.
    start = chunk.astype(jnp.uint32) * jnp.uint32(CHUNK * size)
    start = lax.optimization_barrier(start)
    start = jnp.broadcast_to(start[:, None, None], (chunk.shape[0], PIXELS, 1))
    numbers = lax.GatherDimensionNumbers((), (0,), (0,))

    def pick(offset: int) -> Array:
        return lax.gather(flat, start + jnp.uint32(offset), numbers, (1,), mode="promise_in_bounds")

    return [[pick(k * size + f) for f in range(size)] for k in range(CHUNK)]


def each(
    step: Callable[..., tuple[Any, Any]],
    carry: Any,
    splats: PerSplat,
    unroll: bool,
    others: PerSplat | None = None,
) -> tuple[Any, PerSplat]:
    """Chains step(carry, splat, other) over the splats; backwards where `others` are given."""
    if not unroll:
        if others is None:
            return lax.scan(lambda c, splat: step(c, splat), carry, splats)
        return lax.scan(lambda c, x: step(c, *x), carry, (splats, others), reverse=True)
    results = [None] * CHUNK
    for k in range(CHUNK) if others is None else reversed(range(CHUNK)):
        rest = () if others is None else (others[k],)
        carry, results[k] = step(carry, splats[k], *rest)
    return carry, results


def pixels() -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres from the centre of a tile, x and y [1, p]."""
    v, u = np.divmod(np.arange(PIXELS, dtype=np.int32), TILE)
    return tuple((np.float32(i) - (0.5 * TILE - 0.5))[None] for i in (u, v))


def alpha(splat: Splat) -> tuple[Float[Array, "c p"], Float[Array, "c p"]]:
    """Alpha on every pixel (0 below the cut), and before its cap at 0.99."""
    u, v = pixels()
    x, y, half_xx, xy, half_yy, log_opacity = splat[:SHAPE]
    dx, dy = u - x, v - y
    log_alpha = log_opacity - ((half_xx * dx + xy * dy) * dx + half_yy * dy * dy)
    # The form is never negative; a rounded one may be, inside a needle.
    bare = jnp.exp(jnp.minimum(log_alpha, log_opacity))
    seen = log_alpha >= LOG_ALPHA_MIN
    return jnp.where(seen, jnp.minimum(bare, ALPHA_MAX), 0.0), bare


def pass_through(
    unroll: bool, channels: int, table: Float[Array, "a b"], chunk: Int32[Array, "c"]
) -> tuple[Float[Array, "c p"], Float[Array, "c p"]]:
    """Products of 1 - alpha over every other splat of a chunk; multiplied, over all of them.

    Two results, because XLA cuts a chain in pieces that ends in only one.
    """

    def step(state: tuple[Array, Array], splat: Splat) -> tuple[tuple[Array, Array], None]:
        other, t = state
        return (t, other * (1.0 - alpha(splat)[0])), None

    start = jnp.ones((chunk.shape[0], PIXELS), table.dtype)
    return each(step, (start, start), features(unroll, table, chunk, channels), unroll)[0]


def composite(
    unroll: bool,
    channels: int,
    table: Float[Array, "a b"],
    chunk: Int32[Array, "c"],
    start: Float[Array, "c p"],
    last: Array,
) -> Composite:
    """Weighted channels of every chunk, given the transmittance at its start.

    `last` [c] marks the last chunk of a tile, where pixels end that never stopped.
    """

    def step(state: tuple[Array, ...], splat: Splat) -> tuple[tuple[Array, ...], None]:
        t, *sums = state
        weight, after = _advance(t, alpha(splat)[0])
        sums = [total + weight * splat[SHAPE + d] for d, total in enumerate(sums)]
        return (after, *sums), None

    zero = jnp.zeros_like(start)
    state = (_begin(start), *[zero] * channels)
    (t, *sums), _ = each(step, state, features(unroll, table, chunk, channels), unroll)
    ends = (start > T_MIN) & ((t < 0.0) | last[:, None])
    return Composite(tuple(sums), jnp.where(ends, jnp.abs(t), 0.0))


def gradient(
    unroll: bool,
    table: Float[Array, "a b"],
    chunk: Int32[Array, "c"],
    start: Float[Array, "c p"],
    behind: Float[Array, "c p"],
    cotangents: tuple[Float[Array, "c p"], ...],
) -> Float[Array, "c k j"]:
    """Gradient of every splat of every chunk: `moments` of the loss, then of the channels.

    `behind` is what the later chunks and the background add to the loss on each pixel.
    """
    channels = len(cotangents)
    size = SHAPE + channels
    splats = features(unroll, table, chunk, channels)

    def forth(t: Array, splat: Splat) -> tuple[Array, Array]:
        return _advance(t, alpha(splat)[0])[1], t

    def back(s: Array, splat: Splat, t: Array) -> tuple[Array, tuple[Array, Array] | Array]:
        value, bare = alpha(splat)
        weight, after = _advance(t, value)
        q = sum(v * splat[SHAPE + d] for d, v in enumerate(cotangents))
        slope = t * q - s / (1.0 - value)
        # zero where the cap or the cut holds alpha, and where the pixel was finished
        slope = jnp.where((after > 0.0) & (bare <= ALPHA_MAX), slope * value, 0.0)
        found = (slope, weight)
        if not unroll:
            found = jnp.stack(_reduce(*found, cotangents, splat[0][:, 0], splat[1][:, 0]), axis=1)
        return s + weight * q, found

    _, t = each(forth, _begin(start), splats, unroll)
    _, found = each(back, behind, splats, unroll, t)
    if not unroll:
        return jnp.moveaxis(found, 0, 1)
    # Without the barrier a compiler may repeat the chain inside the sums over pixels.
    found = lax.optimization_barrier(found)
    centre = table.reshape(-1, CHUNK, size)[chunk, :, :2]
    sums = [
        column
        for k, (slope, weight) in enumerate(found)
        for column in _reduce(slope, weight, cotangents, centre[:, k, 0], centre[:, k, 1])
    ]
    # One below the other, so that neighbouring threads of a GPU copy from the same array, then
    # turned around; the barrier keeps these two apart.
    sums = lax.optimization_barrier(jnp.stack(sums))
    return sums.T.reshape(-1, CHUNK, size)


def moments(sums: list[Float[Array, "*n"]], x: Array, y: Array) -> list[Float[Array, "*n"]]:
    """Sums of G, G dx, G dy, G dx^2, G dx dy, G dy^2 from those around the centre of the tile."""
    g, gu, gv, guu, guv, gvv = sums
    gx, gy = gu - x * g, gv - y * g
    return [g, gx, gy, guu - x * (gu + gx), guv - x * gv - y * gx, gvv - y * (gv + gy)]


def _begin(start: Array) -> Array:
    return jnp.where(start > T_MIN, start, -start)


def _advance(t: Array, value: Array) -> tuple[Array, Array]:
    """Weight of a splat, and the transmittance behind it (negative: finished)."""
    after = t * (1.0 - value)
    live = after > T_MIN
    return jnp.where(live, value * t, 0.0), jnp.where(live, after, -jnp.abs(t))


def _reduce(
    slope: Array, weight: Array, cotangents: tuple[Array, ...], x: Array, y: Array
) -> list[Array]:
    """What a splat at (x, y) adds up to over the pixels: `moments`, then one sum a channel."""
    u, v = pixels()
    sums = [jnp.sum(slope * m, axis=1) for m in (1.0, u, v, u * u, u * v, v * v)]
    colors = [jnp.sum(weight * cotangent, axis=1) for cotangent in cotangents]
    return [*moments(sums, x, y), *colors]
