"""Compositing pieces of tiles' lists on TPUs: the device code, in Pallas.

A step takes one piece: those of 128 neighbouring slots that belong to one tile of 8 x 8 pixels. All
pairs are one array [64, 128], pixels down the sublanes and splats along the lanes, eight vector
registers. Pieces of a tile are consecutive steps, between which its state stays in VMEM; once its
last pixel is finished, its further pieces are passed over.

What runs down a list is a product with a triangle of ones, what is summed over pixels a product
with their coordinates' powers, both on the matrix unit, whose operands have 8 bits. Ones and
coordinates fit these; the other operand is split in three, which holds all bits of a float32.

Semantics and notation are those of `v3d_jax.splat.chunk`: E logarithm of alpha before its cap, T
transmittance in front of a splat, w weight, q what a unit of weight adds to the loss.
`v3d_jax.splat.kernels.tpu` launches.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from v3d_jax.splat.bin import LOG_ALPHA_MIN, TILE, Tiling
from v3d_jax.splat.chunk import ALPHA_MAX, HIDDEN, PIXELS, SHAPE, T_MIN, moments

K = 128  # slots of a block, the lanes of a vector register
HALF = 8  # rows of a vector register; a table has two of them
RUN_BLOCKS = 8  # of 128 columns, that a step of `run_sums` takes
ROWS = 2 * HALF  # the fields of a splat's shape and two of none; channels, none, one, none
CHANNELS = HALF - 2  # as many at most
COVER = CHANNELS  # row, among the channels', of ones: weights themselves are summed
TOTAL = CHANNELS + 1  # row, among the cotangents, of what a tile's whole list adds to the loss
LOG_T_MIN = float(np.log(T_MIN))

# Bits of a piece's word: its first slot in the block, the one after its last, and whether it is the
# first or last of its tile and the first of its block.
HIGH, BEGINS, ENDS, FRESH = 8, 16, 17, 18


def triangle() -> np.ndarray:
    """What turns a list into its sums before every entry, and into its total everywhere [k, 2k]."""
    return np.concatenate([np.triu(np.ones((K, K), np.float32), 1), np.ones((K, K))], axis=1)


def powers() -> np.ndarray:
    """1, u, v, u^2, uv, v^2 of all pixels from the centre of the tile, and zeros [16, p]."""
    v, u = np.divmod(np.arange(PIXELS), TILE)
    u, v = u - (0.5 * TILE - 0.5), v - (0.5 * TILE - 0.5)
    rows = [np.ones(PIXELS), u, v, u * u, u * v, v * v]
    return np.stack([*rows, *[np.zeros(PIXELS)] * (ROWS - len(rows))])


def forward(
    tiles: Tiling,
    block: Any, tile: Any, word: Any,
    table: Any, ones: Any, log_t_before: Any, sums_before: Any, _: Any,
    out: Any, log_t: Any, sums: Any, alive: Any,
) -> None:  # fmt: skip
    """Sums of the channels times the weights, and of the weights, of every tile [g, 8, p].

    `log_t` [p, k], the same on all lanes, and `sums` [8, p] are the state, given on from call to
    call.
    """
    step = pl.program_id(0)
    piece = word[step]

    @pl.when(step == 0)
    def _() -> None:
        log_t[...] = log_t_before[...]
        sums[...] = sums_before[...]
        alive[0] = _any_left(log_t[...])

    @pl.when(_flag(piece, BEGINS))
    def _() -> None:
        log_t[...] = jnp.zeros_like(log_t)
        sums[...] = jnp.zeros_like(sums)
        alive[0] = 1

    @pl.when(alive[0] == 1)
    def _() -> None:
        splats, x, y = _splats(table, piece, tile[step], tiles)
        weight, _, _, total = _weights(_alphas(splats, x, y)[0], log_t[...], ones)
        sums[...] += _dot(splats[HALF:], weight, 1, 1)
        log_t[...] += total
        alive[0] = _any_left(log_t[...])

    @pl.when(_flag(piece, ENDS))
    def _() -> None:
        out[0] = sums[...]


def backward(
    tiles: Tiling,
    block: Any, tile: Any, word: Any,
    table: Any, cotangents: Any, ones: Any, powers: Any,
    log_t_before: Any, ahead_before: Any, found_before: Any, _: Any,
    out: Any, log_t: Any, ahead: Any, found: Any, alive: Any,
) -> None:  # fmt: skip
    """Gradients of the slots of every block [16, slots]: moments of the loss's, then channels'.

    `ahead` [p, k] is the sum of w q so far less that of the whole list, the same on all lanes;
    `found` [16, k] is the block's gradient so far, to which the tiles that share it add in turn.
    """
    step = pl.program_id(0)
    piece = word[step]

    @pl.when(step == 0)
    def _() -> None:
        log_t[...] = log_t_before[...]
        ahead[...] = ahead_before[...]
        found[...] = found_before[...]
        alive[0] = _any_left(log_t[...])

    @pl.when(_flag(piece, FRESH))
    def _() -> None:
        found[...] = jnp.zeros_like(found)

    @pl.when(_flag(piece, BEGINS))
    def _() -> None:
        row = lax.broadcasted_iota(jnp.int32, (HALF, K), 0)
        log_t[...] = jnp.zeros_like(log_t)
        ahead[...] = _dot(cotangents[0], jnp.where(row == TOTAL, -1.0, 0.0), 0, 0)
        alive[0] = 1

    @pl.when(alive[0] == 1)
    def _() -> None:
        splats, x, y = _splats(table, piece, tile[step], tiles)
        alpha, bare = _alphas(splats, x, y)
        weight, after, live, total = _weights(alpha, log_t[...], ones)
        # The rows of the table that meet the last two of the cotangents are no channels.
        row = lax.broadcasted_iota(jnp.int32, (HALF, K), 0)
        q = _dot(cotangents[0], jnp.where(row < CHANNELS, splats[HALF:], 0.0), 0, 0)
        share = weight * q
        before = _times_ones(share, ones)
        behind = -(ahead[...] + before[:, :K] + share)
        # alpha (T q - behind / (1 - alpha)): zero where the cap or the cut holds alpha, and where
        # the pixel was finished
        slope = (after * q - behind) * (alpha / (1.0 - alpha))
        slope = jnp.where(live & (bare <= ALPHA_MAX), slope, 0.0)
        ahead[...] += before[:, K:]
        log_t[...] += total
        alive[0] = _any_left(log_t[...])
        around = sum(_exact_dot(powers[...], part) for part in _split(slope))
        rows = moments([around[i : i + 1] for i in range(SHAPE)], x, y)
        found[:HALF] += jnp.concatenate([*rows, jnp.zeros((HALF - SHAPE, K), slope.dtype)])
        found[HALF:] += _dot(cotangents[0], weight, 1, 0)

    out[...] = found[...]


def run_sums(head: Any, values: Any, out: Any, carry: Any) -> None:
    """Running sums along the rows [16, s] that start anew where `head` [1, s] is 1.

    Within 128 columns a product with a matrix of ones where both belong to one run; `carry` [16, k]
    is the last sum of those before, the same on all lanes.
    """

    @pl.when(pl.program_id(0) == 0)
    def _() -> None:
        carry[...] = jnp.zeros_like(carry)

    down = lax.broadcasted_iota(jnp.int32, (K, K), 0)
    across = lax.broadcasted_iota(jnp.int32, (K, K), 1)
    upto = jnp.where(down <= across, 1.0, 0.0).astype(jnp.bfloat16)
    total = carry[...]
    for i in range(RUN_BLOCKS):
        columns = slice(i * K, (i + 1) * K)
        heads = head[:, columns]
        # How many runs have begun, along the lanes and down the sublanes.
        run = _exact_dot(jnp.broadcast_to(heads, (ROWS, K)).astype(jnp.bfloat16), upto)[:1]
        of_row = jnp.sum(jnp.where(across <= down, heads, 0.0), axis=1, keepdims=True)
        same = jnp.where((of_row == run) & (down <= across), 1.0, 0.0).astype(jnp.bfloat16)
        sums = sum(_exact_dot(part, same) for part in _split(values[:, columns]))
        sums += jnp.where(run == 0.0, total, 0.0)
        out[:, columns] = sums
        total = jnp.broadcast_to(sums[:, K - 1 :], (ROWS, K))
    carry[...] = total


def _flag(piece: Int32[Array, ""], bit: int) -> Array:
    return (piece >> bit) & 1 == 1


def _any_left(log_t: Float[Array, "p k"]) -> Int32[Array, ""]:
    return (jnp.max(log_t) > LOG_T_MIN).astype(jnp.int32)


def _splats(
    table: Any, piece: Int32[Array, ""], tile: Int32[Array, ""], tiles: Tiling
) -> tuple[Float[Array, "f k"], Float[Array, "1 k"], Float[Array, "1 k"]]:
    """The fields of a piece's splats, other lanes hidden, and x and y from the tile's centre."""
    lane = lax.broadcasted_iota(jnp.int32, (ROWS, K), 1)
    row = lax.broadcasted_iota(jnp.int32, (ROWS, K), 0)
    mask = (1 << HIGH) - 1
    inside = (lane >= (piece & mask)) & (lane < ((piece >> HIGH) & mask))
    splats = jnp.where(inside, table[...], jnp.where(row == SHAPE - 1, HIDDEN, 0.0))
    place = lax.div(tile, jnp.int32(tiles.parts))  # row and column in the last places
    down = lax.rem(lax.div(place, jnp.int32(tiles.columns)), jnp.int32(tiles.rows))
    across = lax.rem(place, jnp.int32(tiles.columns))
    x, y = (
        splats[i : i + 1] - (number * TILE + TILE // 2).astype(jnp.float32)
        for i, number in enumerate((across, down))
    )
    return splats, x, y


def _alphas(
    splats: Float[Array, "f k"], x: Float[Array, "1 k"], y: Float[Array, "1 k"]
) -> tuple[Float[Array, "p k"], Float[Array, "p k"]]:
    """Alpha on every pixel (0 below the cut), and before its cap."""
    half_xx, xy, half_yy, log_opacity = (splats[i : i + 1] for i in range(2, SHAPE))
    u = lax.broadcasted_iota(jnp.int32, (TILE, K), 0).astype(jnp.float32)
    dx = u - (0.5 * TILE - 0.5) - x
    # Row by row of pixels: a register has one of each, so that half of it all is done once.
    rows = []
    for v in range(TILE):
        dy = v - (0.5 * TILE - 0.5) - y
        rows.append(log_opacity - ((half_xx * dx + xy * dy) * dx + half_yy * dy * dy))
    log_alpha = jnp.concatenate(rows)
    # The form is never negative; a rounded one may be, inside a needle.
    bare = jnp.exp(jnp.minimum(log_alpha, log_opacity))
    return jnp.where(log_alpha >= LOG_ALPHA_MIN, jnp.minimum(bare, ALPHA_MAX), 0.0), bare


def _weights(
    alpha: Float[Array, "p k"], log_t: Float[Array, "p k"], ones: Any
) -> tuple[Array, Array, Array, Array]:
    """Weights, T behind splats, whether that is above the threshold, logarithm of all 1 - alpha.

    As T only falls, no splat behind one that would cross the threshold passes: this is the
    sequential stop.
    """
    through = jnp.log(1.0 - alpha)
    sums = _times_ones(through, ones)
    before = log_t + sums[:, :K]
    live = before + through > LOG_T_MIN
    t = jnp.exp(before)
    return jnp.where(live, alpha * t, 0.0), (1.0 - alpha) * t, live, sums[:, K:]


def _times_ones(x: Float[Array, "p k"], ones: Any) -> Float[Array, "p l"]:
    return sum(_exact_dot(part, ones[...]) for part in _split(x))


def _split(x: Array) -> tuple[Array, Array, Array]:
    """Three numbers of 8 bits that add up to x, the smallest first.

    By cutting bits off, because compilers leave out roundings to a type and back.
    """
    high = _cut(x)
    middle = _cut(x - high)
    return tuple(part.astype(jnp.bfloat16) for part in (x - high - middle, middle, high))


def _cut(x: Array) -> Array:
    bits = lax.bitcast_convert_type(x, jnp.int32) & -(1 << 16)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _exact_dot(a: Array, b: Array) -> Array:
    """The product of two matrices of 8 bits, in one pass of the matrix unit."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """A product to float32's precision, along the axes named."""
    numbers = (((axis_a,), (axis_b,)), ((), ()))
    return lax.dot_general(a, b, numbers, precision=jax.lax.Precision.HIGHEST)
