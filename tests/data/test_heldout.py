"""Held-out objects out of records: which are taken, at what size, and their neighbours."""

import numpy as np
import pytest

from v3d_jax import errors
from v3d_jax.data import heldout, orbits, png


class Memory(list):
    """Records in memory."""

    views, size = 6, 16


def frames(seed):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 4, 4, 3), np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


def record(name, pictures, variant=0):
    cameras = np.zeros((6, 4, 4), np.float32), np.zeros((6, 3, 3), np.float32)
    azimuths = np.zeros(6, np.float32)
    return orbits.Orbit(name, variant, [png.encode(p) for p in pictures], *cameras, azimuths, 0.0)


def test_augmented_copies_are_passed_over_and_the_limit_holds():
    named = [("a", 0), ("a", 1), ("b", 0), ("c", 0)]
    records = Memory(record(name, frames(i), copy) for i, (name, copy) in enumerate(named))
    objects = heldout.select(records, 16, limit=2)
    assert (objects.names, objects.places) == (["a", "b"], [0, 2])
    np.testing.assert_array_equal(objects.inputs, [frames(0)[0], frames(2)[0]])
    with pytest.raises(errors.UserError, match="only augmented"):
        heldout.select(Memory([record("a", frames(1), 1)]), 16)


def test_orbit_takes_even_frames_from_a_start_and_shrinks():
    records = Memory([record("a", frames(0))])
    np.testing.assert_array_equal(heldout.orbit(records, 0, 5, 16, 3), frames(0)[[5, 1, 3]])
    np.testing.assert_array_equal(heldout.orbit(records, 0, 0, 4, 6), frames(0)[:, ::4, ::4])


def test_transparent_pixels_are_white():
    pictures = np.concatenate([frames(0), np.zeros((6, 16, 16, 1), np.uint8)], axis=-1)
    assert (heldout.frames(record("a", pictures), 16) == 255).all()


def test_neighbours_are_found_among_other_objects_only():
    records = Memory([record("a", frames(0)), record("b", frames(1))])
    known = Memory(
        [record("a", frames(0))]
        + [record(f"other {i}", frames(10 + i)) for i in range(70)]
        + [record("like b", np.roll(frames(1), 2, axis=0))]
    )
    found = heldout.neighbours(heldout.select(records, 16), known, 16)
    assert found.orbit[0] != 0
    assert (found.orbit[1], found.start[1], found.distance[1]) == (71, 2, 0.0)
    with pytest.raises(errors.UserError, match="none to compare"):
        heldout.neighbours(heldout.select(records, 16), records, 16)


@pytest.mark.parametrize(
    ("size", "count", "part"),
    [((16, 16), 4, "do not divide"), ((32, 32), 3, "16 x 16"), ((8, 16), 3, "8 x 16")],
)
def test_models_that_do_not_fit_the_data_are_refused(size, count, part):
    with pytest.raises(errors.UserError, match=part):
        heldout.check(Memory(), size, count)
    heldout.check(Memory(), (8, 8), 3)
