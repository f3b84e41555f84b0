"""Baselines of scenes: planes are warped exactly, and no unseen picture is looked at."""

import numpy as np
import pytest

from v3d_jax import errors
from v3d_jax.data import paths, shots, warps

SIZE = 24
LENS = np.asarray([[20.0, 0.0, 11.0], [0.0, 22.0, 13.0], [0.0, 0.0, 1.0]])


def arc(frames=5, radius=2.0, degrees=40.0):
    first = paths.look_at(np.asarray([radius, 0.0, 0.3]), np.zeros(3))
    return paths.orbit(first, np.zeros(3), np.asarray([0.0, 0.0, 1.0]), degrees, frames)


def sequence(poses, inputs, images=None):
    count = len(poses)
    if images is None:
        images = np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)
    return shots.Shots("one", images, poses, np.tile(LENS, (count, 1, 1)), inputs)


def pixel(pose, point):
    image = LENS @ (pose[:3] @ np.append(point, 1.0))
    return image[:2] / image[2]


def test_points_of_the_plane_go_where_the_source_sees_them():
    source, target = arc()[0], arc()[2]
    back = np.linalg.inv(source)
    for x, y in ((0.0, 0.0), (0.3, -0.2), (-0.5, 0.4)):
        point = (back @ [x, y, 1.7, 1.0])[:3]
        given = pixel(target, point)[None]
        found, ahead = warps.onto_plane(source, LENS, target, LENS, 1.7, given)
        np.testing.assert_allclose(found[0], pixel(source, point), atol=1e-9)
        assert ahead[0]


def test_a_camera_in_the_plane_and_rays_away_from_it_are_no_trouble():
    """A quarter turn apart, the target's camera lies in the source's plane."""
    poses = arc(frames=2, degrees=90.0)
    grid = np.stack(np.meshgrid(np.arange(4.0), np.arange(4.0)), axis=-1)
    found, _ = warps.onto_plane(poses[0], LENS, poses[1], LENS, 2.0, grid)
    assert np.isfinite(found).all()
    behind = arc(frames=2, degrees=180.0)
    _, ahead = warps.onto_plane(behind[0], LENS, behind[1], LENS, 5.0, grid)
    assert not ahead.any()
    found, _ = warps.onto_plane(behind[0], LENS, behind[1], LENS, 5.0, grid)
    np.testing.assert_array_equal(found, grid)


def test_a_painted_plane_is_warped_exactly():
    """A wall through what the cameras look at, whose colours are linear in the source's picture."""
    poses = arc(frames=3, degrees=20.0)
    source, plane = poses[0], paths.depth(poses, 0)
    assert plane == pytest.approx(np.hypot(2.0, 0.3))
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    painted = np.stack([4.0 * x, 4.0 * y, 2.0 * x + 2.0 * y], axis=-1).astype(np.uint8)
    images = np.stack([painted, np.zeros_like(painted), np.zeros_like(painted)])
    found = warps.plane_warp(sequence(poses, (0,), images))
    back, checked = np.linalg.inv(source), 0
    for row in range(SIZE):
        for column in range(SIZE):
            # The wall's point by the target's ray, in the world; then the source's pixel of it.
            ray = np.linalg.inv(LENS @ poses[1][:3, :3]) @ [column + 0.5, row + 0.5, 1.0]
            place = np.linalg.inv(poses[1])[:3, 3]
            normal, on = back[:3, 2], back[:3, 3] + plane * back[:3, 2]
            u, v = pixel(source, place + ray * ((on - place) @ normal) / (ray @ normal))
            if min(u, v) >= 0.5 and max(u, v) <= SIZE - 0.5:
                wanted = [4.0 * u, 4.0 * v, 2.0 * u + 2.0 * v]
                assert np.abs(found[0][row, column] - wanted).max() <= 0.5 + 1e-6
                checked += 1
    assert checked > SIZE * SIZE / 2


def test_warping_to_the_same_camera_changes_nothing():
    poses = arc(frames=3)
    poses[1] = poses[0]
    given = sequence(poses, (0, 2))
    np.testing.assert_array_equal(warps.plane_warp(given)[0], given.images[0])


def test_pixels_that_the_nearest_view_lacks_are_another_views_or_the_edges():
    """Two pictures side by side: what the left one does not have, the right one has."""
    poses = np.tile(np.eye(4), (3, 1, 1))
    poses[:, 0, 3] = [0.0, -0.4, -1.0]  # to the right; parallel axes put the plane at 2
    assert paths.depth(poses, 0) == 2.0
    images = np.zeros((3, SIZE, SIZE, 3), np.uint8)
    images[0], images[2] = 10, 20
    (found,) = warps.plane_warp(sequence(poses, (0, 2), images))
    # 0.4 units at depth 2 are 4 pixels.
    assert (found[:, : SIZE - 4] == 10).all()
    assert (found[:, SIZE - 4 :] == 20).all()
    (alone,) = warps.plane_warp(sequence(poses[:2], (0,), images[:2]))
    assert (alone == 10).all()


def test_nearest_views_by_the_places_of_cameras():
    given = sequence(arc(), (0, 3))
    assert given.unseen == (1, 2, 4)
    np.testing.assert_array_equal(warps.nearest_view(given), given.images[[0, 3, 3]])


def test_unseen_pictures_change_no_prediction():
    given = sequence(arc(), (0, 4))
    images = given.images.copy()
    images[list(given.unseen)] = 0
    blind = given._replace(images=images)
    for baseline in (warps.nearest_view, warps.plane_warp):
        np.testing.assert_array_equal(baseline(given), baseline(blind))


def test_even_input_views_and_clips_of_a_models_length():
    assert shots.even(18, 1) == (0,)
    assert shots.even(18, 3) == (0, 8, 17)
    with pytest.raises(errors.UserError, match="3 input views of sequences of 3 frames"):
        shots.even(3, 3)
    given = sequence(arc(frames=7), (2, 5))
    assert shots.clips(given, 4) == [(2, 0, 1, 3), (2, 4, 5, 6)]
    assert shots.clips(given, 6) == [(2, 0, 1, 3, 4, 5), (2, 6)]
