"""Lenses that bend straight lines, and pictures as a pinhole camera at the same place has them.

Brown's model with a rational radial part, and the fisheye of Kannala and Brandt: OpenCV's models
(docs.opencv.org, "Camera Calibration and 3D Reconstruction"), which COLMAP and nerfstudio name.
The pinhole camera keeps the centre and the shape of the pixels and is zoomed so far that its
picture has no part that the lens did not see, and no further.

Coordinates: u v pixels, x y on the plane at distance 1; pixel centres are at half-integers.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from v3d_jax.errors import UserError

_ZOOMS = (0.2, 5.0)  # between which the pinhole camera's focal length is sought, times the lens's
_HALVINGS = 40
_CELLS = (2, 32)  # pixels, at least and at most
_STEPS = 200  # along a radius, to see that it is not bent back


class Lens(NamedTuple):
    """A camera with distortion; hashable, so that what follows from it is computed once."""

    focal: tuple[float, float]  # pixels
    centre: tuple[float, float]  # pixels
    radial: tuple[float, ...]  # k1 ... k6, of a fisheye k1 ... k4
    tangential: tuple[float, float] = (0.0, 0.0)  # p1, p2
    fisheye: bool = False


def pinhole_and_lens(
    intrinsics: Float[np.ndarray, "3 3"],
    numbers: Mapping[str, float],
    size: tuple[int, int],
    name: str,
    *,
    fisheye: bool = False,
) -> tuple[Float[np.ndarray, "3 3"], Lens | None]:
    """Intrinsics after straightening, and the lens to straighten; None: it is a pinhole camera.

    What camera files say: `numbers` are k1, k2 ..., p1 and p2, those missing are 0; `size` is width
    and height. Raises `UserError` as `pinhole` does.
    """
    if not fisheye and not any(numbers.values()):
        return intrinsics, None
    (fx, _, cx), (_, fy, cy), _ = intrinsics.tolist()
    radial = tuple(numbers.get(f"k{i}", 0.0) for i in range(1, 5 if fisheye else 7))
    tangential = numbers.get("p1", 0.0), numbers.get("p2", 0.0)
    lens = Lens((fx, fy), (cx, cy), radial, tangential, fisheye)
    return pinhole(lens, size, name), lens


def distort(
    lens: Lens, x: Float[np.ndarray, "*n"], y: Float[np.ndarray, "*n"]
) -> tuple[Float[np.ndarray, "*n"], Float[np.ndarray, "*n"]]:
    """Where the lens shows the points (x, y, 1) of its camera, in pixels u, v."""
    radius = np.hypot(x, y)
    if lens.fisheye:
        angle = np.arctan(radius)
        bent = angle * _series((1.0, *lens.radial), angle**2)
        # At the centre the angle is the radius.
        scale = np.where(radius > 1e-8, bent / np.maximum(radius, 1e-8), 1.0)
        shifts = 0.0, 0.0
    else:
        k1, k2, k3, k4, k5, k6 = lens.radial
        square = radius**2
        scale = _series((1.0, k1, k2, k3), square) / _series((1.0, k4, k5, k6), square)
        p1, p2 = lens.tangential
        shifts = (
            2.0 * p1 * x * y + p2 * (square + 2.0 * x * x),
            p1 * (square + 2.0 * y * y) + 2.0 * p2 * x * y,
        )
    return tuple(
        focal * (part * scale + shift) + centre
        for part, shift, focal, centre in zip((x, y), shifts, lens.focal, lens.centre, strict=True)
    )


@functools.lru_cache(maxsize=64)
def zoom(lens: Lens, size: tuple[int, int]) -> float | None:
    """How much longer the pinhole camera's focal length is than the lens's; `size`: width, height.

    None where no zoom does: the lens shows points twice, or nowhere a whole picture.
    """

    def seen(factor: float) -> bool:
        u, v = distort(lens, *_plane(lens, factor, *_border(size)))
        with np.errstate(invalid="ignore"):
            inside = (u >= 0) & (u <= size[0]) & (v >= 0) & (v <= size[1])
        return bool(inside.all()) and _unfolded(lens, factor, size)

    low, high = _ZOOMS
    if not seen(high):
        return None
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if seen(middle) else (middle, high)
    return high


def pinhole(lens: Lens, size: tuple[int, int], name: str) -> Float[np.ndarray, "3 3"]:
    """Intrinsics of the pinhole camera, pixels; `size` is width and height.

    Raises `UserError` where there is none, with the camera's `name`.
    """
    factor = zoom(lens, size)
    if factor is None:
        raise UserError(
            f"{name}: with these numbers of distortion the lens shows no whole picture: calibrate "
            "again, or undistort to PINHOLE first"
        )
    (fx, fy), (cx, cy) = lens.focal, lens.centre
    return np.asarray([[factor * fx, 0.0, cx], [0.0, factor * fy, cy], [0.0, 0.0, 1.0]])


def straightened(lens: Lens, pixels: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w c"]:
    """A picture of the lens as the camera of `pinhole` sees it, by bilinear look-up.

    With four channels the last is alpha, by which colours are weighted.
    """
    height, width = pixels.shape[:2]
    mesh = _mesh(lens, (width, height))
    stored = Image.fromarray(pixels)
    bilinear = Image.Resampling.BILINEAR
    return np.asarray(stored.transform((width, height), Image.Transform.MESH, mesh, bilinear))


@functools.lru_cache(maxsize=4)
def _mesh(lens: Lens, size: tuple[int, int]) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Cells of the pinhole camera's picture, and their corners in the lens's, as Pillow has them.

    The corners go from the upper left one down, and around. Inside a cell places are interpolated,
    which is off by cell^2 / 8 times the second derivative, about 1 / focal length: hundredths of a
    pixel.
    """
    factor = zoom(lens, size)
    assert factor is not None
    cell = int(np.clip(np.sqrt(0.16 * min(lens.focal)), *_CELLS))
    columns, rows = (np.append(np.arange(0, length, cell), length) for length in size)
    grid = np.meshgrid(columns.astype(np.float64), rows.astype(np.float64))
    places = np.stack(distort(lens, *_plane(lens, factor, *grid)), axis=-1)
    # The least zoom is found to within rounding: beyond the border Pillow has nothing.
    places = np.clip(places, 0.0, size)
    corners = np.stack([places[:-1, :-1], places[1:, :-1], places[1:, 1:], places[:-1, 1:]], axis=2)
    return [
        (
            (int(columns[i]), int(rows[j]), int(columns[i + 1]), int(rows[j + 1])),
            tuple(corners[j, i].reshape(-1).tolist()),
        )
        for j in range(len(rows) - 1)
        for i in range(len(columns) - 1)
    ]


def _plane(
    lens: Lens, factor: float, u: Float[np.ndarray, "*n"], v: Float[np.ndarray, "*n"]
) -> tuple[Float[np.ndarray, "*n"], Float[np.ndarray, "*n"]]:
    (fx, fy), (cx, cy) = lens.focal, lens.centre
    return (u - cx) / (factor * fx), (v - cy) / (factor * fy)


def _border(size: tuple[int, int]) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Points around a picture's edge, corners among them, pixels."""
    width, height = size
    across, down = np.linspace(0.0, width, 65), np.linspace(0.0, height, 65)
    u = np.concatenate([across, across, np.zeros(65), np.full(65, float(width))])
    v = np.concatenate([np.zeros(65), np.full(65, float(height)), down, down])
    return u, v


def _unfolded(lens: Lens, factor: float, size: tuple[int, int]) -> bool:
    """Whether the lens shows what is farther from the centre farther out, as far as is looked."""
    x, y = _plane(lens, factor, *_border(size))
    steps = np.linspace(0.0, 1.0, _STEPS)[:, None]
    u, v = distort(lens, steps * x, steps * y)
    (fx, fy), (cx, cy) = lens.focal, lens.centre
    with np.errstate(invalid="ignore"):
        return bool((np.diff(np.hypot((u - cx) / fx, (v - cy) / fy), axis=0) > 0).all())


def _series(numbers: tuple[float, ...], x: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """The polynomial with these numbers, lowest power first."""
    return np.polynomial.polynomial.polyval(x, numbers)
