"""Primitives of tile binning: run-length expansion, group offsets and integer-keyed sorting.

Rasterizers turn every face or splat into a data-dependent number of (primitive, tile) slots. All
shapes here are static: a capacity is given, what does not fit is dropped, and the true total is
returned so that the caller can report it. Nothing searches: offsets come from cumulative sums and
one scatter, and sorts take one uint32 key, which is what a GPU sorts by radix.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32, UInt32

INT32_MAX = 2**31 - 1


class Runs(NamedTuple):
    """Slots of a run-length expansion; `owner` and `rank` mean nothing where not `valid`."""

    owner: Int32[Array, "capacity"]  # index into `counts`, non-decreasing
    rank: Int32[Array, "capacity"]  # position inside the owner's run
    valid: Bool[Array, "capacity"]
    total: Int32[Array, ""]  # slots needed, saturating; above the capacity: some were dropped


class Chunks(NamedTuple):
    """Groups of consecutive slots cut in pieces of at most a fixed length."""

    group: Int32[Array, "capacity"]
    start: Int32[Array, "capacity"]  # first slot
    length: Int32[Array, "capacity"]  # 0 for unused chunks
    total: Int32[Array, ""]  # chunks needed, saturating


def saturating_sum(counts: Int32[Array, "n"]) -> Int32[Array, ""]:
    """Sum of non-negative counts; 2**31 - 1 where int32 would wrap around."""
    exact = jnp.sum(counts)
    rough = jnp.sum(counts.astype(jnp.float32))  # off by far less than the gap tested for
    return jnp.where(rough > 0.99 * INT32_MAX, INT32_MAX, exact)


def expand(counts: Int32[Array, "n"], capacity: int) -> Runs:
    """Give owner i `counts[i]` consecutive slots, in order; slots past `capacity` are dropped.

    One scatter-add marks where runs begin and a running sum turns the marks into owners: an owner
    with no slots begins where the next one does and is counted over.
    """
    end = jnp.cumsum(counts)
    start = end - counts
    marks = jnp.zeros(capacity, jnp.int32).at[start].add(1, mode="drop")
    owner = jnp.cumsum(marks) - 1
    slot = jnp.arange(capacity, dtype=jnp.int32)
    total = saturating_sum(counts)
    return Runs(owner, slot - start[owner], slot < total, total)


def group_offsets(
    groups: Int[Array, "n"] | UInt32[Array, "n"], num_groups: int
) -> Int32[Array, "g"]:
    """First slot of every group once slots are sorted by group [num_groups + 1].

    A histogram and a cumulative sum: the keys themselves need not be sorted. Groups outside
    [0, num_groups) are left out (sort them last).
    """
    histogram = jnp.zeros(num_groups, jnp.int32).at[groups].add(1, mode="drop")
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(histogram)])


def sort_by_key(key: UInt32[Array, "n"], *values: Array) -> tuple[Array, ...]:
    """Stable ascending sort of (key, *values) by the key alone.

    Raises TypeError for any other key type: two keys or float keys cost a GPU 10 to 20 times more
    than its radix sort of one unsigned key.
    """
    if key.dtype != jnp.uint32:
        raise TypeError(f"sort keys must be uint32, not {key.dtype}")
    return tuple(lax.sort((key, *values), num_keys=1, is_stable=True))


def positive_bits(value: Float[Array, "*n"]) -> UInt32[Array, "*n"]:
    """Bits of non-negative float32 numbers, which order as the numbers do; NaN and below: 0."""
    value = jnp.where(value > 0, value, 0.0).astype(jnp.float32)
    return lax.bitcast_convert_type(value, jnp.uint32)


def chunks(offsets: Int32[Array, "g"], length: int, capacity: int) -> Chunks:
    """Cut every group of slots, given by `group_offsets`, into chunks of at most `length` slots.

    `capacity` chunks always suffice when it is slots // length + groups.
    """
    counts = offsets[1:] - offsets[:-1]
    runs = expand(-(-counts // length), capacity)
    start = offsets[runs.owner] + runs.rank * length
    left = jnp.minimum(counts[runs.owner] - runs.rank * length, length)
    return Chunks(
        jnp.where(runs.valid, runs.owner, counts.shape[0]),
        jnp.where(runs.valid, start, 0),
        jnp.where(runs.valid, left, 0),
        runs.total,
    )


def scatter_rows_max(
    rows: Int32[Array, "n"], values: UInt32[Array, "n p"], num_rows: int
) -> UInt32[Array, "r p"]:
    """Largest value of every (row, column), 0 where there is none; rows >= num_rows are dropped.

    Integer maxima do not depend on the order in which a GPU's atomics arrive.
    """
    out = jnp.zeros((num_rows, values.shape[1]), jnp.uint32)
    return out.at[rows].max(values, mode="drop")


def scatter_rows_min(
    rows: Int32[Array, "n"], values: Int32[Array, "n p"], num_rows: int
) -> Int32[Array, "r p"]:
    """Smallest value of every (row, column), 2**31 - 1 where there is none.

    As `scatter_rows_max`.
    """
    out = jnp.full((num_rows, values.shape[1]), INT32_MAX, jnp.int32)
    return out.at[rows].min(values, mode="drop")


def next_size(count: int | jax.Array, *, slack: float = 1.0, steps: int = 4) -> int:
    """A static capacity for `count` slots: times `slack`, up to the next of `steps` an octave.

    Few distinct sizes mean few compiled programs; at most 1 / `steps` of a size is unused.
    """
    count = max(int(int(count) * slack), 1)
    octave = 1 << (count - 1).bit_length() >> 1
    step = max(octave // steps, 1)
    return -(-count // step) * step
