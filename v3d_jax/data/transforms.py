"""Cameras in transforms.json, as instant-ngp, nerfstudio and NeRF-synthetic write it.

A frame's own entries go before those of the whole file. Poses are camera-to-world with OpenGL axes
(x right, y up, z backward), the world has z up; what becomes of them is `poses.Posed`. Formats:
docs.nerf.studio/quickstart/data_conventions.html, instant-ngp's docs/nerf_dataset_tips.md, and the
scenes of NeRF (arXiv 2003.08934), where paths have no extension and colours are straight RGBA.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from v3d_jax.data import distortion, poses
from v3d_jax.errors import UserError

FILES = ("transforms.json", "transforms_train.json")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".PNG", ".JPG", ".JPEG")
_BROWN = ("k1", "k2", "k3", "p1", "p2")
# The numbers of distortion that a model has; of the others nothing is known.
_MODELS = {
    **dict.fromkeys(("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL"), _BROWN),
    "FULL_OPENCV": (*_BROWN, "k4", "k5", "k6"),
    "OPENCV_FISHEYE": ("k1", "k2", "k3", "k4"),
}
_NUMBERS = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")
_FLIP = np.diag([1.0, -1.0, -1.0, 1.0])


def find(folder: Path) -> Path | None:
    """The file of cameras in a folder, if there is one."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def read(path: Path, *, fov: float | None = None) -> tuple[list[poses.Posed], tuple[str, ...]]:
    """The views of a file in its order, and a remark if pictures do not exist: these are left out.

    With `fov`, a horizontal field of view in degrees, a single view may lack its focal length.
    Raises `UserError` for what is not JSON, lacks entries, or names pictures of which most do not
    exist or one has another size, for lenses that are not read, and for cameras that are no rigid
    motion.
    """
    content = _load(path)
    frames = content.get("frames")
    if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
        raise UserError(
            f'{path} has no list "frames" of cameras: give a file as instant-ngp or nerfstudio '
            "write it"
        )
    if not frames:
        raise UserError(f"{path} holds no frames: at least two views are needed")
    images = [_image(path, index, frame) for index, frame in enumerate(frames)]
    missing, notes = [name for name, image in images if image is None], ()
    if missing:
        told = f"{path} names {len(missing)} of {len(frames)} pictures that do not exist"
        if 2 * len(missing) > len(frames):
            raise UserError(
                f"{told}, the first is {missing[0]}: put them there or take them out of the file"
            )
        notes = (f"{told}, the first is {missing[0]}: they are left out",)
    views = []
    for frame, (name, image) in zip(frames, images, strict=True):
        if image is None:
            continue
        where = f"{path}: frame {name}"
        size, entries = _size(image), {**content, **frame}
        if fov is not None and len(frames) == 1 and not _has_focal(entries):
            entries["camera_angle_x"] = math.radians(fov)
            told = f"{path} has no focal length: a field of view of {fov:g} degrees is taken"
            notes = (*notes, told)
        intrinsics, lens = distortion.pinhole_and_lens(
            _intrinsics(entries, size, where),
            _distortion(entries, where),
            size,
            where,
            fisheye=_model(entries) == "OPENCV_FISHEYE",
        )
        mask, pose = _mask(path, where, frame), _pose(frame, where)
        views.append(poses.Posed(name, image, mask, pose, intrinsics, size, lens))
    return views, notes


def read_poses(path: Path) -> Float[np.ndarray, "t 4 4"]:
    """The world-to-camera matrices of a file of cameras, whose pictures need not exist.

    Raises `UserError` for what is not JSON, has no frames, and for cameras that are no rigid
    motion.
    """
    frames = _load(path).get("frames")
    if not isinstance(frames, list) or not frames:
        raise UserError(f'{path} has no list "frames" of cameras: give at least one camera')
    if not all(isinstance(frame, dict) for frame in frames):
        raise UserError(f'{path}: "frames" holds what is no object with a "transform_matrix"')
    return np.stack([_pose(frame, f"{path}: frame {i}") for i, frame in enumerate(frames)])


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict):
        raise UserError(f'{path} holds no JSON object: an object with "frames" is needed')
    return content


def _image(path: Path, index: int, frame: dict[str, Any]) -> tuple[str, Path | None]:
    """A frame's name in the file, and its picture if there is one."""
    name = frame.get("file_path")
    if not isinstance(name, str) or not name:
        raise UserError(f'{path}: frame {index} has no "file_path": name its picture there')
    # colmap2nerf on Windows writes backslashes, which are names of their own elsewhere.
    for spelling in dict.fromkeys((name, name.replace("\\", "/"))):
        stem = path.parent / spelling
        # Of NeRF-synthetic's r_0 only the stem is given; "a.b" has no extension either.
        for candidate in (stem, *(stem.with_name(stem.name + suffix) for suffix in _SUFFIXES)):
            if candidate.is_file():
                return name, candidate
    return name, None


def _mask(path: Path, where: str, frame: dict[str, Any]) -> Path | None:
    name = frame.get("mask_path")
    if name is None:
        return None
    mask = path.parent / str(name)
    if not mask.is_file():
        raise UserError(f'{where}: its "mask_path" {name} does not exist: put it there')
    return mask


def _size(image: Path) -> tuple[int, int]:
    try:
        with Image.open(image) as header:
            return header.size
    except Image.DecompressionBombError:
        raise UserError(f"{image} is too large: make the pictures smaller first") from None
    except (OSError, SyntaxError):
        raise UserError(f"{image} is not a picture that can be read: give PNG or JPEG") from None


def _pose(frame: dict[str, Any], where: str) -> Float[np.ndarray, "4 4"]:
    name = f"{where}: transform_matrix"
    rows = frame.get("transform_matrix")
    try:
        matrix = np.asarray(rows, np.float64)
    except (TypeError, ValueError):
        matrix = np.zeros(0)
    if matrix.shape == (3, 4):
        matrix = np.concatenate([matrix, [[0.0, 0.0, 0.0, 1.0]]])
    if matrix.shape != (4, 4):
        raise UserError(f"{name} is missing or no 4 x 4 matrix of numbers: give camera-to-world")
    return poses.inverse(poses.rigid(matrix, name) @ _FLIP)


def _intrinsics(
    entries: dict[str, Any], size: tuple[int, int], where: str
) -> Float[np.ndarray, "3 3"]:
    for key, told, real in zip("wh", (_number(entries, k, where) for k in "wh"), size, strict=True):
        if told is not None and round(told) != real:
            raise UserError(
                f'{where}: its picture is {size[0]} x {size[1]} but "{key}" is {told:g}: give the '
                "pictures that the cameras were made for"
            )
    width, height = size
    focal_x = _number(entries, "fl_x", where)
    if focal_x is None:
        focal_x = _focal(entries, "camera_angle_x", width, where)
    focal_y = _number(entries, "fl_y", where)
    if focal_y is None:
        focal_y = _focal(entries, "camera_angle_y", height, where)
    if focal_x is None and focal_y is None:
        raise UserError(
            f'{where} has no focal length: give "fl_x" in pixels or "camera_angle_x" in radians'
        )
    # One alone stands for both: square pixels.
    focal = tuple(f for f in (focal_x, focal_y) if f is not None)
    centre_x, centre_y = _number(entries, "cx", where), _number(entries, "cy", where)
    centre = (
        width / 2 if centre_x is None else centre_x,
        height / 2 if centre_y is None else centre_y,
    )
    return poses.pinhole((focal[0], focal[-1]), centre, where)


def _has_focal(entries: dict[str, Any]) -> bool:
    names = ("fl_x", "fl_y", "camera_angle_x", "camera_angle_y")
    return any(entries.get(name) is not None for name in names)


def _focal(entries: dict[str, Any], key: str, length: int, where: str) -> float | None:
    angle = _number(entries, key, where)
    if angle is None:
        return None
    if not 0.0 < angle < math.pi:
        raise UserError(f'{where}: "{key}" is {angle:g}: radians between 0 and pi are needed')
    return 0.5 * length / math.tan(0.5 * angle)


def _model(entries: dict[str, Any]) -> str:
    if entries.get("is_fisheye"):
        return "OPENCV_FISHEYE"
    return str(entries.get("camera_model", "OPENCV"))


def _distortion(entries: dict[str, Any], where: str) -> dict[str, float]:
    """The lens's numbers, of a model that has them."""
    model = _model(entries)
    if model not in _MODELS:
        raise UserError(f"{where}: {model} cameras are not supported: undistort to PINHOLE first")
    numbers = {key: _number(entries, key, where) or 0.0 for key in _NUMBERS}
    for key, value in numbers.items():
        if value and key not in _MODELS[model]:
            raise UserError(
                f"{where}: what {key} = {value:g} means in {model} cameras is not known: undistort "
                "to PINHOLE first"
            )
    return numbers


def _number(entries: dict[str, Any], key: str, where: str) -> float | None:
    value = entries.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f'{where}: "{key}" is {value!r}: a finite number is needed')
    return float(value)
