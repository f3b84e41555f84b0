"""A user's picture file as 8-bit RGB, with its own alpha if it has one.

Whatever Pillow reads is handled: palettes, 16 bits, CMYK, EXIF rotation, animations (first
frame). What cannot be used is refused with a `UserError` that names the file.
"""

import os
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from v3d_jax.errors import UserError

MAX_PIXELS = 128 * 10**6
MIN_SIDE = 8
# Beyond this a picture is shrunk at once: models see at most 512 pixels of it.
WORKING_SIDE = 2048

_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class Picture(NamedTuple):
    """Straight RGB, alpha (None where the file is opaque), and remarks for the user."""

    rgb: UInt8[np.ndarray, "h w 3"]
    alpha: UInt8[np.ndarray, "h w"] | None
    notes: tuple[str, ...]


def read(source: str | os.PathLike | Image.Image, *, as_stored: bool = False) -> Picture:
    """Reads a picture file, or takes an opened Pillow image; sides of at most `WORKING_SIDE`.

    `as_stored` is for views with known cameras, whose pixels must stay where they are: not turned
    by EXIF (no camera file counts that in), not shrunk, and transparent everywhere if they are so.
    Raises `UserError` for a missing, empty, unreadable, truncated, too small or too large picture,
    and for one that is transparent everywhere.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "the picture", as_stored)
    path = Path(source)
    name = str(path)
    if path.is_dir():
        raise UserError(f"{name} is a folder: give the picture files in it")
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise UserError(f"{name} is empty (0 bytes)")
            with _quiet(), Image.open(file) as image:
                return _decode(image, name, as_stored)
    except FileNotFoundError:
        raise UserError(f"{name} does not exist: check the path") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{name} is not a picture that can be read: give PNG or JPEG") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name} is too large: {_advice()}") from None
    except PermissionError:
        raise UserError(f"{name} cannot be opened: permission denied") from None
    except OSError as error:
        raise UserError(f"{name} is damaged and cannot be decoded ({_first(error)})") from None


def shrunk(image: Image.Image, side: int = WORKING_SIDE) -> Image.Image:
    """At most `side` a side, by averaging; modes that cannot be averaged are converted."""
    factor = max(image.size) / side
    if factor <= 1.0:
        return image
    if image.mode in ("1", "P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    size = tuple(max(1, round(length / factor)) for length in image.size)
    return image.resize(size, Image.Resampling.BOX, reducing_gap=2.0)


def _decode(image: Image.Image, name: str, as_stored: bool) -> Picture:
    """Checks the size from the header, then decodes the first frame and normalises its mode."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        megapixels = width * height / 1e6
        raise UserError(f"{name} has {megapixels:.0f} megapixels: {_advice()}")
    if min(width, height) < MIN_SIDE:
        raise UserError(f"{name} is {width} x {height}: at least {MIN_SIDE} pixels a side needed")
    notes = []
    # A multi-picture JPEG (MPO) holds one photograph and its previews.
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        notes.append(f"{name} has several frames: the first one is used")
    try:
        with _quiet():
            if as_stored:
                rgba = _to_rgba(_eight_bit(image, name))
            else:
                # JPEGs decode at a fraction of their size when much less is needed.
                image.draft(None, (WORKING_SIDE, WORKING_SIDE))
                image.load()
                rgba = _to_rgba(shrunk(_eight_bit(ImageOps.exif_transpose(image), name)))
    except UserError:
        raise
    except Exception as error:
        # Damaged files make Pillow's decoders raise anything from OSError to IndexError.
        raise UserError(f"{name} is damaged and cannot be decoded ({_first(error)})") from None
    pixels = np.asarray(rgba)
    alpha = pixels[..., 3]
    if alpha.max() == 0 and not as_stored:
        raise UserError(f"{name} is transparent everywhere: there is no object in it")
    return Picture(pixels[..., :3], None if alpha.min() == 255 else alpha, tuple(notes))


def _eight_bit(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise UserError(f"{name} has floating-point pixels: save it as 8-bit PNG or JPEG")
    if image.mode not in _SIXTEEN_BIT:
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise UserError(f"{name} has 32-bit pixels: save it as 8-bit PNG or JPEG")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _to_rgba(image: Image.Image) -> Image.Image:
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        return image.convert("RGBA")
    return image.convert("RGB").convert("RGBA")


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _advice() -> str:
    return f"at most {MAX_PIXELS // 10**6} megapixels are read, so make it smaller first"


def _quiet() -> warnings.catch_warnings:
    """Pillow warns about size and metadata of pictures that it reads well."""
    return warnings.catch_warnings(action="ignore")
