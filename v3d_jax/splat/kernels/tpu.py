"""Compositing on TPUs by the Pallas kernels beside this module, with their gradient.

Takes and gives what `v3d_jax.splat.composite.composite` does, which is the plain twin. Traced for a
CPU (`v3d_jax.ops.target`) the kernels are interpreted, which is slow and meant for tests.

Tiles' lists are not copied: the fields of all slots lie side by side in the order of tiles and are
read in aligned blocks of 128, each by all the tiles that have a part of it. One (tile, block) is a
piece; pieces are numbered by tile, so that both tiles and blocks never fall and what belongs to one
of them is done in consecutive steps. Scalar memory holds the numbers of some thousand pieces, hence
a loop over segments, as many as there are; a tile, or a block, that two share is given on.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from v3d_jax.ops import binning, target
from v3d_jax.splat.bin import Bins, Tiling
from v3d_jax.splat.chunk import PIXELS, SHAPE
from v3d_jax.splat.kernels import mosaic
from v3d_jax.splat.kernels.mosaic import CHANNELS, HALF, ROWS, K
from v3d_jax.splat.kernels.nvidia import to_fields

EIGHT = K // ROWS
WINDOW = 1 << 16  # columns gathered at a time
SEGMENT = 1 << 14  # pieces of a launch: 12 bytes each of scalar memory, which has a megabyte


class Pieces(NamedTuple):
    """All (tile, block) with a slot in common, by tile; more than `total` mean nothing."""

    block: Int32[Array, "s"]
    tile: Int32[Array, "s"]
    word: Int32[Array, "s"]  # see `mosaic`
    total: Int32[Array, ""]


def composite(
    tiles: Tiling, fields: tuple[Float[Array, "n"], ...], bins: Bins
) -> tuple[Float[Array, "d g p"], Float[Array, "g p"]]:
    """Channels, and the transmittance left behind them, of every pixel of every tile.

    As `v3d_jax.splat.composite.composite`; differentiable in the fields. Raises ValueError for more
    than six channels, and where the program is traced for what is neither TPU nor CPU.
    """
    if len(fields) > SHAPE + CHANNELS:
        raise ValueError(f"the kernels take {CHANNELS} channels, not {len(fields) - SHAPE}")
    if target.platform() not in ("tpu", "cpu"):
        raise ValueError(f"compositing by Pallas is for TPUs, not for {target.platform()}")
    return _composite(tiles, fields, bins)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _composite(tiles: Tiling, fields: tuple[Array, ...], bins: Bins) -> tuple[Array, Array]:
    return _forward(tiles, fields, bins)[0]


def _forward(tiles: Tiling, fields: tuple[Array, ...], bins: Bins) -> tuple[Any, Any]:
    of_slots = table(fields, bins)
    pieces = cut(bins)
    sums = jnp.zeros((tiles.tiles, HALF, PIXELS), jnp.float32)
    state = jnp.zeros((PIXELS, K), jnp.float32), jnp.zeros((HALF, PIXELS), jnp.float32)
    constant = (jnp.asarray(mosaic.triangle(), jnp.bfloat16),)
    inputs = [(of_slots, _of_block), *((array, None) for array in constant)]
    sums = _run(mosaic.forward, tiles, pieces, inputs, state, (sums, _of_tile))
    channels = jnp.moveaxis(sums[:, : len(fields) - SHAPE], 1, 0)
    left = 1.0 - sums[:, mosaic.COVER]
    return (channels, left), (fields[2:5], of_slots, bins, pieces, channels, left)


def _backward(
    tiles: Tiling, saved: Any, cotangents: tuple[Array, Array]
) -> tuple[tuple[Array, ...], None]:
    conic, of_slots, bins, pieces, channels, left = saved
    v_channels, v_left = cotangents
    count = channels.shape[0]
    rows = jnp.zeros((tiles.tiles, HALF, PIXELS), jnp.float32)
    rows = rows.at[:, :count].set(jnp.moveaxis(v_channels, 0, 1))
    rows = rows.at[:, mosaic.TOTAL].set(jnp.sum(v_channels * channels, axis=0) + v_left * left)
    wide = jnp.zeros((PIXELS, K), jnp.float32)
    state = wide, wide, jnp.zeros((ROWS, K), jnp.float32)
    constant = (mosaic.triangle(), mosaic.powers())
    inputs = [(of_slots, _of_block), (rows, _of_tile)]
    inputs += [(jnp.asarray(array, jnp.bfloat16), None) for array in constant]
    into = jnp.zeros_like(of_slots), _of_block
    found = _run(mosaic.backward, tiles, pieces, inputs, state, into)
    owners = _by_owner(found, bins)
    owners = jnp.concatenate([owners[:SHAPE], owners[HALF : HALF + count]])
    return to_fields(owners.T, conic), None


_composite.defvjp(_forward, _backward)


def table(fields: tuple[Float[Array, "n"], ...], bins: Bins) -> Float[Array, "f s"]:
    """The fields of every slot in the order of tiles, in the rows of `mosaic`; see `take`."""
    zero, one = jnp.zeros_like(fields[0]), jnp.ones_like(fields[0])
    channels = len(fields) - SHAPE
    columns = [*fields[:SHAPE], *[zero] * (HALF - SHAPE)]
    columns += [*fields[SHAPE:], *[zero] * (CHANNELS - channels), one, zero]
    features = jnp.stack(lax.optimization_barrier(columns))
    return take(features, bins.order[bins.rank])


def cut(bins: Bins) -> Pieces:
    """Cuts tiles' lists where aligned blocks of slots end."""
    capacity, tiles = bins.slot.shape[0], bins.offsets.shape[0] - 1
    needed = -(-capacity // K) + tiles
    segment = min(SEGMENT, needed)
    needed += -needed % segment
    begin, end = bins.offsets[:-1], bins.offsets[1:]
    first = begin // K
    count = jnp.where(begin < end, (end - 1) // K - first + 1, 0)
    runs = binning.expand(count, needed)
    tile = jnp.maximum(runs.owner, 0)
    block = jnp.where(runs.valid, first[tile] + runs.rank, 0)
    low = jnp.maximum(begin[tile] - block * K, 0)
    high = jnp.minimum(end[tile] - block * K, K)
    fresh = block != jnp.concatenate([jnp.full(1, -1, jnp.int32), block[:-1]])
    word = low | high << mosaic.HIGH | (runs.rank == 0).astype(jnp.int32) << mosaic.BEGINS
    word |= (runs.rank == count[tile] - 1).astype(jnp.int32) << mosaic.ENDS
    word |= fresh.astype(jnp.int32) << mosaic.FRESH
    return Pieces(block, tile, jnp.where(runs.valid, word, 0), runs.total)


def _of_block(step: Array, block: Any, tile: Any, word: Any) -> tuple[Any, ...]:
    return 0, block[step]


def _of_tile(step: Array, block: Any, tile: Any, word: Any) -> tuple[Any, ...]:
    return tile[step], 0, 0


def _spec(array: Array, index: Callable[..., tuple[Any, ...]] | None) -> pl.BlockSpec:
    """All of an array, or of two axes the columns of a block, of three the row of a tile."""
    if index is None:
        return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)
    shape = (array.shape[0], K) if array.ndim == 2 else (1, *array.shape[1:])
    return pl.BlockSpec(shape, index)


def _run(
    kernel: Callable[..., None],
    tiles: Tiling,
    pieces: Pieces,
    inputs: list[tuple[Array, Callable[..., tuple[Any, ...]] | None]],
    state: tuple[Array, ...],
    into: tuple[Array, Callable[..., tuple[Any, ...]]],
) -> Array:
    """Runs a kernel over all pieces, segment by segment; returns what it wrote into `into`."""
    out, out_index = into
    segment = min(SEGMENT, pieces.block.shape[0])
    whole = [_spec(array, None) for array in state]
    number = len(inputs) + len(state)

    def one_segment(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        at, out, *state = carry
        scalars = [lax.dynamic_slice_in_dim(part, at, segment) for part in pieces[:3]]
        launch = pl.pallas_call(
            functools.partial(kernel, tiles),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(jnp.minimum(pieces.total - at, segment),),
                in_specs=[
                    *(_spec(*pair) for pair in inputs),
                    *whole,
                    pl.BlockSpec(memory_space=pl.ANY),
                ],
                out_specs=[_spec(out, out_index), *whole],
                scratch_shapes=[pltpu.SMEM((1,), jnp.int32)],
            ),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (out, *state)],
            input_output_aliases={len(scalars) + number: 0},
            interpret=target.platform() == "cpu",
            name=f"splat_{kernel.__name__}",
        )
        result = launch(*scalars, *(array for array, _ in inputs), *state, out)
        return at + segment, *result

    carry = jnp.int32(0), out, *state
    return lax.while_loop(lambda carry: carry[0] < pieces.total, one_segment, carry)[1]


def _by_owner(found: Float[Array, "f s"], bins: Bins) -> Float[Array, "f n"]:
    """Sums of slots' gradients over those of every (view, Gaussian).

    These lie side by side in the order of owners: a running sum that starts anew with every owner,
    of which the last one is taken.
    """
    slots, owners = bins.slot.shape[0], bins.order.shape[0]
    used = bins.run_start < bins.run_end
    number = jnp.arange(slots, dtype=jnp.int32)
    place = jnp.zeros(slots, jnp.int32).at[bins.slot].set(number, unique_indices=True)
    values = take(found, place)
    nowhere = values.shape[1] + jnp.arange(owners, dtype=jnp.int32)
    start = jnp.where(used, bins.run_start, nowhere)
    head = jnp.zeros(values.shape[1], jnp.float32)
    head = head.at[start].set(1.0, mode="drop", unique_indices=True)
    sums = _run_sums(head, values)
    last = jnp.where(used, bins.run_end - 1, -1)
    last = jnp.zeros(owners, jnp.int32).at[bins.order].set(last, unique_indices=True)
    return jnp.where(last >= 0, take(sums, jnp.maximum(last, 0))[:, :owners], 0.0)


def _run_sums(head: Float[Array, "s"], values: Float[Array, "f s"]) -> Float[Array, "f s"]:
    """Running sums along rows that start anew where `head` is 1."""
    wide = mosaic.RUN_BLOCKS * K
    columns = [pl.BlockSpec((rows, wide), lambda i: (0, i)) for rows in (1, ROWS)]
    return pl.pallas_call(
        mosaic.run_sums,
        grid=(values.shape[1] // wide,),
        in_specs=columns,
        out_specs=columns[1],
        out_shape=jax.ShapeDtypeStruct(values.shape, values.dtype),
        scratch_shapes=[pltpu.VMEM((ROWS, K), jnp.float32)],
        interpret=target.platform() == "cpu",
        name="splat_run_sums",
    )(head[None], values)


def take(array: Float[Array, "f m"], index: Int32[Array, "s"]) -> Float[Array, "f t"]:
    """Columns of an array of 16 rows by their numbers, up to a multiple of 1024 of them.

    A TPU gathers rows, which take 128 lanes in memory however few are used: eight times what is
    needed here. So eight columns are one row, of which all but one are cleared afterwards; what is
    padded is one window at a time.
    """
    rows = _rows_of_eight(array)
    index = _pad(index, _window(index.shape[0]))
    window = _window(index.shape[0])
    lane = np.arange(K, dtype=np.int32)
    fold = np.float32(lane % ROWS == np.arange(ROWS)[:, None])

    def one_window(i: Array, into: Array) -> Array:
        of = lax.dynamic_slice_in_dim(index, i * window, window)[:, None]
        found = jnp.where(lane[None] // ROWS == of % EIGHT, rows[of[:, 0] // EIGHT], 0.0)
        columns = lax.dot_general(
            fold, found, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
        )
        return lax.dynamic_update_slice_in_dim(into, columns, i * window, axis=1)

    into = jnp.zeros((ROWS, index.shape[0]), array.dtype)
    return lax.fori_loop(0, index.shape[0] // window, one_window, into)


def _rows_of_eight(array: Float[Array, "f m"]) -> Float[Array, "r k"]:
    """Eight columns of 16 numbers a row."""
    array = _pad(array, _window(array.shape[1]))
    window = _window(array.shape[1])

    def one_window(i: Array, into: Array) -> Array:
        columns = lax.dynamic_slice_in_dim(array, i * window, window, axis=1)
        return lax.dynamic_update_slice_in_dim(
            into, columns.T.reshape(-1, K), i * (window // EIGHT), axis=0
        )

    into = jnp.zeros((array.shape[1] // EIGHT, K), array.dtype)
    return lax.fori_loop(0, array.shape[1] // window, one_window, into)


def _window(size: int) -> int:
    wide = mosaic.RUN_BLOCKS * K
    return min(WINDOW, size + -size % wide)


def _pad(array: Array, multiple: int) -> Array:
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, -array.shape[-1] % multiple)])
