"""Pictures of a place with their cameras, and the path that new views of it are asked along.

Axes: v view, t frame, s side. Poses are world-to-camera with OpenCV axes, in the world of the
user's file, in numpy's float64. What is wrong with a user's files is a `UserError` of one line.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from v3d_jax.data import clips, colmap, paths, picture, poses, transforms, views
from v3d_jax.errors import UserError

# Views that are used: more would hardly show more, and each takes memory.
MOST = 8
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_STANDING = 1e-6  # of the scene's size, that a path must be longer than
_NEEDED = "give transforms.json or a COLMAP model beside them"


class SceneViews(NamedTuple):
    """Square pictures of one size, the first of them the one that paths begin at."""

    images: UInt8[np.ndarray, "v s s 3"]  # on white where the pictures are transparent
    world_to_camera: Float[np.ndarray, "v 4 4"]
    intrinsics: Float[np.ndarray, "v 3 3"]  # pixels of `images`
    names: tuple[str, ...]
    notes: tuple[str, ...]


def read(source: str | os.PathLike, side: int, fov: float) -> SceneViews:
    """The views in a folder, their middle squares at `side` pixels.

    Of more than `MOST` views so many are taken, evenly, the first of them always. A picture that is
    alone needs no camera: its field of view is `fov` degrees across, and it looks at the origin
    from 2 along x, with z up. Raises `UserError` for what the readers of cameras and pictures
    refuse, for pictures without cameras, and for views of which one shares nothing with the others.
    """
    posed, notes = _posed(Path(source), fov)
    if len(posed) > MOST:
        notes.append(f"{MOST} of {len(posed)} views are used, evenly")
        posed = [posed[i] for i in np.linspace(0, len(posed) - 1, MOST).round().astype(int)]
    cuts = []
    for view in posed:
        rgb, alpha, remarks = views.pixels(view)
        notes.extend(remarks)
        if alpha is not None:
            rgb = (views.on_white(rgb[None], alpha[None])[0] * 255.0 + 0.5).astype(np.uint8)
        cuts.append(clips.cut(rgb, None, view.intrinsics, _square(view.size), side))
    if len({view.size[0] / view.size[1] for view in posed} - {1.0}):
        notes.append("the middle squares of the pictures are used")
    found = SceneViews(
        np.stack([one.rgb for one in cuts]),
        np.stack([view.world_to_camera for view in posed]),
        np.stack([one.intrinsics for one in cuts]),
        tuple(view.name for view in posed),
        tuple(dict.fromkeys(notes)),
    )
    _check_shared(found, source)
    return found


def path(found: SceneViews, asked: str, degrees: float, frames: int) -> Float[np.ndarray, "t 4 4"]:
    """The cameras of a path that begins at the first view.

    "orbit" is an arc of so many `degrees`, "spiral" goes round the first view up to half as many
    away from it, both of `frames` cameras about what the views look at. Otherwise `asked` is a
    transforms file: the first view's camera and then the file's, `frames` at most. Raises
    `UserError` for a file that cannot be read, that holds more, and for a path that stands still
    or of which no camera sees what the views show.
    """
    first = found.world_to_camera[0]
    pivot, up = _pivot(found.world_to_camera), -found.world_to_camera[:, 1, :3].mean(axis=0)
    if asked == "orbit":
        return paths.orbit(first, pivot, up, degrees, frames)
    if asked == "spiral":
        return paths.spiral(first, pivot, 0.5 * degrees, 2.0, frames)
    file = Path(asked)
    if not file.is_file():
        raise UserError(f"--path {asked} is no file: give orbit, spiral or a file of cameras")
    given = transforms.read_poses(file)
    if len(given) > frames - 1:
        raise UserError(
            f"{file} has {len(given)} cameras and the model makes {frames - 1} new views at once: "
            "take some out"
        )
    whole = np.concatenate([first[None], given])
    places = paths.centres(np.concatenate([whole, found.world_to_camera]))
    if np.ptp(places, axis=0).max() <= _STANDING * max(1.0, np.abs(places).max()):
        raise UserError(f"{file}: all cameras are where the view is: give a path that moves")
    lens = _lens(found)
    if not any(paths.seen(pose, found.world_to_camera, lens).any() for pose in given):
        raise UserError(
            f"{file}: none of its cameras sees anything of what the views show: give cameras in "
            "the world of the views"
        )
    return whole


def _posed(source: Path, fov: float) -> tuple[list[poses.Posed], list[str]]:
    """Views with their cameras, in the order of their file, and remarks."""
    if not source.exists():
        raise UserError(f"{source} does not exist: give a folder of views")
    if source.is_file():
        return _alone(source, fov)
    if (file := transforms.find(source)) is not None:
        posed, notes = transforms.read(file, fov=fov)
        return posed, list(notes)
    if (model := colmap.find(source)) is not None:
        return colmap.read(model, cloud=False)[0], []
    files = sorted(p for p in source.iterdir() if p.suffix.lower() in PICTURES)
    if not files:
        raise UserError(f"{source} holds no pictures with cameras: {_NEEDED}")
    if len(files) > 1:
        raise UserError(f"{source} holds {len(files)} pictures without cameras: {_NEEDED}")
    return _alone(files[0], fov)


def _alone(file: Path, fov: float) -> tuple[list[poses.Posed], list[str]]:
    """A picture of which nothing is known."""
    rgb, _, _ = picture.read(file, as_stored=True)
    height, width = rgb.shape[:2]
    focal = 0.5 * width / np.tan(0.5 * np.deg2rad(fov))
    intrinsics = poses.pinhole((focal, focal), (0.5 * width, 0.5 * height), str(file))
    pose = paths.look_at(np.asarray([2.0, 0.0, 0.0]), np.zeros(3))
    note = f"{file} has no camera: a field of view of {fov:g} degrees is taken (--fov)"
    return [poses.Posed(file.name, file, None, pose, intrinsics, (width, height))], [note]


def _square(size: tuple[int, int]) -> tuple[int, int, int, int]:
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return left, top, left + side, top + side


def _lens(found: SceneViews) -> paths.Lens:
    side = found.images.shape[1]
    return paths.Lens(found.intrinsics[0], (side, side))


def _check_shared(found: SceneViews, source: str | os.PathLike) -> None:
    everyone = found.world_to_camera
    for number, pose in enumerate(everyone[: len(everyone) if len(everyone) > 1 else 0]):
        others = np.delete(everyone, number, axis=0)
        if not paths.seen(pose, others, _lens(found)).any():
            raise UserError(
                f"{source}: {found.names[number]} sees nothing that another view sees, the cameras "
                "look away from each other: give views of one place"
            )


def _pivot(world_to_camera: Float[np.ndarray, "v 4 4"]) -> Float[np.ndarray, "3"]:
    """What the cameras look at, or a point ahead of the first one."""
    common = paths.common_point(world_to_camera)
    if common is not None:
        return common
    first, places = world_to_camera[0], paths.centres(world_to_camera)
    forward, reach = first[2, :3], np.linalg.norm(places - places[0], axis=-1).max()
    # Of a lone camera that looks about at the world's origin: there; the scale is open otherwise.
    depth = float(-forward @ places[0])
    beside = np.linalg.norm(places[0] + depth * forward)
    if reach > 0.0 or depth <= 0.0 or beside > 0.5 * depth:
        depth = 2.0 * reach if reach > 0.0 else 1.0
    return places[0] + depth * forward
