"""Frames of a textured corner by the package's renderer, whose every point lies on two planes."""

import functools
from typing import NamedTuple

import fixtures
import jax.numpy as jnp
import numpy as np

from v3d_jax.data import paths
from v3d_jax.mesh import rasterize, shade, surface
from v3d_jax.ops import camera

VIEWS, SIDE, TEXELS = 6, 96, 32
RASTER = rasterize.RasterConfig(width=SIDE, height=SIDE, rows=1 << 12, slots=1 << 13)


class Shots(NamedTuple):
    images: np.ndarray  # uint8 [v, h, w, 3], on white
    world_to_camera: np.ndarray  # float64
    intrinsics: np.ndarray  # float64


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


@functools.cache
def shots() -> Shots:
    """Along an arc, from inside the corner."""
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
    pictures = (255.0 * images + 0.5).astype(np.uint8)
    return Shots(pictures, poses, np.asarray(lenses, np.float64))
