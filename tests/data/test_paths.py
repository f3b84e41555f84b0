"""Camera paths keep their first camera, and go where they should; what cameras share."""

import numpy as np
import pytest

from v3d_jax.data import paths

PIVOT = np.asarray([0.3, -0.2, 0.5])
FIRST = paths.look_at(np.asarray([2.0, 1.0, 1.5]), PIVOT)
UP = np.asarray([0.0, 0.0, 2.0])
LENS = paths.Lens(np.asarray([[40.0, 0.0, 32.0], [0.0, 40.0, 32.0], [0.0, 0.0, 1.0]]), (64, 64))
PATHS = {
    "orbit": paths.orbit(FIRST, PIVOT, UP, 80.0, 5),
    "spiral": paths.spiral(FIRST, PIVOT, 30.0, 1.5, 5),
    "dolly": paths.dolly(FIRST, np.asarray([0.5, -0.2, 0.1]), 5),
}


@pytest.mark.parametrize("name", PATHS)
def test_paths_begin_at_their_camera_and_move_it_rigidly(name):
    path = PATHS[name]
    np.testing.assert_allclose(path[0], FIRST, atol=1e-12)
    rotations = path[:, :3, :3]
    np.testing.assert_allclose(
        np.einsum("tij,tkj->tik", rotations, rotations), np.tile(np.eye(3), (5, 1, 1)), atol=1e-12
    )
    np.testing.assert_allclose(np.linalg.det(rotations), 1.0)
    assert np.linalg.norm(np.diff(paths.centres(path), axis=0), axis=-1).min() > 0.05


@pytest.mark.parametrize("name", ["orbit", "spiral"])
def test_arcs_and_spirals_keep_the_pivot_in_its_place(name):
    local = np.einsum("tij,j->ti", PATHS[name][:, :3], np.append(PIVOT, 1.0))
    np.testing.assert_allclose(local, np.broadcast_to(local[0], local.shape), atol=1e-12)
    assert local[0, 2] > 1.0


def test_an_arc_turns_by_its_degrees_counter_clockwise_at_one_height():
    offset = paths.centres(PATHS["orbit"]) - PIVOT
    azimuth = np.rad2deg(np.unwrap(np.arctan2(offset[:, 1], offset[:, 0])))
    np.testing.assert_allclose(np.diff(azimuth), 20.0)
    np.testing.assert_allclose(offset[:, 2], offset[0, 2])


def test_a_spiral_ends_at_its_degrees_having_gone_round():
    offset = paths.centres(PATHS["spiral"]) - PIVOT
    unit = offset / np.linalg.norm(offset, axis=-1, keepdims=True)
    np.testing.assert_allclose(
        np.rad2deg(np.arccos(unit @ unit[0])), [0, 7.5, 15, 22.5, 30], atol=1e-5
    )
    # Half a turn from the third to the fourth-and-a-third: it is on both sides.
    fine = paths.centres(paths.spiral(FIRST, PIVOT, 30.0, 1.0, 41)) - PIVOT
    for axis in FIRST[:2, :3]:
        assert (fine @ axis).min() < -0.1
        assert (fine @ axis).max() > 0.1


def test_a_dolly_looks_the_same_way_all_the_time():
    path = PATHS["dolly"]
    np.testing.assert_array_equal(path[:, :3, :3], np.broadcast_to(FIRST[:3, :3], (5, 3, 3)))
    np.testing.assert_allclose(paths.centres(path)[-1] - paths.centres(path)[0], [0.5, -0.2, 0.1])


def test_the_point_that_cameras_look_at():
    np.testing.assert_allclose(paths.common_point(PATHS["orbit"]), PIVOT, atol=1e-9)
    assert paths.common_point(PATHS["dolly"]) is None  # parallel
    assert paths.common_point(FIRST[None]) is None  # one axis has no nearest point
    back = paths.look_at(np.asarray([2.0, 1.0, 1.5]), np.asarray([4.0, 2.5, 1.5]))
    other = paths.look_at(np.asarray([2.0, -1.0, 1.5]), np.asarray([4.0, -2.5, 1.5]))
    assert paths.common_point(np.stack([back, other])) is None  # behind both


def test_how_far_away_is_what_cameras_look_at():
    for number, pose in enumerate(PATHS["orbit"]):
        ahead = pose[2, :3] @ PIVOT + pose[2, 3]
        assert paths.depth(PATHS["orbit"], number) == pytest.approx(ahead)
    apart = float(np.linalg.norm([0.5, -0.2, 0.1]))
    assert paths.width(PATHS["dolly"]) == pytest.approx(apart)
    assert paths.depth(PATHS["dolly"], 3) == pytest.approx(2.0 * apart)


def test_what_cameras_see_of_each_others_views():
    facing = paths.orbit(FIRST, PIVOT, UP, 180.0, 2)[1]
    away = paths.orbit(FIRST, paths.centres(FIRST[None])[0], UP, 180.0, 2)[1]
    beside = paths.dolly(FIRST, 0.3 * FIRST[0, :3], 2)[1]
    found = paths.seen(FIRST, np.stack([facing, away, beside]), LENS)
    assert found.tolist() == [True, False, True]
    assert paths.seen(FIRST, FIRST[None], LENS).all()
