"""Cutting an object out of its background: with `rembg` if installed, else by the border's colour.

Colours are float [0, 1] RGB, sRGB as displayed; alpha is float [0, 1]. A matte is straight: colours
are not multiplied by alpha.
"""

import importlib.util
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageFilter

from v3d_jax.errors import UserError

BETTER = (
    "for a better cut-out install rembg (pip install 'v3d_jax[matting]') or give a picture with a "
    "transparent background"
)
# Distances from the background's colour at which a pixel starts to be, and surely is, object.
_LOW, _HIGH = 0.04, 0.14
_SMALLEST = 0.001  # of the picture's area
_ERODE = ImageFilter.MinFilter(3)


class Matte(NamedTuple):
    """The object's own colours, its coverage, and remarks for the user."""

    rgb: UInt8[np.ndarray, "h w 3"]
    alpha: UInt8[np.ndarray, "h w"]
    notes: tuple[str, ...]


def cut_out(rgb: UInt8[np.ndarray, "h w 3"], name: str) -> Matte:
    """Separates the object of an opaque picture; `name` is the picture's in messages.

    Raises `UserError` if nothing stands out from the background.
    """
    notes: tuple[str, ...] = ()
    if importlib.util.find_spec("rembg") is not None:
        try:
            return _checked(Matte(rgb, _learned(rgb), ()), name)
        except UserError:
            raise
        except Exception as error:
            # rembg downloads its network at the first use, and fails in many ways without it.
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            notes = (f"{name}: rembg failed ({reason})",)
    cleaned, alpha = by_border(rgb)
    notes += (f"{name}: background removed by its border's colour; {BETTER}",)
    return _checked(Matte(cleaned, alpha, notes), name)


def _learned(rgb: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
    """The mask of rembg's default network. Its RGBA output is not used: see `preprocess`."""
    import rembg

    mask = rembg.remove(Image.fromarray(rgb), only_mask=True)
    return np.asarray(mask.convert("L"))


def by_border(
    rgb: UInt8[np.ndarray, "h w 3"],
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]]:
    """Object colours and alpha, taking what joins the border in its colour for background.

    The background is a quadratic surface of colour, fitted to a frame along the border, so a
    gradient or a vignette is part of it. Soft edges are unmixed from the background.
    """
    image = rgb.astype(np.float32) / 255.0
    background, noise = _background(image)
    distance = np.linalg.norm(image - background, axis=-1)
    low = max(_LOW, 1.5 * noise)
    high = low + _HIGH - _LOW
    ramp = np.clip((distance - low) / (high - low), 0.0, 1.0)
    outside = _joined_to_border(distance < high)
    alpha = np.where(outside, ramp * ramp * (3.0 - 2.0 * ramp), 1.0)
    alpha = _without_specks(alpha)
    alpha = _edge_coverage(image, background, alpha, high)
    mixed = image - (1.0 - alpha[..., None]) * background
    colour = mixed / np.maximum(alpha[..., None], 1e-3)
    colour = np.where(alpha[..., None] > 0, np.clip(colour, 0.0, 1.0), image)
    return (colour * 255.0 + 0.5).astype(np.uint8), (alpha * 255.0 + 0.5).astype(np.uint8)


def _edge_coverage(
    image: Float[np.ndarray, "h w 3"],
    background: Float[np.ndarray, "h w 3"],
    alpha: Float[np.ndarray, "h w"],
    contrast: float,
) -> Float[np.ndarray, "h w"]:
    """Coverage of the pixels along the outline, by how far they are from B to F.

    B is the background's colour, F the object's a few pixels further in:
    alpha = (C - B) . (F - B) / |F - B|^2. Left as it is where F is close to B or out of reach.
    """
    solid = alpha >= 1.0
    inner = _filtered(solid, ImageFilter.MinFilter(5))
    edge = _filtered(alpha > 0, ImageFilter.MaxFilter(3)) & ~_filtered(solid, _ERODE)
    weight = _box_sum(inner[..., None].astype(np.float32), 4)
    foreground = _box_sum(image * inner[..., None], 4) / np.maximum(weight, 1.0)
    direction = foreground - background
    length = np.sum(direction**2, axis=-1)
    coverage = np.sum((image - background) * direction, axis=-1) / np.maximum(length, 1e-6)
    known = edge & (weight[..., 0] > 0.5) & (length > contrast**2)
    # Below a fiftieth it is noise of the background.
    coverage = np.where(coverage < 0.02, 0.0, np.minimum(coverage, 1.0))
    return np.where(known, coverage, alpha)


def _box_sum(image: Float[np.ndarray, "h w c"], radius: int) -> Float[np.ndarray, "h w c"]:
    """Sums over squares of 2 radius + 1 pixels, zero outside."""
    for axis in (0, 1):
        pad = [(radius + 1, radius) if i == axis else (0, 0) for i in range(3)]
        total = np.cumsum(np.pad(image, pad), axis=axis, dtype=np.float64)
        ahead = np.take(total, np.arange(2 * radius + 1, total.shape[axis]), axis=axis)
        behind = np.take(total, np.arange(total.shape[axis] - 2 * radius - 1), axis=axis)
        image = (ahead - behind).astype(np.float32)
    return image


def _filtered(mask: Bool[np.ndarray, "h w"], kernel: ImageFilter.Filter) -> Bool[np.ndarray, "h w"]:
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).filter(kernel)) > 0


def _background(
    image: Float[np.ndarray, "h w 3"],
) -> tuple[Float[np.ndarray, "h w 3"], float]:
    """The fitted background everywhere, and how far the border's pixels stray from it."""
    height, width = image.shape[:2]
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    basis = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1).astype(np.float32)
    strip = max(1, round(0.02 * min(height, width)))
    border = np.ones((height, width), bool)
    border[strip:-strip, strip:-strip] = False
    samples, colours = basis[border], image[border]
    # An object that touches the border is an outlier: start at the median, drop what is far.
    residual = np.linalg.norm(colours - np.median(colours, axis=0), axis=-1)
    for _ in range(4):
        near = residual <= max(2.5 * float(np.median(residual)), 0.02)
        surface = np.linalg.lstsq(samples[near], colours[near], rcond=None)[0]
        residual = np.linalg.norm(colours - samples @ surface, axis=-1)
    return basis @ surface, float(np.quantile(residual[near], 0.98))


def _joined_to_border(candidate: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Candidates that 4-connect to the picture's border, by sweeping runs of rows and columns."""
    reached = np.zeros_like(candidate)
    reached[[0, -1]], reached[:, [0, -1]] = candidate[[0, -1]], candidate[:, [0, -1]]
    count = -1
    while count != (count := int(reached.sum())):
        reached = _fill_runs(candidate, reached)
        reached = _fill_runs(candidate.T, reached.T).T
    return reached


def _fill_runs(
    candidate: Bool[np.ndarray, "h w"], reached: Bool[np.ndarray, "h w"]
) -> Bool[np.ndarray, "h w"]:
    """Extends `reached` along each row to the whole run of candidates that it touches."""
    starts = np.ones(candidate.shape, bool)
    starts[:, 1:] = candidate[:, 1:] != candidate[:, :-1]
    run = np.cumsum(starts.reshape(-1)).reshape(candidate.shape)
    touched = np.zeros(run[-1, -1] + 1, bool)
    touched[run[reached]] = True
    return candidate & touched[run]


def _without_specks(alpha: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """Removes lone pixels, which would stretch the object's bounding box."""
    quantised = Image.fromarray((alpha * 255.0 + 0.5).astype(np.uint8))
    opened = np.asarray(quantised.filter(ImageFilter.MinFilter(3)).filter(ImageFilter.MaxFilter(5)))
    return np.where(opened > 8, alpha, 0.0)


def _checked(matte: Matte, name: str) -> Matte:
    if (matte.alpha > 127).mean() < _SMALLEST:
        raise UserError(f"{name}: no object stands out from the background; {BETTER}")
    return matte
