"""The visual hull of masks: where splats and surfaces may start.

Axes: v view, h w image, n voxels a side, p points; grids are indexed x y z. World units.

A point is in the hull if every view finds it in its mask. What is stored is not that bit but the
least, over views, of the distance to the mask's outline in that view's own plane: an
underestimate of the distance to the hull's surface (positive inside) that says within a voxel where
the surface runs. A first coarse pass keeps every voxel that could hold a part of the hull and so
finds its box; the second spends the whole grid on that box. Of the release's carving
(occ_from_sparse_initialize, switched off there) this differs by dividing by depth.

A view whose mask is empty does not carve (the object was missed, or is elsewhere) and is reported;
so is a full one. Outside a picture its border goes on: background, unless the mask touches it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from v3d_jax.ops import camera, rays
from v3d_jax.splat import silhouette

_HIGHEST = lax.Precision.HIGHEST
_HALF_DIAGONAL = 0.5 * np.sqrt(3.0)  # of a voxel


@dataclass(frozen=True)
class CarveConfig:
    """Sizes and thresholds of carving: all of them are static in the compiled program."""

    resolution: int = 128  # voxels a side
    coarse: int = 64  # voxels a side of the pass that finds the hull's box
    threshold: float = 0.5  # alpha from which a pixel is object
    tolerated: int = 0  # views that may miss a point of the hull, for frames that disagree


class Hull(NamedTuple):
    """A cubic grid around the hull; voxel (i, j, k) is centred at corner + voxel (i + 1/2, ...)."""

    distance: Float[Array, "n n n"]  # to the surface, positive inside; never overestimated
    corner: Float[Array, "3"]
    voxel: Float[Array, ""]  # edge length
    pixel: Float[Array, ""]  # of the masks, at the hull: outlines are known to half of it
    empty_masks: Bool[Array, "v"]
    full_masks: Bool[Array, "v"]


class ViewingBox(NamedTuple):
    """What cameras that look at one object see of the world."""

    centre: Float[Array, "3"]  # nearest to all optical axes
    pixel: Float[Array, ""]  # at the centre, in the view where it is largest
    inner: Float[Array, ""]  # radius of the ball that every view shows whole
    outer: Float[Array, ""]  # half side of the cube that holds what the widest view shows


def viewing_box(cameras: camera.Camera) -> ViewingBox:
    """The common viewing volume of a batch of cameras, by their optical axes and angles."""
    centres = camera.position(cameras)
    axes = cameras.world_to_camera[:, 2, :3]
    across = jnp.eye(3)[None] - axes[:, :, None] * axes[:, None, :]
    # Parallel axes meet nowhere: a small pull towards a point in front of the cameras decides.
    spread = jnp.linalg.norm(centres - centres.mean(axis=0)[None], axis=1).mean()
    pull, ahead = 1e-4, centres.mean(axis=0) + spread * axes.mean(axis=0)
    offsets = centres - ahead[None]
    right = jnp.einsum("vij,vj->i", across, offsets, precision=_HIGHEST) / len(offsets)
    left = across.mean(axis=0) + pull * jnp.eye(3)
    centre = ahead + jnp.linalg.solve(left, right)
    distance = jnp.linalg.norm(centres - centre[None], axis=1)
    size = jnp.stack([cameras.width, cameras.height], axis=1).astype(jnp.float32)
    focal = jnp.stack([cameras.intrinsics[:, 0, 0], cameras.intrinsics[:, 1, 1]], axis=1)
    slope = 0.5 * size / focal
    inner = distance * jnp.sin(jnp.arctan(slope.min(axis=1)))
    pixel = (distance / focal.min(axis=1)).max()
    return ViewingBox(centre, pixel, inner.min(), (distance * slope.max(axis=1)).max())


def hull(masks: silhouette.Alpha, cameras: camera.Camera, config: CarveConfig) -> Hull:
    """The visual hull of `masks` [v, h, w] (alpha in [0, 1], 8 bits, or booleans).

    The grid is taken one slab at a time, so memory beyond the result is that of resolution^2
    points and of one float a pixel. Without any mask that shows something the hull is empty.
    """
    shown = silhouette.to_unit(masks) >= config.threshold
    # Distances to outlines are known as far as coarse voxels need at half the usual depth.
    reach = -(-2 * max(shown.shape[1:]) // config.coarse)
    outlines = lax.map(lambda mask: silhouette.signed_distance(mask, reach), shown)
    empty, full = ~shown.any(axis=(1, 2)), shown.all(axis=(1, 2))

    def distances(resolution: int, corner: Array, voxel: Array) -> Array:
        steps = (jnp.arange(resolution) + 0.5) * voxel

        def slab(x: Array) -> Array:
            grid = jnp.meshgrid(x[None], steps, steps, indexing="ij")
            points = jnp.stack([axis.reshape(-1) for axis in grid], axis=-1) + corner[None]
            values = _distance(points, outlines, empty, cameras, config.tolerated)
            return values.reshape(resolution, resolution)

        return lax.map(slab, steps)

    box = viewing_box(cameras)
    corner, voxel = box.centre - box.outer, 2.0 * box.outer / config.coarse
    coarse = distances(config.coarse, corner, voxel) >= -_HALF_DIAGONAL * voxel - 0.5 * box.pixel
    corner, voxel = _tight_cube(coarse, corner, voxel, config.resolution)
    fine = distances(config.resolution, corner, voxel)
    return Hull(fine, corner, voxel, box.pixel, empty, full)


def inside(hull: Hull) -> Bool[Array, "n n n"]:
    """Voxels whose centre is in the hull."""
    return hull.distance >= 0.0


def cover(hull: Hull) -> Bool[Array, "n n n"]:
    """Voxels that may hold a part of the object, counting half a pixel that masks may lack."""
    return hull.distance >= -_HALF_DIAGONAL * hull.voxel - 0.5 * hull.pixel


def volume(hull: Hull) -> Float[Array, ""]:
    """World units cubed; a voxel that the surface cuts counts in part."""
    part = jnp.clip(hull.distance / hull.voxel + 0.5, 0.0, 1.0)
    return part.sum() * hull.voxel**3


def surface(hull: Hull) -> Bool[Array, "n n n"]:
    """Voxels inside that share a face with one outside, or with the end of the grid."""
    full = inside(hull)
    padded = jnp.pad(full, 1)
    closed = jnp.ones_like(full)
    for axis in range(3):
        for shift in (-1, 1):
            neighbour = jnp.roll(padded, shift, axis=axis)[1:-1, 1:-1, 1:-1]
            closed = closed & neighbour
    return full & ~closed


def usable(hull: Hull) -> Bool[Array, ""]:
    """Whether the masks say where the object is: something is left, and something was cut off."""
    return inside(hull).any() & ~hull.full_masks.all()


def see(
    view: camera.Camera, points: Float[Array, "p 3"]
) -> tuple[Float[Array, "p 2"], Float[Array, "p"], Float[Array, "p"]]:
    """Pixels, depths and ranges (distances from the camera) of points; finite at any depth."""
    rotation, offset = view.world_to_camera[:3, :3], view.world_to_camera[:3, 3]
    local = jnp.einsum("ij,pj->pi", rotation, points, precision=_HIGHEST) + offset[None]
    depth = local[:, 2]
    slope = local[:, :2] / jnp.where(depth > 0, jnp.maximum(depth, 1e-12), 1.0)[:, None]
    pixels = jnp.einsum("ij,pj->pi", view.intrinsics[:2, :2], slope, precision=_HIGHEST)
    return pixels + view.intrinsics[None, :2, 2], depth, jnp.linalg.norm(local, axis=1)


def _distance(
    points: Float[Array, "p 3"],
    outlines: Float[Array, "v h w"],
    empty: Bool[Array, "v"],
    cameras: camera.Camera,
    tolerated: int,
) -> Float[Array, "p"]:
    """The (`tolerated` + 1)-th least distance to the outlines of all views.

    s pixels in the image are at least s depth / f cos(angle from the axis) in the world, which is
    what a displacement towards the image's centre needs. A view is nowhere behind its camera.
    """

    def one(least: tuple[Array, ...], view: tuple[Array, Array, camera.Camera]) -> tuple:
        outline, skipped, lens = view
        pixels, depth, reach = see(lens, points)
        focal = jnp.maximum(lens.intrinsics[0, 0], lens.intrinsics[1, 1])
        value = rays.bilinear(outline, pixels) * depth**2 / (focal * jnp.maximum(reach, 1e-12))
        value = jnp.where(skipped, jnp.inf, jnp.where(depth > 0, value, depth))
        kept = []
        for old in least:
            kept.append(jnp.minimum(old, value))
            value = jnp.maximum(old, value)
        return tuple(kept), None

    start = tuple(jnp.full(points.shape[:1], jnp.inf) for _ in range(tolerated + 1))
    least, _ = lax.scan(one, start, (outlines, empty, cameras))
    # No view, or fewer than are tolerated: nothing is known to be there.
    return jnp.where(jnp.isinf(least[-1]), -1.0, least[-1])


def _tight_cube(
    occupied: Bool[Array, "n n n"], corner: Float[Array, "3"], voxel: Float[Array, ""], size: int
) -> tuple[Float[Array, "3"], Float[Array, ""]]:
    """Corner and voxel of a grid of `size` that holds all that is occupied, one voxel to spare."""
    low, high = [], []
    for axis in range(3):
        there = occupied.any(axis=tuple({0, 1, 2} - {axis}))
        low.append(jnp.argmax(there))
        high.append(len(there) - jnp.argmax(there[::-1]))
    first = jnp.where(occupied.any(), jnp.stack(low), 0)
    last = jnp.where(occupied.any(), jnp.stack(high), occupied.shape[0])
    side = (last - first).max() * voxel
    centre = corner + 0.5 * (first + last) * voxel
    fine = side / (size - 2)
    return centre - 0.5 * size * fine, fine
