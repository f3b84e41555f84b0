"""The baselines find what was planted, and turn orbits the right way."""

import numpy as np
import pytest

from v3d_jax.data import baselines


def orbits(count=5, views=8, size=32):
    """Smooth random images: thumbnails keep what tells them apart."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, views, 4, 4, 3), np.uint8)
    return coarse.repeat(size // 4, axis=2).repeat(size // 4, axis=3)


def test_repeat():
    views = orbits()[:, 0]
    repeated = baselines.repeat(views, 3)
    assert repeated.shape == (5, 3, 32, 32, 3)
    for frame in range(3):
        np.testing.assert_array_equal(repeated[:, frame], views)


def test_turn_starts_where_told_and_wraps_around():
    frames = np.arange(8, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    assert baselines.turn(frames, 3, 4)[:, 0, 0, 0].tolist() == [3, 5, 7, 1]
    assert baselines.turn(frames, 7, 8)[:, 0, 0, 0].tolist() == [7, 0, 1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="3 equally spaced frames"):
        baselines.turn(frames, 0, 3)


def test_nearest_finds_a_noisy_view_among_all_orbits_and_starts():
    known = orbits()
    planted = [(4, 7), (0, 0), (2, 3)]
    noise = np.random.default_rng(1).integers(-9, 10, (3, 32, 32, 3))
    queries = np.stack([known[o, s] for o, s in planted]).astype(int) + noise
    found = baselines.nearest(np.clip(queries, 0, 255).astype(np.uint8), enumerate(known), size=8)
    assert list(zip(found.orbit, found.start, strict=True)) == planted


def test_distance_equals_the_plain_sum():
    known = orbits(2, 3)
    query = orbits(1, 1, 32)[0] // 2
    found = baselines.nearest(query, enumerate(known), size=32)
    plain = np.sqrt(np.square((query[0] - known.astype(float)) / 255).mean(axis=(2, 3, 4)))
    assert found.distance[0] == pytest.approx(plain.min(), rel=1e-12)
    assert plain[found.orbit[0], found.start[0]] == plain.min()


def test_orbits_go_by_their_numbers():
    known = orbits()
    found = baselines.nearest(known[2:4, 1], zip((9, 7, 5, 3, 1), known, strict=True))
    assert found.orbit.tolist() == [5, 3]


def test_the_first_of_equals_wins():
    known = np.concatenate([orbits(1), orbits(1)])
    found = baselines.nearest(known[0, 2:3], enumerate(known))
    assert (found.orbit[0], found.start[0], found.distance[0]) == (0, 2, 0.0)


def test_orbits_of_another_resolution_are_comparable():
    known = orbits(size=64)
    found = baselines.nearest(orbits(size=32)[3, 5][None], enumerate(known), size=16)
    assert (found.orbit[0], found.start[0], found.distance[0]) == (3, 5, 0.0)


def test_no_orbits():
    with pytest.raises(baselines.NothingKnown):
        baselines.nearest(orbits()[0], [])
