"""Posed views as camera files describe them, before any picture is read.

Matrices are float64 until all are checked: files of world coordinates in the thousands lose pixels
in float32. Camera axes are OpenCV's (x right, y down, z forward), the world is the file's.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from v3d_jax.data.distortion import Lens
from v3d_jax.errors import UserError

LARGEST = 1e15  # world units; squares of what is below stay finite in float32
# Files print rotations with four digits or more.
_ROTATION_TOLERANCE = 5e-3


class Posed(NamedTuple):
    """One view: its name in the file, where its pictures are, and its camera."""

    name: str
    image: Path
    mask: Path | None  # bright where the object is
    world_to_camera: Float[np.ndarray, "4 4"]
    intrinsics: Float[np.ndarray, "3 3"]  # pixels
    size: tuple[int, int]  # width and height that the intrinsics are for
    lens: Lens | None = None  # of the picture as it is stored; None: the intrinsics are its own


def rigid(matrix: Float[np.ndarray, "4 4"], name: str) -> Float[np.ndarray, "4 4"]:
    """The matrix with the nearest rotation in it, float64; `name` is the matrix's in messages.

    Raises `UserError` for NaN, infinity, a last row other than (0, 0, 0, 1), and for scale, shear
    or mirroring beyond what rounding to four digits makes.
    """
    matrix = np.asarray(matrix, np.float64)
    if not (np.abs(matrix) < LARGEST).all():
        raise UserError(f"{name} holds NaN or infinity: export the cameras again")
    if np.abs(matrix[3] - [0.0, 0.0, 0.0, 1.0]).max() > 1e-6:
        raise UserError(f"{name}: the last row must be 0 0 0 1, is it transposed?")
    rotation = matrix[:3, :3]
    error = np.abs(rotation @ rotation.T - np.eye(3)).max()
    if error > _ROTATION_TOLERANCE:
        raise UserError(
            f"{name} is no rotation and translation (R R^T is {error:.2g} off the identity): "
            "export the cameras without scale and shear"
        )
    if np.linalg.det(rotation) < 0:
        raise UserError(f"{name} mirrors: export the cameras in right-handed axes")
    left, _, right = np.linalg.svd(rotation)
    result = matrix.copy()
    result[:3, :3] = left @ right
    return result


def inverse(pose: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 4"]:
    """The inverse of a rigid matrix."""
    result = np.eye(4)
    result[:3, :3] = pose[:3, :3].T
    result[:3, 3] = -pose[:3, :3].T @ pose[:3, 3]
    return result


def pinhole(
    focal: tuple[float, float], centre: tuple[float, float], name: str
) -> Float[np.ndarray, "3 3"]:
    """Intrinsics in pixels. Raises `UserError` unless focal lengths are positive and finite."""
    if not np.isfinite([*focal, *centre]).all() or min(focal) <= 0:
        raise UserError(
            f"{name}: focal length {focal[0]:g} {focal[1]:g} and centre {centre[0]:g} "
            f"{centre[1]:g} are not those of a camera: positive, finite pixels are needed"
        )
    return np.asarray([[focal[0], 0.0, centre[0]], [0.0, focal[1], centre[1]], [0.0, 0.0, 1.0]])
