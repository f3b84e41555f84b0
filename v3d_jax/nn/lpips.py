"""LPIPS, the learned perceptual distance (Zhang et al. 2018, version 0.1), on VGG16 or AlexNet.

Axes: `b` image, `h w` image, `c` channel. Images are in [-1, 1]. Pure functions of the parameters;
`v3d_jax.weights.lpips` reads those. Which trunk it is follows from the number of convolutions.
For a fixed target, keep `features(params, target)` and call `distance_to_features`.

A gradient is bound by memory as much as by convolutions. So ReLU, pooling and the comparison with a
tap have gradients of their own here, each of which reads what it needs once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# ImageNet's statistics for images in [-1, 1], rounded as in the authors' release.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPS = 1e-10
_TINY = 1e-37


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
    return tuple(_unit(x, _length(x)) for x in _taps(params, images, dtype))


def distance_to_features(
    params: LPIPSParams,
    images: Float[Array, "b h w 3"],
    target: tuple[Float[Array, "b _ _ _"], ...],
    *,
    dtype: Any = jnp.float32,
) -> Float[Array, "b"]:
    """LPIPS of images in [-1, 1] from those that have the features `target`.

    Squared differences of unit features, weighted by channel, averaged over pixels, summed.
    """
    total = jnp.zeros(images.shape[0], jnp.float32)
    taps = _taps(params, images, dtype)
    for weights, x, y in zip(params.linear, taps, target, strict=True):
        total = total + jnp.mean(_apart(x, y, weights), axis=(1, 2))
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
    return distance_to_features(params, a, features(params, b, dtype=dtype), dtype=dtype)


def in_dtype(params: LPIPSParams, dtype: Any) -> LPIPSParams:
    """The trunk's parameters as it multiplies by them, so that many distances convert them once."""
    return params._replace(convs=jax.tree.map(lambda x: x.astype(dtype), params.convs))


def _taps(
    params: LPIPSParams, images: Float[Array, "b h w 3"], dtype: Any
) -> list[Float[Array, "b _ _ _"]]:
    """Activations behind the tapped convolutions' ReLU."""
    shift, scale = (jnp.asarray(x).reshape(1, 1, 1, 3) for x in (_SHIFT, _SCALE))
    x = ((images - shift) / scale).astype(dtype)
    taps = []
    for conv, layer in zip(params.convs, _TRUNKS[len(params.convs)], strict=True):
        x = _relu(_convolve(conv, layer, x))
        if layer.tap:
            taps.append(x)
    return taps


def _convolve(conv: Conv, layer: _Layer, x: Float[Array, "b h w i"]) -> Float[Array, "b _ _ o"]:
    if layer.pool == 2:
        x = _halve(x)
    elif layer.pool:
        x = _most(x, layer.pool)
    x = lax.conv_general_dilated(
        x,
        conv.kernel.astype(x.dtype),
        window_strides=(layer.stride, layer.stride),
        padding=((layer.padding, layer.padding),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return x + conv.bias.astype(x.dtype).reshape(1, 1, 1, -1)


def _most(x: Float[Array, "b h w c"], window: int) -> Float[Array, "b _ _ c"]:
    """Maxima of windows of so many pixels with a stride of 2."""
    sizes, strides = (1, window, window, 1), (1, 2, 2, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, sizes, strides, "VALID")


@jax.custom_vjp
def _relu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    return jnp.maximum(x, 0.0)


def _relu_forward(x: Array) -> tuple[Array, Array]:
    # The gradient asks the result. Behind the barrier a compiler cannot ask what goes in instead,
    # which would have to be written too, where it now is a part of its convolution.
    y = lax.optimization_barrier(_relu(x))
    return y, y


def _relu_backward(y: Array, cotangent: Array) -> tuple[Array]:
    return (jnp.where(y > 0, cotangent, 0),)


_relu.defvjp(_relu_forward, _relu_backward)


@jax.custom_vjp
def _halve(x: Float[Array, "b h w c"]) -> Float[Array, "b _ _ c"]:
    """Maxima of 2 x 2 pixels; of equals, the first in the order of rows has the gradient."""
    return _most(x, 2)


def _halve_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    y = _most(x, 2)
    return y, (x, y)


def _halve_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array]:
    # By comparing: `reduce_window`'s own gradient notes four numbers a window and scatters.
    x, y = saved
    b, h, w, c = y.shape
    windows = x[:, : 2 * h, : 2 * w].reshape(b, h, 2, w, 2, c)
    equal = [windows[:, :, i // 2, :, i % 2] == y for i in range(3)]
    first = jnp.where(equal[0], 0, jnp.where(equal[1], 1, jnp.where(equal[2], 2, 3)))
    place = jnp.arange(4).reshape(1, 1, 2, 1, 2, 1)
    owner = place == first[:, :, None, :, None]
    found = jnp.where(owner, cotangent[:, :, None, :, None], 0).reshape(b, 2 * h, 2 * w, c)
    rest = [(0, whole - part) for whole, part in zip(x.shape, found.shape, strict=True)]
    return (jnp.pad(found, rest),)


_halve.defvjp(_halve_forward, _halve_backward)


def _length(x: Float[Array, "b h w c"]) -> Float[Array, "b h w 1"]:
    """Norms of pixels' channels in float32; where they are 0 the gradient is, instead of NaN."""
    squared = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    active = squared > 0
    return jnp.where(active, jnp.sqrt(jnp.where(active, squared, 1.0)), 0.0)


def _unit(x: Float[Array, "b h w c"], length: Float[Array, "b h w 1"]) -> Float[Array, "b h w c"]:
    return (x.astype(jnp.float32) / (length + _EPS)).astype(x.dtype)


@jax.custom_vjp
def _apart(
    x: Float[Array, "b h w c"], y: Float[Array, "b h w c"], weights: Float[Array, "c"]
) -> Float[Array, "b h w"]:
    """Weighted squared differences of unit features, of activations `x` and of a target `y`."""
    off = _unit(x, _length(x)).astype(jnp.float32) - y.astype(jnp.float32)
    # No matrix product: what GPUs and TPUs multiply by default is rounded to fewer bits.
    return jnp.sum(jnp.square(off) * weights.reshape(1, 1, 1, -1), axis=-1)


def _apart_forward(x: Array, y: Array, weights: Array) -> tuple[Array, Any]:
    length = _length(x)
    off = _unit(x, length).astype(jnp.float32) - y.astype(jnp.float32)
    weighted = off * weights.reshape(1, 1, 1, -1)
    # What the gradient takes from all channels of a pixel comes from the same reading of it.
    along = jnp.sum(weighted * x.astype(jnp.float32), axis=-1, keepdims=True)
    # Without the barrier the distance is computed with the gradient, as a sum over everything.
    total, along = lax.optimization_barrier((jnp.sum(off * weighted, axis=-1), along))
    return total, (x, y, weights, length, along)


def _apart_backward(saved: Any, cotangent: Array) -> tuple[Array, Array, Array]:
    x, y, weights, length, along = saved
    cotangent = 2.0 * cotangent[..., None]
    off = _unit(x, length).astype(jnp.float32) - y.astype(jnp.float32)
    by_unit = cotangent * off * weights.reshape(1, 1, 1, -1)
    inverse = 1.0 / (length + _EPS)
    # d unit / dx = (1 - x xT / (|x| (|x| + eps))) / (|x| + eps)
    turned = cotangent * along * inverse / jnp.maximum(length, _TINY)
    by_x = inverse * (by_unit - turned * x.astype(jnp.float32))
    by_x = jnp.where(length > 0, by_x, 0.0)
    by_weights = 0.5 * jnp.sum(cotangent * jnp.square(off), axis=(0, 1, 2))
    return by_x.astype(x.dtype), (-by_unit).astype(y.dtype), by_weights


_apart.defvjp(_apart_forward, _apart_backward)
