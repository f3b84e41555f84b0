"""Posed views, the input of reconstruction, from whatever holds them.

- a folder that `python -m v3d_jax.sample` wrote, and every other folder with transforms.json or
  transforms_train.json (instant-ngp, nerfstudio, NeRF-synthetic), or such a file: `transforms`
- an mp4, taken for V3D's orbit: its frames at equal azimuths, radius 2, field of view 60 degrees
- a folder with a COLMAP model: `colmap`

Axes: v view, h w image. The world is the file's own, so that results lie where its other contents
do: z up in the first two, unknown in COLMAP's. Cameras are OpenCV's, as `ops.camera` says.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from v3d_jax.data import colmap, distortion, picture, poses, transforms, video
from v3d_jax.errors import UserError
from v3d_jax.ops import camera

MAX_SIDE = 1600  # as the reference 3DGS: more detail than its Gaussians hold
MAX_VIEWS = 2000
_PANE, _EVEN = 26, 13  # alpha of a translucent region at least, and how much it changes at most
_KINDS = (
    "a folder with transforms.json or a COLMAP model, a transforms file, or the mp4 of an orbit"
)


class Views(NamedTuple):
    """Pictures of one size with their cameras, and remarks for the user."""

    images: UInt8[np.ndarray, "v h w 3"]  # straight colours, sRGB as displayed
    alpha: UInt8[np.ndarray, "v h w"] | None  # None where every view is opaque
    cameras: camera.Camera  # float32, a batch of v; pixels are those of `images`
    names: tuple[str, ...]
    points: colmap.Points | None  # COLMAP's sparse cloud
    notes: tuple[str, ...]


def read(source: str | os.PathLike, *, max_side: int = MAX_SIDE) -> Views:
    """The views in `source`; pictures longer than `max_side` are shrunk, intrinsics with them.

    Masks named by the source count as alpha, and pictures are as pinhole cameras see them: those
    of a lens with distortion are straightened. Raises `UserError` for a source that is missing,
    unknown or damaged, for lenses that are not read, for pictures of different sizes, and for
    views that hold no parallax: a single one, or all alike.
    """
    path = Path(source)
    if path.is_dir():
        if (file := transforms.find(path)) is not None:
            return _from_files(*transforms.read(file), file, None, max_side)
        if (model := colmap.find(path)) is not None:
            views, points = colmap.read(model)
            return _from_files(views, (), model, points, max_side)
        hint = "".join(f" (or {clip}?)" for clip in sorted(path.glob("*.mp4"))[:1])
        raise UserError(f"{path} holds no posed views: give {_KINDS}{hint}")
    if not path.exists():
        raise UserError(f"{path} does not exist: give {_KINDS}")
    if path.suffix.lower() == ".json":
        return _from_files(*transforms.read(path), path, None, max_side)
    if path.suffix.lower() in video.SUFFIXES:
        return _from_video(path, max_side)
    raise UserError(f"{path} is not one of the kinds that are read: give {_KINDS}")


def on_white(
    images: UInt8[np.ndarray, "v h w 3"], alpha: UInt8[np.ndarray, "v h w"] | None
) -> Float[np.ndarray, "v h w 3"]:
    """Straight images in [0, 1], float32, composited on white where there is alpha."""
    pictures = images.astype(np.float32) / np.float32(255.0)
    if alpha is None:
        return pictures
    opacity = alpha[..., None].astype(np.float32) / np.float32(255.0)
    return pictures * opacity + (np.float32(1.0) - opacity)


def opaque(
    images: UInt8[np.ndarray, "v h w 3"], alpha: UInt8[np.ndarray, "v h w"]
) -> tuple[UInt8[np.ndarray, "v h w 3"], UInt8[np.ndarray, "v h w"]]:
    """Straight images whose translucent regions have become solid, as they look on white.

    A surface is there or not: an outline's alpha tells where it passes, but a pane's, the same all
    over, would ask for half a surface. A pixel is in such a region if alpha hardly changes around.
    """
    padded = np.pad(alpha, ((0, 0), (1, 1), (1, 1)), mode="edge")
    least, most = alpha, alpha
    height, width = alpha.shape[1:]
    for y, x in np.ndindex(3, 3):
        shifted = padded[:, y : y + height, x : x + width]
        least, most = np.minimum(least, shifted), np.maximum(most, shifted)
    pane = (least >= _PANE) & (alpha < 255) & (most - least <= _EVEN)
    images = np.array(images)
    shown = on_white(images[pane][None, None], alpha[pane][None, None])[0, 0]
    images[pane] = (shown * 255.0 + 0.5).astype(np.uint8)
    return images, np.where(pane, np.uint8(255), alpha)


def pixels(view: poses.Posed, told: str = "its camera is for") -> picture.Picture:
    """The picture of a view at its stored size, straightened, its mask put into alpha.

    `told` says in messages where the view's size is from. Raises `UserError` for a picture or
    mask that cannot be read or is of another size.
    """
    rgb, alpha, notes = picture.read(view.image, as_stored=True)
    height, width = rgb.shape[:2]
    if (width, height) != view.size:
        raise UserError(
            f"{view.image} is {width} x {height} but {told} {view.size[0]} x {view.size[1]}: give "
            "the pictures that the cameras were made for"
        )
    if view.mask is not None:
        mask = picture.read(view.mask, as_stored=True).rgb.max(axis=-1)
        if mask.shape != (height, width):
            raise UserError(
                f"{view.mask} is {mask.shape[1]} x {mask.shape[0]} but its picture {width} x "
                f"{height}: give masks of the pictures' size"
            )
        alpha = mask if alpha is None else np.minimum(alpha, mask)
    if view.lens is not None:
        layers = rgb if alpha is None else np.concatenate([rgb, alpha[..., None]], axis=-1)
        layers = distortion.straightened(view.lens, layers)
        rgb, alpha = layers[..., :3], None if alpha is None else layers[..., 3]
    return picture.Picture(rgb, alpha, notes)


def _from_files(
    posed: list[poses.Posed],
    remarks: tuple[str, ...],
    origin: Path,
    points: colmap.Points | None,
    max_side: int,
) -> Views:
    """Views whose pictures are files of their own; `origin` is the source in messages."""
    _check_poses(posed, origin)
    width, height = posed[0].size
    for view in posed:
        if view.size != (width, height):
            raise UserError(
                f"{origin}: {view.name} is {view.size[0]} x {view.size[1]} and {posed[0].name} "
                f"{width} x {height}: give pictures of one size"
            )
    notes = list(remarks)
    if any(view.lens is not None for view in posed):
        notes.append("pictures are straightened by what the file says of their lens")
    images, alpha = _stack((_read_files(view, notes) for view in posed), len(posed), max_side)
    _check_images(images, alpha, origin)
    scale = np.asarray([[images.shape[2] / width], [images.shape[1] / height], [1.0]])
    if scale.min() < 1.0:
        notes.append(f"pictures shrunk from {width} x {height} to {_shape(images)}")
    size = np.ones(len(posed), np.int32)
    cameras = camera.Camera(
        jnp.asarray(np.stack([view.world_to_camera for view in posed]), jnp.float32),
        jnp.asarray(np.stack([view.intrinsics * scale for view in posed]), jnp.float32),
        jnp.asarray(size * images.shape[2]),
        jnp.asarray(size * images.shape[1]),
    )
    names = tuple(view.name for view in posed)
    return Views(images, alpha, cameras, names, points, tuple(dict.fromkeys(notes)))


def _from_video(path: Path, max_side: int) -> Views:
    """An orbit with V3D's cameras, frame 0 at azimuth 0."""
    frames: list[np.ndarray] = []
    notes: list[str] = []
    for frame in video.frames(path):
        if len(frames) == MAX_VIEWS:
            raise UserError(f"{path} has over {MAX_VIEWS} frames: cut it down to one turn")
        small = picture.shrunk(Image.fromarray(frame), max_side)
        if small.size != frame.shape[1::-1]:
            notes.append(f"frames shrunk from {frame.shape[1]} x {frame.shape[0]}")
        frames.append(np.asarray(small))
    if len(frames) < 2:
        raise UserError(f"{path} has {len(frames)} frames: one whole turn is needed, 18 are usual")
    images = np.stack(frames)
    _check_images(images, None, path)
    cameras = camera.orbit(len(images), width=images.shape[2], height=images.shape[1])
    names = tuple(f"{index:03d}" for index in range(len(images)))
    notes.append(f"{path} is taken for one turn at radius 2, elevation 0, field of view 60 degrees")
    return Views(images, None, cameras, names, None, tuple(dict.fromkeys(notes)))


def _read_files(view: poses.Posed, notes: list[str]) -> Image.Image:
    """One view as RGBA at its stored size."""
    rgb, alpha, remarks = pixels(view)
    notes.extend(remarks)
    alpha = np.full(rgb.shape[:2], 255, np.uint8) if alpha is None else alpha
    return Image.fromarray(np.concatenate([rgb, alpha[..., None]], axis=-1))


def _stack(
    pictures: Iterator[Image.Image], count: int, max_side: int
) -> tuple[UInt8[np.ndarray, "v h w 3"], UInt8[np.ndarray, "v h w"] | None]:
    """All pictures in one array, each shrunk as it comes, and their alpha if any has some."""
    images = alpha = None
    for index, whole in enumerate(pictures):
        pixels = np.asarray(picture.shrunk(whole, max_side))
        if images is None or alpha is None:
            images = np.empty((count, *pixels.shape[:2], 3), np.uint8)
            alpha = np.empty((count, *pixels.shape[:2]), np.uint8)
        images[index], alpha[index] = pixels[..., :3], pixels[..., 3]
    assert images is not None
    assert alpha is not None
    return images, None if alpha.min() == 255 else alpha


def _check_poses(posed: list[poses.Posed], origin: Path) -> None:
    if len(posed) < 2:
        raise UserError(f"{origin} holds {len(posed)} view: at least two are needed")
    if len(posed) > MAX_VIEWS:
        raise UserError(f"{origin} holds over {MAX_VIEWS} views: take some out")
    centres = np.stack([poses.inverse(view.world_to_camera)[:3, 3] for view in posed])
    if np.ptp(centres, axis=0).max() <= 1e-6 * max(1.0, np.abs(centres).max()):
        raise UserError(
            f"{origin}: all {len(posed)} cameras are at the same place, which shows no depth: give "
            "views from different places"
        )


def _check_images(
    images: UInt8[np.ndarray, "v h w 3"], alpha: UInt8[np.ndarray, "v h w"] | None, origin: Path
) -> None:
    if alpha is not None and alpha.max() == 0:
        raise UserError(f"{origin}: every view is transparent everywhere: there is no object")
    if all((image == images[0]).all() for image in images[1:]) and (
        alpha is None or (alpha == alpha[0]).all()
    ):
        raise UserError(
            f"{origin}: all {len(images)} pictures are identical: give views of the object from "
            "different sides"
        )


def _shape(images: UInt8[np.ndarray, "v h w 3"]) -> str:
    return f"{images.shape[2]} x {images.shape[1]}"
