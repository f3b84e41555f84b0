"""Posed frames to a signed distance field from the host: hull, fit, with progress shown.

The fit works in a box around the object, [-1, 1]^3 in its own units, so that grids and rates suit
objects of any size and place; `sdf` of a `Surface` is in the frames' world.

Axes: v view, h w image, n point.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, Key

from v3d_jax import console, errors, splatting
from v3d_jax.nn import lpips
from v3d_jax.ops import camera
from v3d_jax.sdf import field, fit, losses, targets, volume
from v3d_jax.splat import carve
from v3d_jax.splatting import Frames

STAGES = ("hull", "surface")  # names of the times spent
_PRESETS = {"v3d": fit.V3D, "preview": fit.PREVIEW}
_CHUNKS = 20  # of a fit: how often progress is told
_ROOM = 1.15  # of the box's side over the hull's, which frames that disagree cut too small


@dataclasses.dataclass(frozen=True)
class SurfaceArgs:
    """Settings of the surface that a command line offers."""

    surface: Literal["auto", "v3d", "preview"] = "auto"
    """Recipe: V3D's, or a small one; auto: preview on a CPU."""
    surface_steps: int | None = None
    """Steps of the surface's fit, instead of the recipe's own."""


class Place(NamedTuple):
    """The cube of the world that the fit's box is."""

    centre: Float[Array, "3"]
    scale: Float[Array, ""]  # half side

    @property
    def corner(self) -> Float[Array, "3"]:
        """The lowest."""
        return self.centre - self.scale[None]

    @property
    def side(self) -> Float[Array, ""]:
        """Length of an edge."""
        return 2.0 * self.scale


class Surface(NamedTuple):
    """A fitted field, where it lies, and the report's entry.

    `sdf` is a function and its arrays in one: jitted programs take it as an argument and are
    compiled once for all fields of the same sizes.
    """

    config: field.FieldConfig
    params: field.Field
    place: Place
    report: dict[str, Any]

    @property
    def sdf(self) -> Partial:
        """Signed distances of points [n, 3] of the world, negative inside."""
        return Partial(_sdf_of(self.config), self.params, self.place)


def check(args: SurfaceArgs) -> None:
    """Raises `UserError` for settings out of range."""
    if args.surface_steps is not None and args.surface_steps < 1:
        raise errors.UserError(f"--surface-steps {args.surface_steps}: at least 1 is needed")


def configure(args: SurfaceArgs) -> fit.FitConfig:
    """The recipe with the command line's settings put in."""
    automatic = "preview" if jax.default_backend() == "cpu" else "v3d"
    config = _PRESETS[automatic if args.surface == "auto" else args.surface]
    if args.surface_steps is not None:
        config = dataclasses.replace(config, steps=args.surface_steps)
    return config


def reconstruct(
    args: SurfaceArgs, frames: Frames, key: Key[Array, ""], seconds: dict[str, float]
) -> Surface:
    """Fits a field to frames; adds the stages' times to `seconds`, compilation included.

    Raises `UserError` where the frames show nothing or where what is fitted has no surface.
    """
    config = configure(args)
    if frames.alpha is None:
        # Pixels at outlines are mixed with it.
        config = dataclasses.replace(config, background="white")
    network, params = _perceptual(config)
    pictures, masks = jnp.asarray(frames.images), jnp.asarray(splatting.masks(frames))
    with console.progress(seconds, "hull", 1) as bar:
        tolerated = min(frames.tolerated, len(frames.images) - 1)
        told = carve.CarveConfig(resolution=config.render.occupancy, tolerated=tolerated)
        solid, place, carved = jax.block_until_ready(_hull(told, masks, frames.cameras))
        bar.update()
    if not bool(carved):
        console.note("the masks have no common hull: the surface starts as a sphere")
    seen = targets.Targets(pictures, masks, _into(place, frames.cameras))
    with console.progress(seconds, "surface", config.steps) as bar:

        def progress(done: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update(done - bar.n)

        state = fit.run(
            config,
            seen,
            key,
            solid=solid,
            perceptual=network,
            params=params,
            chunk=max(1, config.steps // _CHUNKS),
            progress=progress,
        )
    report = {
        "fit": dataclasses.asdict(config),
        "carved": bool(carved),
        "centre": np.asarray(place.centre).tolist(),
        "half_side": float(place.scale),
        "sharpness": float(field.inv_s(state.parameters)),
    }
    return Surface(config.field, state.parameters, place, report)


# The same object for the same settings, or every field would be a new function to jit.
@functools.cache
def _sdf_of(config: field.FieldConfig) -> Callable[..., Array]:
    return functools.partial(_sdf, config)


def _sdf(
    config: field.FieldConfig, params: field.Field, place: Place, points: Float[Array, "n 3"]
) -> Float[Array, "n"]:
    return place.scale * field.sdf(config, params, _inside(place, points))


def _inside(place: Place, points: Float[Array, "n 3"]) -> Float[Array, "n 3"]:
    return (points - place.centre[None]) / place.scale


def _into(place: Place, cameras: camera.Camera) -> camera.Camera:
    """Cameras that see in the box's units what the given ones see in the world."""
    pose = cameras.world_to_camera
    moved = jnp.einsum(
        "vij,j->vi", pose[:, :3, :3], place.centre, precision=jax.lax.Precision.HIGHEST
    )
    offset = (pose[:, :3, 3] + moved) / place.scale
    return cameras._replace(world_to_camera=pose.at[:, :3, 3].set(offset))


def _carved(
    config: carve.CarveConfig, masks: Array, cameras: camera.Camera
) -> tuple[volume.Volume, Place, Array]:
    """The hull in the box's units, the box, and whether the masks were worth anything."""
    hull = carve.hull(masks, cameras, config)
    usable = carve.usable(hull)
    low, high = _bounds(carve.cover(hull))
    box = carve.viewing_box(cameras)
    scale = jnp.where(usable, 0.5 * _ROOM * hull.voxel * (high - low).max(), box.inner)
    middle = hull.corner + 0.5 * hull.voxel * (low + high)
    centre = jnp.where(usable, middle, box.centre)
    # Without a hull nothing is inside, and the fit starts as a sphere.
    distance = jnp.where(usable, hull.distance, -1.0) / scale
    corner = (hull.corner - centre) / scale
    return volume.Volume(distance, corner, hull.voxel / scale), Place(centre, scale), usable


def _bounds(occupied: Bool[Array, "n n n"]) -> tuple[Int[Array, "3"], Int[Array, "3"]]:
    """First and one past the last occupied voxel along each axis."""
    there = [occupied.any(axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
    low = jnp.stack([jnp.argmax(one) for one in there])
    high = jnp.stack([len(one) - jnp.argmax(one[::-1]) for one in there])
    return low, high


_hull = jax.jit(_carved, static_argnums=0)


def _perceptual(config: fit.FitConfig) -> tuple[losses.Perceptual | None, Any]:
    """LPIPS and its parameters where the fit asks for it and they are there."""
    if not config.loss.lpips:
        return None, None
    params = splatting.load_lpips("vgg", "the surface's fit has no perceptual term")
    return (None, None) if params is None else (lpips.distance, params)
