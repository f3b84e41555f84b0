"""Which objects of a large collection are worth rendering: simple measures with thresholds."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from v3d_jax.data import objects, parts, selection
from v3d_jax.mesh import surface

MEGABYTE = 10**6


@dataclass(frozen=True)
class QualityConfig:
    """What an object must be like. The standard values leave out what shows nothing."""

    max_megabytes: float = 500.0
    """Largest mesh file."""
    max_faces: int = 1_000_000
    """Most triangles."""
    min_thickness: float = 0.0
    """Least thinnest over longest side of the bounding box."""
    min_chroma: float = 0.0
    """Of an object without textures: least difference of a colour's channels, in [0, 1]."""
    min_cover: float = 0.002
    """Least share of the frames' pixels that the object covers."""
    min_contrast: float = 0.0
    """Least deviation of the object's pixels from their mean colour, in [0, 1]."""


class Refused(parts.UnreadableMesh):
    """An object that can be read but is not good enough."""


def check_file(name: str, file: Path, config: QualityConfig) -> None:
    """Raises `Refused` for a mesh file that is too large."""
    if file.suffix.lower() not in objects.SUFFIXES:
        return
    try:
        megabytes = file.stat().st_size / MEGABYTE
    except OSError as error:
        raise objects.UnreadableMesh(name, str(error)) from error
    if megabytes > config.max_megabytes:
        raise Refused(name, f"its file has {megabytes:.1f} MB")


def check_mesh(name: str, mesh: surface.Mesh, config: QualityConfig) -> None:
    """Raises `Refused` for a mesh of too many faces, one that is flat, or one without colours."""
    if len(mesh.faces) > config.max_faces:
        raise Refused(name, f"it has {len(mesh.faces)} faces")
    limits = selection.SelectionConfig(config.min_thickness, config.min_chroma)
    if reason := selection.refusal(mesh, limits):
        raise Refused(name, f"it is {reason}")


def check_frames(name: str, frames: UInt8[np.ndarray, "v h w 4"], config: QualityConfig) -> None:
    """Raises `Refused` for an orbit that shows nothing, next to nothing, or one colour."""
    seen = frames[..., 3] > 0  # glass is seen as well
    if not seen.any():
        raise Refused(name, "its frames are empty")
    cover = seen.mean()
    if cover < config.min_cover:
        raise Refused(name, f"it covers {cover:.2%} of its frames")
    contrast = frames[..., :3][seen].std(axis=0).max() / 255.0
    if contrast < config.min_contrast:
        raise Refused(name, f"its frames have one colour (contrast {contrast:.4f})")
