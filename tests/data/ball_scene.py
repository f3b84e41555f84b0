"""Balls of six colours, drawn by the package's renderer, and where they are in pictures.

They are placed so that in no view one hides another.
"""

import functools
from typing import NamedTuple

import fixtures
import jax
import jax.numpy as jnp
import numpy as np

from v3d_jax.data import solids
from v3d_jax.mesh import rasterize, shade, surface
from v3d_jax.ops import camera

VIEWS, SIDE, BALL = 8, 96, 0.07
LANDSCAPE, PORTRAIT = (96, 72), (72, 96)  # width and height
# Neither centred nor of square pixels.
INTRINSICS = {
    LANDSCAPE: np.asarray([[84.0, 0.0, 44.5], [0.0, 80.0, 37.25], [0.0, 0.0, 1.0]]),
    PORTRAIT: np.asarray([[92.0, 0.0, 38.25], [0.0, 97.0, 44.0], [0.0, 0.0, 1.0]]),
}
COLOURS = np.asarray([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]], np.float32)
POINTS = np.asarray(
    [
        [-0.03, 0.27, 0.5], [0.24, -0.07, 0.3], [-0.23, 0.16, 0.1],
        [0.29, -0.29, -0.1], [0.02, -0.14, -0.3], [0.04, 0.04, -0.5],
    ]
)  # fmt: skip
RASTER = rasterize.RasterConfig(width=SIDE, height=SIDE, rows=1 << 14, slots=1 << 15)


class Shots(NamedTuple):
    rgb: np.ndarray  # uint8 [v, h, w, 3], the balls before a grey wall
    alpha: np.ndarray  # uint8 [v, h, w]
    world_to_camera: np.ndarray  # float64
    intrinsics: np.ndarray  # float64 [3, 3]


@functools.cache
def shots(size: tuple[int, int]) -> Shots:
    """A walk of a third of a turn, at uneven steps, heights and distances."""
    turn = np.deg2rad(120.0 * np.linspace(0.0, 1.0, VIEWS) ** 1.5)
    radius = 2.2 + 0.2 * np.cos(3.0 * turn)
    place = np.stack([radius * np.cos(turn), radius * np.sin(turn), 0.1 * np.sin(5.0 * turn)], -1)
    pose = camera.look_at(jnp.asarray(place), jnp.zeros(3), jnp.asarray([0.05, -0.1, 1.0]))
    # The renderer is always as wide as high: what is right and below is cut off.
    intrinsics = jnp.broadcast_to(jnp.asarray(INTRINSICS[size]), (VIEWS, 3, 3))
    found = _draw(pose, intrinsics)
    assert not bool(found.overflow(RASTER))
    rgba = np.asarray(found.rgba)[:, : size[1], : size[0]]
    rgb = rgba[..., :3] * rgba[..., 3:] + 0.5 * (1.0 - rgba[..., 3:])
    rgb, alpha = np.uint8(255.0 * rgb + 0.5), np.uint8(255.0 * rgba[..., 3] + 0.5)
    return Shots(rgb, alpha, np.asarray(pose, np.float64), INTRINSICS[size])


@fixtures.jit
def _draw(pose: jax.Array, intrinsics: jax.Array) -> shade.Views:
    side = jnp.full(VIEWS, SIDE)
    white = shade.Lights(jnp.ones(3), jnp.asarray([[0.0, 0.0, 1.0]]), jnp.zeros((1, 3)))
    cameras = camera.Camera(pose, intrinsics, side, side)
    return shade.render(_balls(), cameras, white, RASTER, alpha=False)


def _balls() -> surface.Mesh:
    t = np.pi * np.linspace(0.0, 1.0, 9)
    vertices, faces, _ = solids.lathe(np.sin(t), -np.cos(t), sides=12)
    every = np.concatenate([BALL * vertices + point for point in POINTS])
    mesh = surface.from_geometry(
        every, np.concatenate([faces + k * len(vertices) for k in range(len(POINTS))])
    )
    return mesh._replace(
        material=np.repeat(np.arange(len(POINTS), dtype=np.int32), len(faces)),
        base_color=np.concatenate([COLOURS, np.ones((len(POINTS), 1), np.float32)], axis=-1),
        texture=np.full(len(POINTS), -1, np.int32),
        alpha_cutoff=np.zeros(len(POINTS), np.float32),
    )


def seen(picture: np.ndarray) -> np.ndarray:
    """Where each ball's middle is in a picture, float64 [k, 2] in pixels; NaN where it is cut off.

    Of the pixels that have its colour and no other's, by how much.
    """
    pixels = np.float64(picture) / 255.0
    height, width = pixels.shape[:2]
    y, x = np.mgrid[:height, :width] + 0.5
    places = []
    for colour in COLOURS.astype(bool):
        weight = pixels[..., colour].min(axis=-1) - pixels[..., ~colour].max(axis=-1)
        weight = np.where(weight > 0.2, weight, 0.0)
        # Black is padding, whose edge cuts as the picture's does.
        inside = np.pad(pixels.max(axis=-1) > 0.1, 1)
        edge = ~(inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:])
        whole = weight.sum() > 0.0 and not weight[edge].any()
        weight = weight / weight.sum() if whole else np.full_like(weight, np.nan)
        places.append([(weight * x).sum(), (weight * y).sum()])
    return np.asarray(places)


def projected(
    world_to_camera: np.ndarray, intrinsics: np.ndarray, points: np.ndarray
) -> np.ndarray:
    """Pixels of world points in float64, by the definition of OpenCV's cameras."""
    x, y, z = (np.float64(world_to_camera[:3, :3]) @ points.T) + world_to_camera[:3, 3:]
    (fx, skew, cx), (_, fy, cy), _ = np.float64(intrinsics)
    assert skew == 0.0
    return np.stack([fx * x / z + cx, fy * y / z + cy], axis=-1)


def check_clip(clip, points: np.ndarray, *, least: int) -> None:
    """The balls, at `points` of the file's world, are where the clip's cameras say, under 0.5 px.

    At least so many balls must be whole in a frame of the clip on average.
    """
    moved = np.float64(clip.scale) * (points - np.float64(clip.centre))
    count = 0
    for image, pose, intrinsics in zip(
        clip.images, clip.world_to_camera, clip.intrinsics, strict=True
    ):
        error = np.linalg.norm(projected(pose, intrinsics, moved) - seen(image), axis=-1)
        assert not (error >= 0.5).any(), error
        count += np.isfinite(error).sum()
    assert count >= least * len(clip.images)


def moved_world(seed: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
    """Rotation, shift and scale to a world with another up, as structure from motion makes one."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return rotation * np.sign(np.linalg.det(rotation)), rng.normal(size=3), 3.7


def in_world(shot: Shots, world) -> tuple[np.ndarray, np.ndarray]:
    """Poses and ball positions in a moved world."""
    rotation, shift, scale = world
    poses = shot.world_to_camera.copy()
    poses[:, :3, :3] = shot.world_to_camera[:, :3, :3] @ rotation.T
    poses[:, :3, 3] = scale * shot.world_to_camera[:, :3, 3] - poses[:, :3, :3] @ shift
    return poses, scale * POINTS @ rotation.T + shift
