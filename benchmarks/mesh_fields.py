"""Surfaces to compare the mesh stage's own with: the masks' hull, and the fusion of splats' depth.

Each is a `meshing.FitField`, so that extraction, simplification and colours are the same for all.

Axes: v view, h w image, n voxels a side, indexed x y z, p point. World units.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import Partial
from jaxtyping import Array, Float, Key

from v3d_jax import errors, meshing, splatting
from v3d_jax.mesh import extract
from v3d_jax.ops import camera
from v3d_jax.sdf import volume
from v3d_jax.splat import carve, rasterize

_TRUNCATION = 4.0  # voxels from the surface at which distances are cut


def hull(resolution: int) -> meshing.FitField:
    """The visual hull of the frames' masks, on a grid of `resolution` voxels a side."""

    def fit(
        frames: splatting.Frames, key: Key[Array, ""], seconds: dict[str, float]
    ) -> meshing.Field:
        return _field(_carved(frames, resolution))

    return fit


def fused(args: splatting.SplatArgs, resolution: int, seed: int) -> meshing.FitField:
    """Gaussians fitted to the frames, and their depth in the places of the frames, fused.

    A voxel's distance is the mean, over the views that see it or see it less than the truncation
    behind the surface, of its distance to the depth along the optical axis (Curless and Levoy
    1996, all weights 1). Background is free space, and what no view reaches lies inside.
    """

    def fit(
        frames: splatting.Frames, key: Key[Array, ""], seconds: dict[str, float]
    ) -> meshing.Field:
        found = splatting.reconstruct(args, frames, seed, seconds)
        height, width = frames.images.shape[1:3]
        raster = rasterize.RasterConfig(width=width, height=height)
        alphas, depths = [], []
        for view in range(len(frames.images)):
            lens = camera.Camera(*(part[view : view + 1] for part in frames.cameras))
            drawn, raster = rasterize.rasterize_growing(found.gaussians, lens, raster)
            alphas.append(drawn.alpha[0])
            depths.append(drawn.depth[0])
        depth = jnp.where(jnp.stack(alphas) >= 0.5, jnp.stack(depths), jnp.inf)
        box = _carved(frames, resolution)
        values = _integrate(resolution, box.corner, box.voxel, depth, frames.cameras)
        return _field(box._replace(distance=-values))

    return fit


def _carved(frames: splatting.Frames, resolution: int) -> volume.Volume:
    config = carve.CarveConfig(resolution=resolution)
    made = _hull(jnp.asarray(splatting.masks(frames)), frames.cameras, config)
    if not bool(carve.usable(made)):
        raise errors.UserError("the masks have no common hull")
    return volume.Volume(made.distance, made.corner, made.voxel)


_hull = jax.jit(carve.hull, static_argnums=2)


def _field(solid: volume.Volume) -> meshing.Field:
    side = float(solid.voxel) * solid.distance.shape[0]
    box = extract.Box(np.asarray(solid.corner), side)
    return meshing.Field(Partial(_read, solid), box, {})


def _read(solid: volume.Volume, points: Float[Array, "p 3"]) -> Float[Array, "p"]:
    return volume.sample(solid, -solid.distance, points)


@partial(jax.jit, static_argnums=0)
def _integrate(
    resolution: int,
    corner: Float[Array, "3"],
    voxel: Float[Array, ""],
    depths: Float[Array, "v h w"],
    cameras: camera.Camera,
) -> Float[Array, "n n n"]:
    """Truncated distances, negative inside, a slab at a time; a depth of inf is background."""
    steps = (jnp.arange(resolution) + 0.5) * voxel
    most = _TRUNCATION * voxel

    def slab(x: Array) -> Array:
        grid = jnp.meshgrid(x[None], steps, steps, indexing="ij")
        points = jnp.stack([axis.reshape(-1) for axis in grid], axis=-1) + corner[None]

        def add(sums: tuple[Array, Array], view: tuple[Array, camera.Camera]) -> tuple:
            picture, lens = view
            pixels, depth, _ = carve.see(lens, points)
            height, width = picture.shape
            index = jnp.floor(pixels).astype(jnp.int32)
            column, row = jnp.clip(index[:, 0], 0, width - 1), jnp.clip(index[:, 1], 0, height - 1)
            within = (index[:, 0] == column) & (index[:, 1] == row) & (depth > 0)
            shown = jnp.where(within, picture[row, column], jnp.inf)
            distance = jnp.minimum(shown - depth, most)
            known = distance > -most
            total, count = sums
            return (total + jnp.where(known, distance, 0.0), count + known), None

        zero = jnp.zeros(len(points))
        (total, count), _ = lax.scan(add, (zero, zero), (depths, cameras))
        mean = jnp.where(count > 0, total / jnp.maximum(count, 1.0), -most)
        return mean.reshape(resolution, resolution)

    return lax.map(slab, steps)
