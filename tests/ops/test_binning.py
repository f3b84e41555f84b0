"""Expansion, offsets, sorting and chunks against their obvious numpy twins."""

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.ops import binning


@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_expand_equals_repeat(density):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 6, 200) * (rng.random(200) < density)
    total = counts.sum()
    runs = jax.jit(binning.expand, static_argnums=1)(jnp.asarray(counts, jnp.int32), 1200)
    assert int(runs.total) == total
    assert int(runs.valid.sum()) == total
    np.testing.assert_array_equal(runs.owner[:total], np.repeat(np.arange(200), counts))
    rank = np.concatenate([np.arange(c) for c in counts])
    np.testing.assert_array_equal(runs.rank[:total], rank)


def test_expand_reports_what_does_not_fit():
    runs = binning.expand(jnp.asarray([3, 0, 5, 2], jnp.int32), 6)
    assert int(runs.total) == 10
    np.testing.assert_array_equal(runs.owner, [0, 0, 0, 2, 2, 2])
    assert bool(runs.valid.all())


def test_total_saturates_where_int32_wraps():
    counts = jnp.full(5, 2**30, jnp.int32)
    assert int(binning.expand(counts, 4).total) == 2**31 - 1
    assert int(binning.saturating_sum(jnp.asarray([2**30, 7], jnp.int32))) == 2**30 + 7


def test_offsets_are_those_of_the_sorted_groups():
    rng = np.random.default_rng(1)
    groups = rng.integers(0, 12, 300).astype(np.uint32)  # 10 and 11 are left out
    offsets = binning.group_offsets(jnp.asarray(groups), 10)
    expected = np.searchsorted(np.sort(groups), np.arange(11))
    np.testing.assert_array_equal(offsets, expected)


@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
def test_sort_is_stable_and_refuses_slow_keys(kind):
    rng = np.random.default_rng(2)
    key = rng.integers(0, 20, 500).astype(kind)
    value = np.arange(500, dtype=np.int32)
    got = binning.sort_by_key(jnp.asarray(key), jnp.asarray(value))
    order = np.argsort(key, kind="stable")
    np.testing.assert_array_equal(got[0], key[order])
    np.testing.assert_array_equal(got[1], order)
    with pytest.raises(TypeError):
        binning.sort_by_key(jnp.asarray(key, jnp.int32), jnp.asarray(value))


def test_positive_bits_order_as_numbers():
    rng = np.random.default_rng(3)
    values = np.sort(10.0 ** rng.uniform(-30, 30, 400)).astype(np.float32)
    bits = np.asarray(binning.positive_bits(jnp.asarray(values)))
    assert (np.diff(bits.astype(np.int64)) >= 0).all()
    assert ((np.diff(bits.astype(np.int64)) > 0) == (np.diff(values) > 0)).all()
    odd = binning.positive_bits(jnp.asarray([np.nan, -1.0, -0.0, 0.0], jnp.float32))
    np.testing.assert_array_equal(odd, 0)


def test_chunks_cover_every_slot_once():
    rng = np.random.default_rng(4)
    counts = rng.integers(0, 40, 30)
    counts[[0, 7, 29]] = 0
    offsets = jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32)
    capacity = int(counts.sum()) // 8 + 30
    cut = fixtures.jit(binning.chunks, static_argnums=(1, 2))(offsets, 8, capacity)
    used = int(cut.total)
    assert used <= capacity
    assert used == int((-(-counts // 8)).sum())
    assert int(cut.length.max()) <= 8
    np.testing.assert_array_equal(cut.length[used:], 0)
    np.testing.assert_array_equal(cut.group[used:], 30)
    slots = np.concatenate(
        [np.arange(s, s + n) for s, n in zip(cut.start[:used], cut.length[:used], strict=True)]
    )
    np.testing.assert_array_equal(slots, np.arange(counts.sum()))
    groups = np.repeat(np.asarray(cut.group[:used]), np.asarray(cut.length[:used]))
    np.testing.assert_array_equal(groups, np.repeat(np.arange(30), counts))


def test_scattered_rows_equal_a_loop():
    rng = np.random.default_rng(5)
    rows = rng.integers(0, 9, 60)
    values = rng.integers(1, 1000, (60, 4))
    high, low = np.zeros((7, 4)), np.full((7, 4), 2**31 - 1)
    for row, value in zip(rows, values, strict=True):
        if row < 7:
            high[row] = np.maximum(high[row], value)
            low[row] = np.minimum(low[row], value)
    rows = jnp.asarray(rows, jnp.int32)
    got = binning.scatter_rows_max(rows, jnp.asarray(values, jnp.uint32), 7)
    np.testing.assert_array_equal(got, high)
    got = binning.scatter_rows_min(rows, jnp.asarray(values, jnp.int32), 7)
    np.testing.assert_array_equal(got, low)


@pytest.mark.parametrize("steps", [1, 4])
def test_next_size_is_close_above(steps):
    for count in [*range(1, 200), 12345, 10**6 + 1]:
        size = binning.next_size(count, steps=steps)
        assert count <= size <= max(count * (1 + 1 / steps), count + 1)
    sizes = {binning.next_size(n, steps=steps) for n in range(1025, 2049)}
    assert len(sizes) == steps
    assert binning.next_size(100, slack=1.5) >= 150


@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
def test_offsets_of_sorted_groups_with_empty_ones(kind):
    rng = np.random.default_rng(4)
    for count in (300, 5):
        groups = np.sort(rng.integers(0, 40, count)).astype(kind)  # 35 and above are left out
        offsets = jax.jit(binning.sorted_offsets, static_argnums=1)(jnp.asarray(groups), 35)
        np.testing.assert_array_equal(offsets, np.searchsorted(groups, np.arange(36)))
    none = binning.sorted_offsets(jnp.full(4, 9, kind), 3)
    np.testing.assert_array_equal(none, [0, 0, 0, 0])


def test_compact_keeps_order():
    mask = np.random.default_rng(5).random(100) < 0.3
    index, before = binning.compact(jnp.asarray(mask))
    np.testing.assert_array_equal(index[: mask.sum()], np.flatnonzero(mask))
    np.testing.assert_array_equal(index[mask.sum() :], 0)
    np.testing.assert_array_equal(before, np.concatenate([[0], np.cumsum(mask)]))


@pytest.mark.parametrize("size", [1, 37, 256])
def test_run_sums_of_any_runs(size):
    rng = np.random.default_rng(size)
    values = rng.normal(size=(size, 3)).astype(np.float32)
    ends = np.sort(rng.integers(0, size + 1, (2, 60)), axis=0).astype(np.int32)
    ends[:, 0] = 0, size  # everything
    ends[:, 1] = size, 0  # negative: empty
    values[0] = 1e20 if size == 37 else values[0]  # a running sum would lose all that follows
    run_sums = fixtures.jit(binning.run_sums, static_argnums=3)
    got = run_sums(jnp.asarray(values), *jnp.asarray(ends), size)
    expected = [values[a:b].astype(np.float64).sum(0) for a, b in ends.T]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    flat = run_sums(jnp.asarray(values[:, 0]), *jnp.asarray(ends), size)
    np.testing.assert_array_equal(flat, got[:, 0])


def test_run_sums_reach_exactly_as_far_as_the_longest():
    values, zero = jnp.ones(1024), jnp.zeros(64, jnp.int32)
    run_sums = fixtures.jit(binning.run_sums, static_argnums=3)
    for longest in (1, 2, 3, 7, 8, 9, 100):
        starts = zero + jnp.arange(64, dtype=jnp.int32)
        got = run_sums(values, starts, starts + longest, longest)
        np.testing.assert_array_equal(got, float(longest))


@pytest.mark.parametrize("reverse", [False, True])
def test_run_scan_starts_anew(reverse):
    rng = np.random.default_rng(6)
    values = rng.uniform(0.5, 1.5, (50, 4)).astype(np.float32)
    head = rng.random(50) < 0.2
    scan = fixtures.jit(binning.run_scan, static_argnums=0, static_argnames="reverse")
    got = scan(jnp.multiply, jnp.asarray(values), jnp.asarray(head), reverse=reverse)
    expected = values.astype(np.float64)
    order = range(49, -1, -1) if reverse else range(50)
    last = None
    for i in order:
        if last is not None and not head[i]:
            expected[i] *= expected[last]
        last = i
    np.testing.assert_allclose(got, expected, rtol=1e-5)
