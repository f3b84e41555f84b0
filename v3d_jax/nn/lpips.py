"""LPIPS, the learned perceptual distance (Zhang et al. 2018, version 0.1), on VGG16 or AlexNet.

Axes: `b` image, `h w` image, `c` channel. Images are in [-1, 1]. Pure functions of the parameters;
`v3d_jax.weights.lpips` reads those. Which trunk it is follows from the number of convolutions.
For a fixed target, keep `features(params, target)` and call `distance_from_features`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# ImageNet's statistics for images in [-1, 1], rounded as in the authors' release.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPS = 1e-10


class Conv(NamedTuple):
    """One convolution of the trunk: kernel (height, width, input, output) and bias."""

    kernel: Float[Array, "kh kw i o"]
    bias: Float[Array, "o"]


class LPIPSParams(NamedTuple):
    """The trunk's convolutions in order, and one weight a channel for each of the five taps."""

    convs: tuple[Conv, ...]
    linear: tuple[Float[Array, "c"], ...]


class _Layer(NamedTuple):
    """How convolution i runs: stride, padding, pooling window before it, tapped after its ReLU."""

    stride: int = 1
    padding: int = 1
    pool: int = 0
    tap: bool = False


_PLAIN, _TAP, _POOL = _Layer(), _Layer(tap=True), _Layer(pool=2)
# Taps after relu1_2, 2_2, 3_3, 4_3, 5_3; max-pooling of 2 with stride 2 between the groups.
VGG16 = (_PLAIN, _TAP, _POOL, _TAP, *3 * (_POOL, _PLAIN, _TAP))
# Taps after every ReLU; max-pooling of 3 with stride 2.
ALEXNET = (
    _Layer(stride=4, padding=2, tap=True),
    _Layer(padding=2, pool=3, tap=True),
    _Layer(pool=3, tap=True),
    _TAP,
    _TAP,
)
_TRUNKS = {len(trunk): trunk for trunk in (VGG16, ALEXNET)}


def features(
    params: LPIPSParams, images: Float[Array, "b h w 3"], *, dtype: Any = jnp.float32
) -> tuple[Float[Array, "b _ _ _"], ...]:
    """Tapped activations, each pixel's channels scaled to unit length; the trunk runs in `dtype`.

    Pixels without any activation stay zero, with zero gradient.
    """
    shift, scale = (jnp.asarray(x).reshape(1, 1, 1, 3) for x in (_SHIFT, _SCALE))
    x = ((images - shift) / scale).astype(dtype)
    taps = []
    for conv, layer in zip(params.convs, _TRUNKS[len(params.convs)], strict=True):
        x = jax.nn.relu(_convolve(conv, layer, x))
        if layer.tap:
            taps.append(_normalize(x))
    return tuple(taps)


def distance_from_features(
    params: LPIPSParams,
    a: tuple[Float[Array, "b _ _ _"], ...],
    b: tuple[Float[Array, "b _ _ _"], ...],
) -> Float[Array, "b"]:
    """Squared differences of unit features, weighted by channel, averaged over pixels, summed."""
    total = jnp.zeros(a[0].shape[0], jnp.float32)
    for weights, x, y in zip(params.linear, a, b, strict=True):
        squared = jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32))
        total = total + jnp.mean(squared, axis=(1, 2)) @ weights
    return total


def distance(
    params: LPIPSParams,
    a: Float[Array, "b h w 3"],
    b: Float[Array, "b h w 3"],
    *,
    dtype: Any = jnp.float32,
) -> Float[Array, "b"]:
    """LPIPS between images in [-1, 1]; 0 for equal images.

    Images must be at least 16 pixels (VGG16) or 31 pixels (AlexNet) wide and high.
    """
    x, y = features(params, a, dtype=dtype), features(params, b, dtype=dtype)
    return distance_from_features(params, x, y)


def _convolve(conv: Conv, layer: _Layer, x: Float[Array, "b h w i"]) -> Float[Array, "b _ _ o"]:
    if layer.pool:
        window, strides = (1, layer.pool, layer.pool, 1), (1, 2, 2, 1)
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, "VALID")
    x = jax.lax.conv_general_dilated(
        x,
        conv.kernel.astype(x.dtype),
        window_strides=(layer.stride, layer.stride),
        padding=((layer.padding, layer.padding),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return x + conv.bias.astype(x.dtype).reshape(1, 1, 1, -1)


def _normalize(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """x / (|x| + eps) in float32, with a zero gradient instead of NaN where x is zero."""
    dtype, x = x.dtype, x.astype(jnp.float32)
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    active = squared > 0
    length = jnp.where(active, jnp.sqrt(jnp.where(active, squared, 1.0)), 0.0)
    return (x / (length + _EPS)).astype(dtype)
