"""COLMAP's points on frames of the package's renderer, and distances of known clouds."""

import sys

import corner_views
import numpy as np
import pytest

from v3d_jax import errors
from v3d_jax.data import sparse


@pytest.fixture
def shots():
    return corner_views.shots()


def test_points_lie_on_the_surface_that_was_rendered(shots):
    pytest.importorskip("pycolmap", reason="COLMAP is not installed: pip install '.[colmap]'")
    cloud = sparse.triangulate(*shots)
    off = np.abs(cloud.positions[:, :2]).min(axis=1)
    assert len(cloud.positions) > 40
    assert cloud.reprojection < 1.0
    # A pixel is 0.02 units wide on the walls.
    assert np.median(off) < 0.02
    assert np.percentile(off, 90) < 0.08
    assert (cloud.positions[:, :2].max(axis=1) > 0.3).any()
    again = sparse.triangulate(*shots).positions
    assert abs(len(again) - len(cloud.positions)) <= 5
    assert sparse.distance(again, cloud.positions).chamfer < 0.005
    pairs = sparse.triangulate(*shots, sparse.SparseConfig(two_view_tracks=True))
    assert len(pairs.positions) > len(cloud.positions)


def test_distance_tells_frames_that_do_not_agree(shots):
    """Frames in another order than their cameras: as many points, but elsewhere."""
    pytest.importorskip("pycolmap", reason="COLMAP is not installed: pip install '.[colmap]'")
    images, poses, lenses = shots
    right = sparse.triangulate(*shots).positions
    for order in ([3, 0, 5, 1, 4, 2], [5, 4, 3, 2, 1, 0]):
        wrong = sparse.triangulate(images[order], poses, lenses)
        assert wrong.reprojection > 0.5
        assert sparse.distance(wrong.positions, right).accuracy > 0.1
    half = sparse.triangulate(images[::2], poses[::2], lenses[::2]).positions
    assert sparse.distance(half, right).accuracy < 0.03
    blank = sparse.triangulate(np.full_like(images, 255), poses, lenses)
    assert (blank.positions.shape, blank.reprojection) == ((0, 3), None)


def test_distances_of_known_clouds():
    grid = np.stack(np.meshgrid(*[np.arange(3.0)] * 3), axis=-1).reshape(-1, 3)
    assert sparse.distance(grid, grid) == (0.0, 0.0, 0.0)
    moved = grid + np.asarray([0.0, 0.0, 0.25])
    assert sparse.distance(moved, grid) == pytest.approx((0.25, 0.25, 0.25))
    # One point of a row of three: it is on the row, but the others are 1 and 2 away from it.
    row = np.asarray([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    assert sparse.distance(row[:1], row) == pytest.approx((0.0, 1.0, 0.5))
    assert sparse.distance(row, row[:1]) == pytest.approx((1.0, 0.0, 0.5))
    assert sparse.distance(row, row[:0]) is None
    assert sparse.distance(row[:0], row) is None
    assert sparse.radius(row) == pytest.approx(np.sqrt(2.0 / 3.0))
    assert sparse.radius(row[:1]) is None
    assert sparse.radius(row[:0]) is None


def test_what_colmap_cannot_do_is_told_in_one_line(shots, monkeypatch):
    images, poses, lenses = shots
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pycolmap", None)
        with pytest.raises(errors.UserError, match=r"pip install '\.\[colmap\]'"):
            sparse.triangulate(images, poses, lenses)
    pytest.importorskip("pycolmap", reason="COLMAP is not installed: pip install '.[colmap]'")
    skewed = lenses.copy()
    skewed[1, 0, 1] = 0.5
    with pytest.raises(errors.UserError, match="no camera with skew"):
        sparse.triangulate(images, poses, skewed)
