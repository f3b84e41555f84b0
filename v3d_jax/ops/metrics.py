"""Image metrics: PSNR and SSIM.

Images are [..., h, w, 3] float in [0, 1]; every metric averages an image's pixels and channels and
keeps the leading axes, so averages over views and objects are the caller's to define.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from v3d_jax.ops import target

WINDOW = 11
SIGMA = 1.5
K1, K2 = 0.01, 0.03


def psnr(a: Float[Array, "*n h w 3"], b: Float[Array, "*n h w 3"]) -> Float[Array, "*n"]:
    """Peak signal-to-noise ratio in dB for a peak of 1: -10 log10(mean squared error).

    Equal images give infinity.
    """
    return -10.0 * jnp.log10(jnp.mean(jnp.square(a - b), axis=(-3, -2, -1)))


def ssim(a: Float[Array, "*n h w 3"], b: Float[Array, "*n h w 3"]) -> Float[Array, "*n"]:
    """Structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004, equation 13), in [-1, 1].

    The paper's settings: an 11 x 11 Gaussian window of sigma 1.5 normalised to sum 1, K1 = 0.01,
    K2 = 0.03, a dynamic range of 1, population (not sample) moments, windows that lie wholly inside
    the image, and no downsampling. Computed per colour channel and averaged. Images must be at
    least 11 x 11 (ValueError).
    """
    if min(a.shape[-3:-1]) < WINDOW:
        raise ValueError(f"SSIM needs at least {WINDOW} x {WINDOW} pixels, got {a.shape[-3:-1]}")
    c1, c2 = K1**2, K2**2
    mean_a, mean_b = _blur(a), _blur(b)
    variances = _blur(a * a) - mean_a**2 + _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    return jnp.mean(luminance * structure, axis=(-3, -2, -1))


def _blur(image: Float[Array, "*n h w c"]) -> Float[Array, "*n h2 w2 c"]:
    """The Gaussian-weighted mean of every window that lies inside the image, in float32.

    Two banded matrices: gradients of shifted sums or convolutions are many times slower on CPUs.
    The precision is named: what GPUs and TPUs do by default would drown the variances of flat
    regions. On GPUs, whose matrix units have no such precision, sums of shifted images instead.
    """
    if target.platform() in target.GPUS:
        # Two passes: as one kernel, every window's columns would be summed eleven times.
        return _slide(lax.optimization_barrier(_slide(image, image.ndim - 3)), image.ndim - 2)
    rows, columns = (jnp.asarray(_band(side)) for side in image.shape[-3:-1])
    image = jnp.einsum("ij,...jwc->...iwc", rows, image, precision=lax.Precision.HIGHEST)
    return jnp.einsum("ij,...hjc->...hic", columns, image, precision=lax.Precision.HIGHEST)


def _slide(image: Float[Array, "*n h w c"], axis: int) -> Float[Array, "*n _ _ c"]:
    """The weighted mean of every window along an axis."""
    count = image.shape[axis] - WINDOW + 1
    shifted = (lax.slice_in_dim(image, start, start + count, axis=axis) for start in range(WINDOW))
    terms = [tap * part for tap, part in zip(_gaussian(), shifted, strict=True)]
    return sum(terms[1:], terms[0])


def _band(side: int) -> Float[np.ndarray, "i j"]:
    """Row i holds the window's weights from column i on."""
    count = side - WINDOW + 1
    band = np.zeros((count, side), np.float32)
    for start, weight in enumerate(_gaussian()):
        band[np.arange(count), np.arange(count) + start] = weight
    return band


def _gaussian() -> list[float]:
    taps = [math.exp(-((i - WINDOW // 2) ** 2) / (2 * SIGMA**2)) for i in range(WINDOW)]
    return [tap / sum(taps) for tap in taps]
