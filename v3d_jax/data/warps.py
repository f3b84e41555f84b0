"""Two predictions of unseen views that need no model: the nearest input view, and a plane of it.

Neither sees anything of an unseen view but its camera. Axes: v input view, h w picture. Cameras
are OpenCV's with pixel centres at half-integers, as `ops.camera` says, in numpy's float64.
"""

import numpy as np
from jaxtyping import Bool, Float, UInt8

from v3d_jax.data import paths, poses
from v3d_jax.data.shots import Shots


def nearest(shots: Shots, target: int) -> list[int]:
    """The input views by the distance of their cameras from frame `target`'s, the nearest first."""
    places = paths.centres(shots.world_to_camera)
    away = [float(np.linalg.norm(places[i] - places[target])) for i in shots.inputs]
    return [shots.inputs[place] for place in np.argsort(away, kind="stable")]


def nearest_view(shots: Shots) -> UInt8[np.ndarray, "u h w 3"]:
    """For every unseen frame the nearest input view as it is."""
    return np.stack([shots.images[nearest(shots, target)[0]] for target in shots.unseen])


def plane_warp(shots: Shots) -> UInt8[np.ndarray, "u h w 3"]:
    """For every unseen frame the input views warped by one plane each, nearer views first.

    A view's plane is parallel to its picture, as far as what the sequence's cameras look at
    (`paths.depth`). A pixel is of the nearest input view whose picture has it, and of the nearest
    one's edge if none has.
    """
    return np.stack([_warped(shots, target) for target in shots.unseen])


def onto_plane(
    source_pose: Float[np.ndarray, "4 4"],
    source_lens: Float[np.ndarray, "3 3"],
    target_pose: Float[np.ndarray, "4 4"],
    target_lens: Float[np.ndarray, "3 3"],
    plane: float,
    pixels: Float[np.ndarray, "*p 2"],
) -> tuple[Float[np.ndarray, "*p 2"], Bool[np.ndarray, "*p"]]:
    """Where the source's picture has what the target's pixels show of the plane z = `plane`.

    z is along the source's axis. The map is the homography that the plane induces, written as rays
    that meet it, which has no inverse to fail where the target's camera lies in the plane. Also
    says which rays meet it ahead of the target; of the others the place is the pixel itself.
    """
    motion = source_pose @ poses.inverse(target_pose)
    ones = np.ones((*pixels.shape[:-1], 1))
    rays = np.concatenate([pixels, ones], axis=-1) @ np.linalg.inv(target_lens).T
    rays, origin = rays @ motion[:3, :3].T, motion[:3, 3]
    along = np.where(np.abs(rays[..., 2]) > 1e-12, rays[..., 2], 1e-12)
    distance = (plane - origin[2]) / along
    image = (origin + distance[..., None] * rays) @ source_lens.T
    ahead = distance > 0.0
    return np.where(ahead[..., None], image[..., :2] / plane, pixels), ahead


def sample(
    image: UInt8[np.ndarray, "h w 3"], pixels: Float[np.ndarray, "*p 2"]
) -> Float[np.ndarray, "*p 3"]:
    """Colours of a picture between its pixels, bilinearly; beyond its edge those of the edge."""
    height, width = image.shape[:2]
    x = np.clip(pixels[..., 0] - 0.5, 0.0, width - 1.0)
    y = np.clip(pixels[..., 1] - 0.5, 0.0, height - 1.0)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    right, below = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    across, down = (x - left)[..., None], (y - top)[..., None]
    upper = image[top, left] * (1.0 - across) + image[top, right] * across
    lower = image[below, left] * (1.0 - across) + image[below, right] * across
    return upper * (1.0 - down) + lower * down


def _warped(shots: Shots, target: int) -> UInt8[np.ndarray, "h w 3"]:
    height, width = shots.images.shape[1:3]
    y, x = np.mgrid[:height, :width] + 0.5
    grid = np.stack([x, y], axis=-1)
    found, filled = np.zeros((height, width, 3)), np.zeros((height, width), bool)
    order = nearest(shots, target)
    for view in order:
        pixels, inside = _reached(shots, target, view, grid)
        take = inside & ~filled
        found[take] = sample(shots.images[view], pixels[take])
        filled |= inside
    pixels, _ = _reached(shots, target, order[0], grid)
    found[~filled] = sample(shots.images[order[0]], pixels[~filled])
    return (found + 0.5).astype(np.uint8)


def _reached(
    shots: Shots, target: int, view: int, grid: Float[np.ndarray, "h w 2"]
) -> tuple[Float[np.ndarray, "h w 2"], Bool[np.ndarray, "h w"]]:
    """Where the target's pixels are in an input view, and whether that is in its picture."""
    pixels, ahead = onto_plane(
        shots.world_to_camera[view],
        shots.intrinsics[view],
        shots.world_to_camera[target],
        shots.intrinsics[target],
        paths.depth(shots.world_to_camera, view),
        grid,
    )
    height, width = grid.shape[:2]
    return pixels, ahead & (pixels >= 0.0).all(-1) & (pixels <= [width, height]).all(-1)
