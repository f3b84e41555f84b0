"""Corners of a picture followed into another that should be its image under a homography.

Corners are Shi and Tomasi's (1994). Each one's surroundings, warped by the homography, are looked
for in the whole of the other picture by normalised cross-correlation, so that it is found wherever
it went, and not only near where it should be.

Axes: c corner, h w picture, p side of a patch. Places are (x, y) in pixels, pixel centres at
half-integers, as `ops.camera` says.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from v3d_jax.data import warps

MOST = 100  # corners of a picture
QUALITY = 0.01  # of the strongest corner's response, the least that counts
CORRELATION = 0.8  # from which a corner counts as found
# Root mean square of a patch about its mean colour, in [0, 1]: two and a half steps of 8 bits,
# below which a corner is one of rounding.
CONTRAST = 0.01
# A patch that correlates so well with a place of its own picture that is farther than half a patch
# lies on an edge or is repeated, and could be found there.
DISTINCT = 0.9
TOGETHER = 32


class Followed(NamedTuple):
    """Corners that belong in the other picture, with where they belong and where they are, pixels.

    `found` is the place of the best correlation and means nothing where that is low.
    """

    start: Float[np.ndarray, "c 2"]
    expected: Float[np.ndarray, "c 2"]
    found: Float[np.ndarray, "c 2"]
    correlation: Float[np.ndarray, " c"]

    @property
    def tracked(self) -> Bool[np.ndarray, " c"]:
        """Which corners correlate well enough to count as found."""
        return self.correlation >= CORRELATION

    @property
    def error(self) -> Float[np.ndarray, " c"]:
        """From where a corner belongs to where it was found, pixels."""
        return np.linalg.norm(self.found - self.expected, axis=1)

    @property
    def motion(self) -> Float[np.ndarray, " c"]:
        """How far a corner has to move, pixels: its error in a picture that stays the same."""
        return np.linalg.norm(self.expected - self.start, axis=1)


def follow(
    reference: UInt8[np.ndarray, "h w 3"],
    other: UInt8[np.ndarray, "h w 3"],
    homography: Float[np.ndarray, "3 3"],
) -> Followed:
    """The corners of `reference` in `other`, which should be the reference under `homography`.

    Corners whose patch would not be wholly in both pictures are left out.
    """
    radius = patch_radius(min(reference.shape[:2]))
    start = detect(reference, radius)
    expected, ahead = transform(homography, start)
    there = _around(expected, radius)
    here, known = transform(np.linalg.inv(homography), there)
    kept = ahead & known.all(axis=(1, 2))
    size = np.asarray(reference.shape[1::-1])
    for places in (here, there):
        kept &= ((places >= 0.5) & (places <= size - 0.5)).all(axis=(1, 2, 3))
    patches = _centred(warps.sample(reference, here[kept]))
    row, column, maps = _best(other, patches)
    place = np.stack([column, row], axis=1) + _beyond(maps, row, column) + radius + 0.5
    correlation = maps[np.arange(len(maps)), row, column].astype(np.float64)
    return Followed(start[kept], expected[kept], place, correlation)


def patch_radius(side: int) -> int:
    """Patches are 15 pixels a side, and smaller in pictures of fewer than 112 pixels."""
    return min(7, max(2, side // 16))


def detect(picture: UInt8[np.ndarray, "h w 3"], radius: int) -> Float[np.ndarray, "c 2"]:
    """The strongest corners that have contrast and are unlike every other place of the picture.

    None is nearer than `radius` to another or to the picture's edge.
    """
    from skimage import feature

    grey = picture.mean(axis=2) / 255.0
    response = feature.corner_shi_tomasi(grey)
    # The picture's own edge is no corner, but would be by far the strongest.
    inner = np.pad(response[radius:-radius, radius:-radius], radius)
    rows_columns = feature.corner_peaks(
        inner,
        min_distance=radius,
        threshold_rel=QUALITY,
        exclude_border=radius,
        num_peaks=MOST,
    )
    places = rows_columns[:, ::-1] + 0.5
    patches = _centred(warps.sample(picture, _around(places, radius)))
    places, patches = (x[_deviation(patches) >= CONTRAST] for x in (places, patches))
    _, _, maps = _best(picture, patches)
    rows, columns = np.mgrid[: maps.shape[1], : maps.shape[2]] + radius + 0.5
    away = [np.maximum(abs(columns - x), abs(rows - y)) > radius for x, y in places]
    alike = [found[far].max(initial=-1.0) for found, far in zip(maps, away, strict=True)]
    return places[np.asarray(alike, np.float64) < DISTINCT]


def transform(
    homography: Float[np.ndarray, "3 3"], places: Float[np.ndarray, "*n 2"]
) -> tuple[Float[np.ndarray, "*n 2"], Bool[np.ndarray, "*n"]]:
    """Places under a homography, and which of them are ahead of the camera that it leads to."""
    ones = np.ones((*places.shape[:-1], 1))
    image = np.concatenate([places, ones], axis=-1) @ homography.T
    ahead = image[..., 2] > 1e-6
    return image[..., :2] / np.where(ahead, image[..., 2], 1.0)[..., None], ahead


def _around(places: Float[np.ndarray, "c 2"], radius: int) -> Float[np.ndarray, "c p p 2"]:
    """The places of a patch's pixels about each place."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return places[:, None, None] + np.stack([x, y], axis=-1)


def _centred(patches: Float[np.ndarray, "c p p 3"]) -> Float[np.ndarray, "c p p 3"]:
    """In [0, 1], less their mean colours."""
    return (patches - patches.mean(axis=(1, 2), keepdims=True)) / 255.0


def _deviation(patches: Float[np.ndarray, "c p p 3"]) -> Float[np.ndarray, " c"]:
    return np.sqrt(np.square(patches).mean(axis=(1, 2, 3)))


def _best(
    picture: UInt8[np.ndarray, "h w 3"], patches: Float[np.ndarray, "c p p 3"]
) -> tuple[np.ndarray, np.ndarray, Float[np.ndarray, "c i j"]]:
    """Row and column of the best correlation of patches without their means, and all of it."""
    count = len(patches)
    norm = np.sqrt(np.square(patches).sum(axis=(1, 2, 3)))
    # Numbers of patches are rounded up, so that few programs are compiled.
    padded = np.zeros((max(1, -(-count // TOGETHER)) * TOGETHER, *patches.shape[1:]), np.float32)
    padded[:count] = patches / np.maximum(norm, 1e-9)[:, None, None, None]
    picture = jnp.asarray(picture, jnp.float32) / 255.0
    maps = np.asarray(correlate(picture, jnp.asarray(padded)))[:count]
    peak = maps.reshape(count, maps[0].size if count else 1).argmax(axis=1)
    row, column = np.unravel_index(peak, maps.shape[1:])
    return row, column, maps


def _beyond(maps: np.ndarray, row: np.ndarray, column: np.ndarray) -> Float[np.ndarray, "c 2"]:
    """From the best pixel to the top of the quadric through its neighbours, pixels.

    The mixed derivative belongs to it: on a ridge aslant, one axis at a time is far off. It is 0 at
    the maps' edge.
    """
    height, width = maps.shape[1:]
    inside = (row > 0) & (row < height - 1) & (column > 0) & (column < width - 1)

    def at(down: int, right: int) -> np.ndarray:
        place = np.where(inside, row + down, row), np.where(inside, column + right, column)
        return maps[(np.arange(len(maps)), *place)].astype(np.float64)

    slope = 0.5 * np.stack([at(0, 1) - at(0, -1), at(1, 0) - at(-1, 0)], axis=-1)
    top = 2.0 * at(0, 0)
    xx, yy = at(0, 1) + at(0, -1) - top, at(1, 0) + at(-1, 0) - top
    xy = 0.25 * (at(1, 1) + at(-1, -1) - at(1, -1) - at(-1, 1))
    determinant = xx * yy - xy**2
    peaked = (determinant > 0.0) & (xx < 0.0)
    inverse = np.stack([yy, -xy, -xy, xx], axis=-1).reshape(-1, 2, 2)
    inverse /= np.where(peaked, determinant, 1.0)[:, None, None]
    moved = -np.einsum("cij,cj->ci", inverse, slope)
    return np.where(peaked[:, None], np.clip(moved, -1.0, 1.0), 0.0)


@jax.jit
def correlate(
    picture: Float[Array, "h w 3"], patches: Float[Array, "c p p 3"]
) -> Float[Array, "c i j"]:
    """Normalised cross-correlation at every place where a patch lies wholly in the picture.

    Patches have mean 0 in each channel and norm 1. It is 0 where the picture is blank.
    """
    side = patches.shape[1]
    centred = picture - jnp.mean(picture, axis=(0, 1), keepdims=True)  # float32 keeps more digits
    box = jnp.ones((3, side, side, 1), jnp.float32)
    shared = {"window_strides": (1, 1), "padding": "VALID", "precision": "highest"}
    layout = {"dimension_numbers": ("NHWC", "OHWI", "NHWC")}
    product = jax.lax.conv_general_dilated(centred[None], patches, **shared, **layout)[0]
    sums, squares = (
        jax.lax.conv_general_dilated(x[None], box, **shared, **layout, feature_group_count=3)[0]
        for x in (centred, jnp.square(centred))
    )
    energy = jnp.sum(squares - jnp.square(sums) / side**2, axis=-1)
    least = 3.0 * (0.5 * CONTRAST * side) ** 2  # a patch of half the contrast that corners have
    scale = jnp.where(energy > least, jax.lax.rsqrt(jnp.maximum(energy, least)), 0.0)
    return jnp.moveaxis(product * scale[..., None], -1, 0)
