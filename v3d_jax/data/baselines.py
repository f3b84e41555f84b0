"""Two predictions of an orbit that need no model: the input repeated, and the nearest known orbit.

Frames are uint8 [n, h, w, 3], composited over the background, in turning order; an orbit is a
closed turn of equally spaced frames, so any of its frames can be its first.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, Shaped, UInt8

THUMBNAIL = 64


class NothingKnown(ValueError):  # noqa: N818
    """There is no orbit to search."""


class Nearest(NamedTuple):
    """For every query the orbit (by its number) and the first frame that look most alike.

    `distance` is the root mean square difference of the thumbnails, of a full scale of 1.
    """

    orbit: Int64[np.ndarray, " q"]
    start: Int64[np.ndarray, " q"]
    distance: Float64[np.ndarray, " q"]


def repeat(views: UInt8[np.ndarray, "q h w 3"], count: int) -> UInt8[np.ndarray, "q count h w 3"]:
    """Every view repeated `count` times: an object that does not turn."""
    return np.repeat(views[:, None], count, axis=1)


def turn(
    frames: Shaped[np.ndarray, "n ..."], start: int, count: int
) -> Shaped[np.ndarray, "m ..."]:
    """`count` equally spaced frames of a closed orbit, from frame `start` onwards.

    Raises ValueError if the orbit's frames cannot be thinned out evenly to `count`.
    """
    if len(frames) % count:
        raise ValueError(f"{count} equally spaced frames cannot be taken from {len(frames)}")
    step = len(frames) // count
    return frames[(start + step * np.arange(count)) % len(frames)]


def nearest(
    queries: UInt8[np.ndarray, "q h w 3"],
    orbits: Iterable[tuple[int, np.ndarray]],
    size: int = THUMBNAIL,
) -> Nearest:
    """Searches all orbits and all their frames for the view nearest to each query.

    Views are compared by L2 distance of `size` x `size` thumbnails; the first of equals wins.
    `orbits` are pairs of a number and frames, read once and one at a time, so they may be larger
    than memory. Raises `NothingKnown` if there are none.
    """
    wanted = thumbnails(queries, size)
    best = Nearest(
        np.full(len(queries), -1, np.int64),
        np.zeros(len(queries), np.int64),
        np.full(len(queries), np.inf),
    )
    for number, frames in orbits:
        distance = _distances(wanted, thumbnails(frames, size))
        start = distance.argmin(axis=1)
        least = distance.min(axis=1)
        nearer = least < best.distance
        best = Nearest(
            np.where(nearer, number, best.orbit),
            np.where(nearer, start, best.start),
            np.where(nearer, least, best.distance),
        )
    if (best.orbit < 0).any():
        raise NothingKnown("there are no orbits to search")
    return best


def thumbnails(frames: UInt8[np.ndarray, "n h w 3"], size: int) -> UInt8[np.ndarray, "n s s 3"]:
    """Shrinks frames by averaging boxes, to `size` x `size`."""
    from PIL import Image

    small = [Image.fromarray(frame).resize((size, size), Image.Resampling.BOX) for frame in frames]
    return np.stack([np.asarray(image) for image in small])


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[len(a), len(b)] root mean square differences of uint8 images, as fractions of 255.

    |a - b|^2 = |a|^2 - 2 a.b + |b|^2 is exact here: the sums are integers far below 2^53.
    """
    a = a.reshape(len(a), -1).astype(np.float64)
    b = b.reshape(len(b), -1).astype(np.float64)
    squared = np.square(a).sum(1)[:, None] - 2 * a @ b.T + np.square(b).sum(1)[None]
    return np.sqrt(squared / a.shape[1]) / 255.0
