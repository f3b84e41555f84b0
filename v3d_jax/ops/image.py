"""Images as arrays: resizing, compositing, ranges, and the resampling that CLIP was given in SVD.

Axes: `h w` image, `c` channel, any leading axes. Images are float in [0, 1] outside networks and
[-1, 1] inside them, colours sRGB as displayed. Resampling is a product with one matrix an axis,
in full precision.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Method = Literal["nearest", "bilinear", "bicubic"]

_HIGHEST = jax.lax.Precision.HIGHEST
_JAX_METHODS = {"nearest": "nearest", "bilinear": "linear", "bicubic": "cubic"}
# PyTorch's bicubic coefficient; Pillow and jax.image use -0.5.
_TORCH_CUBIC = -0.75


def resize(
    image: Float[Array, "*b h w c"], size: tuple[int, int], method: Method = "bilinear"
) -> Float[Array, "*b H W c"]:
    """Resizes to `size` (height, width), antialiased when shrinking, as Pillow's filters do.

    Bicubic overshoots the input's range; callers clip.
    """
    shape = (*image.shape[:-3], *size, image.shape[-1])
    return jax.image.resize(
        image, shape, _JAX_METHODS[method], antialias=method != "nearest", precision=_HIGHEST
    )


def composite(
    rgba: Float[Array, "*b h w 4"], background: float | Float[Array, "3"] = 1.0
) -> Float[Array, "*b h w 3"]:
    """Straight-alpha RGBA over a background colour: rgb * alpha + background * (1 - alpha)."""
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    behind = jnp.broadcast_to(jnp.asarray(background, rgba.dtype), rgb.shape)
    return rgb * alpha + behind * (1.0 - alpha)


def to_network(image: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """[0, 1] to the networks' [-1, 1]."""
    return 2.0 * image - 1.0


def from_network(image: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The networks' [-1, 1] to [0, 1], clipped."""
    return jnp.clip(0.5 * (image + 1.0), 0.0, 1.0)


def clip_resize(images: Float[Array, "b h w c"], size: int = 224) -> Float[Array, "b s s c"]:
    """Resizes to a square the way SVD prepares images for CLIP.

    Where an axis shrinks: a Gaussian blur of sigma (h / size - 1) / 2 cut to int(4 sigma) taps
    (at least 3, made odd), reflected at the border; then a bicubic kernel of a = -0.75 that is not
    widened, on a grid that joins the corner pixels' centres (kornia 0.6.9 `geometry.resize` with
    `align_corners` and `antialias`). Not clipped. An axis shorter than its blur cannot be reflected
    and raises a ValueError.
    """
    height, width = images.shape[-3:-1]
    blurred = max(height, width) > size
    rows = jnp.asarray(_clip_matrix(height, size, blurred), images.dtype)
    columns = jnp.asarray(_clip_matrix(width, size, blurred), images.dtype)
    images = jnp.einsum("sh,bhwc->bswc", rows, images, precision=_HIGHEST)
    return jnp.einsum("sw,bhwc->bhsc", columns, images, precision=_HIGHEST)


def _clip_matrix(length: int, size: int, blurred: bool) -> np.ndarray:
    """[size, length]: bicubic samples of the blurred line."""
    matrix = _cubic_matrix(length, size)
    return matrix @ _blur_matrix(length, length / size) if blurred else matrix


def _blur_matrix(length: int, factor: float) -> np.ndarray:
    # kornia blurs both axes as soon as one of them shrinks, hence the floor.
    sigma = max((factor - 1.0) / 2.0, 0.001)
    taps = int(max(4.0 * sigma, 3)) | 1
    reach = taps // 2
    if reach >= length:
        raise ValueError(f"an axis of {length} pixels is too short for a blur of {taps} taps")
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    source = np.arange(length)[:, None] + np.arange(-reach, reach + 1)
    source = np.abs(source)
    source = np.where(source >= length, 2 * (length - 1) - source, source)
    return _scatter(source, np.broadcast_to(weights / weights.sum(), source.shape), length)


def _cubic_matrix(length: int, size: int) -> np.ndarray:
    position = np.linspace(0.0, length - 1, size) if size > 1 else np.zeros(1)
    first = np.floor(position).astype(int)
    source = first[:, None] + np.arange(-1, 3)
    weights = _cubic(position[:, None] - source)
    return _scatter(np.clip(source, 0, length - 1), weights, length)


def _cubic(x: np.ndarray, a: float = _TORCH_CUBIC) -> np.ndarray:
    """Keys' cubic convolution kernel (IEEE ASSP 1981, equation 15 with free parameter a)."""
    x = np.abs(x)
    near = (a + 2.0) * x**3 - (a + 3.0) * x**2 + 1.0
    far = a * (x**3 - 5.0 * x**2 + 8.0 * x - 4.0)
    return np.where(x <= 1.0, near, np.where(x < 2.0, far, 0.0))


def _scatter(source: np.ndarray, weights: np.ndarray, length: int) -> np.ndarray:
    """Matrix whose row i sums `weights[i]` into the columns `source[i]`."""
    matrix = np.zeros((source.shape[0], length))
    np.add.at(matrix, (np.arange(source.shape[0])[:, None], source), weights)
    return matrix
