"""COLMAP's points on frames of the package's renderer, and distances of known clouds."""

import builtins

import fixtures
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax import errors
from v3d_jax.data import paths, sparse
from v3d_jax.mesh import rasterize, shade, surface
from v3d_jax.ops import camera

VIEWS, SIDE, TEXELS = 6, 96, 32
RASTER = rasterize.RasterConfig(width=SIDE, height=SIDE, rows=1 << 12, slots=1 << 13)


def corner():
    """Two walls of two units that meet at a right angle along z, with noise on them."""
    rng = np.random.default_rng(0)
    atlas = np.full((1, TEXELS, TEXELS, 4), 255, np.uint8)
    blocks = rng.integers(0, 256, (TEXELS // 2, TEXELS // 2, 3), np.uint8)
    atlas[0, ..., :3] = blocks.repeat(2, axis=0).repeat(2, axis=1)
    square = np.asarray([[0.0, -1.0], [1.0, -1.0], [1.0, 1.0], [0.0, 1.0]])
    zero = np.zeros(4)
    walls = [
        np.stack([zero, square[:, 0], square[:, 1]], axis=1),
        np.stack([square[:, 0], zero, square[:, 1]], axis=1),
    ]
    faces = np.asarray([[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]], np.int32)
    uv = np.stack([square[:, 0], 0.5 * square[:, 1] + 0.5], axis=1)
    mesh = surface.from_geometry(np.concatenate(walls), faces)
    return mesh._replace(
        uv=np.concatenate([uv, uv])[faces].astype(np.float32),
        texture=np.zeros(1, np.int32),
        atlas=atlas,
    )


@pytest.fixture(scope="module")
def shots():
    """Frames of the corner along an arc, and their cameras."""
    first = paths.look_at(np.asarray([1.9, 1.0, 0.5]), np.asarray([0.3, 0.3, 0.0]))
    up = np.asarray([0.0, 0.0, 1.0])
    poses = paths.orbit(first, np.asarray([0.3, 0.3, 0.0]), up, 40.0, VIEWS)
    lens = camera.pinhole(60.0, SIDE, SIDE)
    size = jnp.full(VIEWS, SIDE, jnp.int32)
    lenses = jnp.broadcast_to(lens, (VIEWS, 3, 3))
    cameras = camera.Camera(jnp.asarray(poses, jnp.float32), lenses, size, size)
    white = shade.Lights(jnp.ones(3), jnp.asarray([[0.0, 0.0, 1.0]]), jnp.zeros((1, 3)))
    draw = fixtures.jit(lambda: shade.render(corner(), cameras, white, RASTER, alpha=False))
    found = draw()
    assert not bool(found.overflow(RASTER))
    rgba = np.asarray(found.rgba)
    images = rgba[..., :3] * rgba[..., 3:] + 1.0 - rgba[..., 3:]
    return (255.0 * images + 0.5).astype(np.uint8), poses, np.asarray(lenses, np.float64)


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
    real = builtins.__import__

    def absent(name, *rest):
        if name == "pycolmap":
            raise ImportError(name)
        return real(name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", absent)
        with pytest.raises(errors.UserError, match=r"pip install '\.\[colmap\]'"):
            sparse.triangulate(images, poses, lenses)
    pytest.importorskip("pycolmap", reason="COLMAP is not installed: pip install '.[colmap]'")
    skewed = lenses.copy()
    skewed[1, 0, 1] = 0.5
    with pytest.raises(errors.UserError, match="no camera with skew"):
        sparse.triangulate(images, poses, skewed)
