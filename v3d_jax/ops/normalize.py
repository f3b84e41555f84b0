"""Group and layer normalisation whose gradients keep no more than their input and statistics.

Axes: `b` clip, `t` frame, `h w` image, `c` channel; `u` is `t`, or 1 for statistics of whole clips.
Computed in float32 whatever the type of `x`, which is that of the result. What costs time is passes
over `x`: one for statistics and one for the result; in the gradient one for sums and one for the
result, and both compute anew what lies between.

Left alone, XLA shares what two passes have in common by writing it to memory, in float32. It takes
terms for different ones if statistics went through a barrier, which costs nothing.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Clips = Float[Array, "b t h w c"]
Stats = Float[Array, "b u 1 1 c"]
Rows = Float[Array, "*n c"]
Channels = Float[Array, " c"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def group_norm(
    x: Clips,
    scale: Channels,
    bias: Channels,
    groups: int,
    eps: float,
    over_frames: bool = False,
    silu: bool = False,
) -> Clips:
    """Normalises groups of channels over a frame or a clip; SiLU of that with `silu`."""
    return _group_norm(x, scale, bias, groups, eps, over_frames, silu)[0]


def _group_norm(
    x: Clips,
    scale: Channels,
    bias: Channels,
    groups: int,
    eps: float,
    over_frames: bool,
    silu: bool,
) -> tuple[Clips, Any]:
    mean, inverse = group_statistics(x, groups, eps, over_frames)
    return apply_statistics(x, scale, bias, mean, inverse, silu), (x, scale, bias, mean, inverse)


def apply_statistics(
    x: Clips, scale: Channels, bias: Channels, mean: Stats, inverse: Stats, silu: bool
) -> Clips:
    """Normalises by given statistics, which may be those of more frames than `x` has."""
    gain = inverse * _last(scale)
    y = x.astype(jnp.float32) * gain + (_last(bias) - mean * gain)
    y = jax.nn.silu(y) if silu else y
    return y.astype(x.dtype)


def group_statistics(x: Clips, groups: int, eps: float, over_frames: bool) -> tuple[Stats, Stats]:
    """Mean and inverse deviation of every channel's group, from one pass over the data.

    Sums per channel of the deviation from the channel's first value (so that a large mean does not
    cancel the variance), then combined into groups by the law of total variance.
    """
    x = x.astype(jnp.float32)
    first = x[:, :1, :1, :1] if over_frames else x[:, :, :1, :1]
    shift, square = deviations(x, first, over_frames)
    return combine(first, shift, square, groups, eps)


def deviations(x: Clips, first: Stats, over_frames: bool) -> tuple[Stats, Stats]:
    """Means of every channel's deviation from `first` and of its square."""
    axes = (1, 2, 3) if over_frames else (2, 3)
    deviation = x.astype(jnp.float32) - first
    return (
        jnp.mean(deviation, axes, keepdims=True),
        jnp.mean(jnp.square(deviation), axes, keepdims=True),
    )


def combine(
    first: Stats, shift: Stats, square: Stats, groups: int, eps: float
) -> tuple[Stats, Stats]:
    """Mean and inverse deviation of groups from what `deviations` tells of their channels."""
    mean = first + shift
    group_mean = _group(mean, groups)
    within = jnp.maximum(square - jnp.square(shift), 0.0)
    variance = _group(within + jnp.square(mean - group_mean), groups)
    return group_mean, jax.lax.rsqrt(variance + eps)


def _group_norm_gradient(
    groups: int, eps: float, over_frames: bool, silu: bool, saved: Any, g: Clips
) -> tuple[Clips, Channels, Channels]:
    x, scale, bias, mean, inverse = saved
    axes = (1, 2, 3) if over_frames else (2, 3)

    def terms(mean: Stats, inverse: Stats) -> tuple[Clips, Clips]:
        """The normalised input, and the gradient of its product with `scale`."""
        normal = (x.astype(jnp.float32) - mean) * inverse
        slope = 1.0
        if silu:
            y = normal * _last(scale) + _last(bias)
            gate = jax.nn.sigmoid(y)
            slope = gate * (1.0 + y * (1.0 - gate))
        return normal, g.astype(jnp.float32) * slope

    normal, inner = terms(mean, inverse)
    d_bias = jnp.mean(inner, axes, keepdims=True)
    d_scale = jnp.mean(inner * normal, axes, keepdims=True)
    mean, inverse, offset, along = jax.lax.optimization_barrier(
        (
            mean,
            inverse,
            _group(d_bias * _last(scale), groups),
            _group(d_scale * _last(scale), groups),
        )
    )
    normal, inner = terms(mean, inverse)
    dx = inverse * (inner * _last(scale) - offset - normal * along)
    count = x.size // d_bias.size
    return dx.astype(x.dtype), *(count * jnp.sum(d, (0, 1, 2, 3)) for d in (d_scale, d_bias))


group_norm.defvjp(_group_norm, _group_norm_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: Rows, scale: Channels, bias: Channels, eps: float) -> Rows:
    """Normalises every row."""
    return _layer_norm(x, scale, bias, eps)[0]


def _layer_norm(x: Rows, scale: Channels, bias: Channels, eps: float) -> tuple[Rows, Any]:
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    centred = wide - mean
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    y = centred * inverse * _last(scale, x.ndim) + _last(bias, x.ndim)
    return y.astype(x.dtype), (x, scale, mean, inverse)


def _layer_norm_gradient(eps: float, saved: Any, g: Rows) -> tuple[Rows, Channels, Channels]:
    x, scale, mean, inverse = saved
    rows, wide, g = tuple(range(x.ndim - 1)), x.astype(jnp.float32), g.astype(jnp.float32)
    d_scale = jnp.sum(g * ((wide - mean) * inverse), rows)
    mean, inverse = jax.lax.optimization_barrier((mean, inverse))
    normal, inner = (wide - mean) * inverse, g * _last(scale, x.ndim)
    offset = jnp.mean(inner, axis=-1, keepdims=True)
    along = jnp.mean(inner * normal, axis=-1, keepdims=True)
    return (inverse * (inner - offset - normal * along)).astype(x.dtype), d_scale, jnp.sum(g, rows)


layer_norm.defvjp(_layer_norm, _layer_norm_gradient)


def _last(x: Channels, ndim: int = 5) -> Float[Array, "*one c"]:
    """Along the last of `ndim` axes."""
    return x.reshape((1,) * (ndim - 1) + (-1,))


def _group(x: Stats, groups: int) -> Stats:
    """Every channel replaced by its group's mean."""
    split = x.reshape(*x.shape[:-1], groups, -1)
    mean = jnp.mean(split, axis=-1, keepdims=True)
    return jnp.broadcast_to(mean, split.shape).reshape(x.shape)
