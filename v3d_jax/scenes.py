"""Views of a place to new views of it: what `v3d_jax.sample --scene` does beside sampling."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from v3d_jax import errors
from v3d_jax.data import clips, scene_views
from v3d_jax.nn import pixelnerf
from v3d_jax.nn.generator import GeneratorConfig
from v3d_jax.ops import image
from v3d_jax.ops.camera import Camera


@dataclass(frozen=True)
class SceneArgs:
    """New views of a place, by a scene model."""

    scene: Path | None = None
    """Folder of pictures with transforms.json or a COLMAP model; one picture alone needs none."""
    path: str = "orbit"
    """Where to look from: orbit, spiral, or a transforms file of cameras (its poses count)."""
    arc: float = 60.0
    """Degrees of an orbit, negative for clockwise; a spiral goes half as far to every side."""
    fov: float = 60.0
    """Horizontal field of view in degrees of a picture that is alone and has no camera."""


class Prepared(NamedTuple):
    """What a scene model is given, and the cameras of the frames in the world of the views."""

    views: pixelnerf.Views
    targets: Camera  # [1, t], normalised
    cameras: Camera  # [n] of the n <= t frames that were asked for
    picture: UInt8[np.ndarray, "s s 4"]  # the first view
    names: tuple[str, ...]
    notes: tuple[str, ...]


def check(args: SceneArgs) -> None:
    """Raises `UserError` for settings out of range."""
    if not 0.0 < abs(args.arc) <= 360.0:
        raise errors.UserError(f"--arc {args.arc:g}: degrees up to 360 are needed, and not 0")
    if not 1.0 <= args.fov <= 170.0:
        raise errors.UserError(f"--fov {args.fov:g}: degrees from 1 to 170 are needed")


def prepare(args: SceneArgs, model: GeneratorConfig) -> Prepared:
    """Reads the views and lays the path; raises `UserError` as `data.scene_views` does.

    Frames that the path has too few cameras for repeat its last one.
    """
    assert args.scene is not None
    height, width = model.frame_size
    if height != width:
        raise errors.UserError(f"the model makes {width} x {height} frames; scenes are square")
    found = scene_views.read(args.scene, width, args.fov)
    path = scene_views.path(found, args.path, args.arc, model.num_frames)
    rest = np.repeat(path[-1:], model.num_frames - len(path), axis=0)
    every = np.concatenate([path, rest, found.world_to_camera])
    moved, _, _ = clips.normalise(every)
    frames = model.num_frames
    lens = np.broadcast_to(found.intrinsics[0], (frames, 3, 3))
    opaque = np.full((width, width, 1), 255, np.uint8)
    views = pixelnerf.Views(
        image.to_network(jnp.asarray(found.images, jnp.float32) / 255.0)[None],
        _cameras(moved[None, frames:], found.intrinsics[None], width),
        jnp.ones((1, len(found.images)), bool),
    )
    return Prepared(
        views,
        _cameras(moved[None, :frames], lens[None], width),
        _cameras(path, lens[: len(path)], width),
        np.concatenate([found.images[0], opaque], axis=-1),
        found.names,
        found.notes,
    )


def describe(args: SceneArgs, prepared: Prepared) -> dict[str, Any]:
    """The scene's entries of a report."""
    return {
        "scene": str(args.scene),
        "views": list(prepared.names),
        "path": args.path,
        "arc": args.arc if args.path in ("orbit", "spiral") else None,
    }


def _cameras(
    world_to_camera: Float[np.ndarray, "*v 4 4"], intrinsics: Float[np.ndarray, "*v 3 3"], side: int
) -> Camera:
    size = jnp.full(world_to_camera.shape[:-2], side, jnp.int32)
    return Camera(
        jnp.asarray(world_to_camera, jnp.float32), jnp.asarray(intrinsics, jnp.float32), size, size
    )
