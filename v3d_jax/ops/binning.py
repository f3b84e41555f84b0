"""Primitives of tile binning: run-length expansion, group offsets and integer-keyed sorting.

Rasterizers turn every face or splat into a data-dependent number of (primitive, tile) slots. All
shapes here are static: a capacity is given, what does not fit is dropped, and the true total is
returned so that the caller can report it. Nothing searches: offsets come from cumulative sums and
one scatter, and sorts take one unsigned key, which is what a GPU sorts by radix.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32, UInt, UInt32

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


def sorted_offsets(groups: UInt[Array, "n"], num_groups: int) -> Int32[Array, "g"]:
    """`group_offsets` of groups that are sorted already, without an atomic a slot.

    Every slot that begins a group writes its position; groups with no slots take the next one's.
    `num_groups` must fit the groups' type: it is the value of what lies outside.
    """
    n = groups.shape[0]
    slot = jnp.arange(n, dtype=jnp.int32)
    before = jnp.concatenate([jnp.full(1, num_groups, groups.dtype), groups[:-1]])
    begins = (groups != before) & (groups < num_groups)
    num_slots = jnp.sum(groups < num_groups, dtype=jnp.int32)
    # Dropped writes go to distinct places too: then no two meet and the scatter needs no atomics.
    target = jnp.where(begins, groups.astype(jnp.int32), num_groups + 1 + slot)
    first = jnp.full(num_groups + 1, n, jnp.int32)
    first = first.at[target].set(slot, mode="drop", unique_indices=True)
    return lax.cummin(first.at[num_groups].set(num_slots), reverse=True)


def compact(mask: Bool[Array, "n"]) -> tuple[Int32[Array, "n"], Int32[Array, "m"]]:
    """Indices where `mask` holds, in order and then 0; how many lie before each index [n + 1]."""
    n = mask.shape[0]
    rank = jnp.cumsum(mask.astype(jnp.int32))
    index = jnp.arange(n, dtype=jnp.int32)
    target = jnp.where(mask, rank - 1, n + index)
    kept = jnp.zeros(n, jnp.int32).at[target].set(index, mode="drop", unique_indices=True)
    return kept, jnp.concatenate([jnp.zeros(1, jnp.int32), rank])


def run_sums(
    values: Float[Array, "n *d"], start: Int32[Array, "r"], end: Int32[Array, "r"], longest: int
) -> Float[Array, "r *d"]:
    """Sum of values[start:end] for every run of at most `longest` entries.

    A segment tree: sums of aligned blocks of 1, 2, 4 ... entries, of which a run takes at most two
    of a size. The order of additions is fixed (bitwise repeatable, no atomics) and nothing is
    subtracted (no cancellation, unlike differences of a running sum).
    """
    total = jnp.zeros((start.shape[0], *values.shape[1:]), values.dtype)

    def taken(index: Array, take: Array) -> Array:
        rows = values[jnp.where(take, index, 0)]
        return jnp.where(take.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0.0)

    end = jnp.maximum(start, end)
    for level in range(longest.bit_length()):
        if level:
            odd = values.shape[0] % 2
            values = jnp.pad(values, [(0, odd)] + [(0, 0)] * (values.ndim - 1))
            values = values[0::2] + values[1::2]
        take_first = (start < end) & (start % 2 == 1)
        total = total + taken(start, take_first)
        start = start + take_first
        take_last = (start < end) & (end % 2 == 1)
        total = total + taken(end - 1, take_last)
        start, end = start // 2, (end - take_last) // 2
    return total


def run_scan(
    combine: Callable[[Array, Array], Array],
    values: Float[Array, "n p"],
    head: Bool[Array, "n"],
    *,
    reverse: bool = False,
) -> Float[Array, "n p"]:
    """Inclusive scan down every column that starts anew at each `head` (in reverse: at each last).

    `combine` is associative; the order of its applications is fixed.
    """

    def step(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        (lv, lh), (rv, rh) = left, right
        return jnp.where(rh, rv, combine(lv, rv)), lh | rh

    return lax.associative_scan(step, (values, head[:, None]), reverse=reverse, axis=0)[0]


def sort_by_key(key: UInt[Array, "n"], *values: Array) -> tuple[Array, ...]:
    """Stable ascending sort of (key, *values) by the key alone, which is uint16 or uint32.

    Raises TypeError for any other key type: two keys or float keys cost a GPU 10 to 20 times more
    than its radix sort of one unsigned key.
    """
    if key.dtype not in (jnp.uint16, jnp.uint32):
        raise TypeError(f"sort keys must be uint16 or uint32, not {key.dtype}")
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
