"""Which views are of a scene instead of an object, and where the fit of a scene starts.

Axes: v view, h w image, p point.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, UInt8

from v3d_jax import errors
from v3d_jax.data import colmap
from v3d_jax.ops import camera
from v3d_jax.splat import fit, scene, start, sweep
from v3d_jax.splat.gaussians import Gaussians

Kind = Literal["object", "unbounded"]
_WHITE = 242  # of 255, in every channel: as `silhouette.from_white` has it
_PLAIN = 0.5  # share of a picture's border that is white where an object stands on white
_SHARED = 0.02  # share of rays that another view must look across


class Scene(NamedTuple):
    """What is known of a scene besides its pictures."""

    points: colmap.Points | None = None  # a sparse cloud, world units
    background: Literal["black", "white", "random"] = "black"  # behind all Gaussians


class Begun(NamedTuple):
    """A scene's frame, its cameras there, and the Gaussians that its fit starts from."""

    place: scene.Frame
    cameras: camera.Camera
    gaussians: Gaussians
    given: int  # Gaussians on points that were given

    def inside(self, cameras: camera.Camera) -> camera.Camera:
        """Other cameras of the world in the frame."""
        return scene.cameras_inside(self.place, cameras)


def kind(images: UInt8[np.ndarray, "v h w 3"], alpha: UInt8[np.ndarray, "v h w"] | None) -> Kind:
    """What pictures are of: an object where there is alpha or most borders are white.

    A background of another colour, be it plain, is a part of the scene.
    """
    if alpha is not None:
        return "object"
    white = (images >= _WHITE).all(axis=-1)
    border = np.concatenate(
        [white[:, 0], white[:, -1], white[:, 1:-1, 0], white[:, 1:-1, -1]], axis=1
    )
    return "object" if np.median(border.mean(axis=1)) >= _PLAIN else "unbounded"


def begin(
    config: fit.FitConfig,
    images: UInt8[np.ndarray, "v h w 3"],
    cameras: camera.Camera,
    points: colmap.Points | None,
    key: Key[Array, ""],
) -> Begun:
    """Gaussians on the points that are given, and for the rest of the budget on swept ones.

    Given points beyond the far shell are left out. Raises `UserError` where no two views look at
    the same place.
    """
    place = scene.frame(cameras)
    if not float(place.size) > 0.0:
        raise errors.UserError("all cameras are at the same place, which shows no depth")
    inside, settings = scene.cameras_inside(place, cameras), sweep.SweepConfig()
    choose_key, sweep_key = jax.random.split(key)
    most = config.count - max(1, settings.on_shell(config.count))
    known = _given(place, points, most, choose_key)
    missing = config.count - len(known[0])
    # The shell's number is that of the whole budget.
    shell = settings.on_shell(config.count) / missing
    settings = dataclasses.replace(settings, shell=shell)
    swept = _sweep(sweep_key, jnp.asarray(images), inside, missing, settings)
    asked = missing - settings.on_shell(missing)
    if asked and float(swept.shared.sum()) < _SHARED * asked:
        raise errors.UserError(
            "no two cameras look at the same place, which shows no depth: give views that overlap"
        )
    positions = jnp.concatenate([known[0], swept.positions])
    colors = jnp.concatenate([known[1], swept.colors])
    gaussians = _from_points(
        positions, colors, degree=config.degree, opacity=config.opacity, scale=config.scale
    )
    return Begun(place, inside, jax.block_until_ready(gaussians), len(known[0]))


def _given(
    place: scene.Frame, points: colmap.Points | None, most: int, key: Key[Array, ""]
) -> tuple[Array, Array]:
    """Positions in the frame and colours of at most so many of the points, drawn evenly."""
    if points is None:
        return jnp.zeros((0, 3)), jnp.zeros((0, 3))
    positions = scene.points_inside(place, jnp.asarray(points.positions))
    near = np.asarray(jnp.linalg.norm(positions, axis=1)) <= sweep.SweepConfig().far
    order = np.asarray(jax.random.permutation(key, len(near)))
    chosen = order[near[order]][:most]
    return positions[chosen], jnp.asarray(points.colours[chosen], jnp.float32) / 255.0


_sweep = jax.jit(sweep.points, static_argnums=(3, 4))
_from_points = jax.jit(start.from_points, static_argnames=("degree", "opacity", "scale"))
