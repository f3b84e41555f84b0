"""Layers shared by the UNet and the autoencoder.

Axes: `b` clip, `t` frame, `h w` image, `s` image tokens (h w in row-major order), `c` channel.
Parameters are float32; `dtype` is that of activations. Normalisation and sinusoids are computed in
float32 whatever `dtype` is.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from v3d_jax.ops import attention, frame_attention, normalize
from v3d_jax.parallel import sharding

GROUPS = 32

# What a gradient stores: everything; of each block its input (True means this, False "none"); of
# each block its input and the results of matrix products and convolutions.
Remat = Literal["none", "blocks", "dots"]


class Keys(nnx.Rngs):
    """Keys for initialisers: the i-th is `key` folded with i, counted in Python.

    The counter of an `nnx.Rngs` is an array, and updating it under tracing takes time that grows
    with the trace: 15 s for the published UNet where this takes 2 s.
    """

    def __init__(self, key: jax.Array):
        self.key = key
        self.drawn = 0

    def params(self) -> jax.Array:
        """The next key."""
        self.drawn += 1
        return jax.random.fold_in(self.key, self.drawn)


def sinusoid(t: Float[Array, "*n"], dim: int, max_period: float = 10000.0) -> Float[Array, "*n d"]:
    """Sinusoidal embedding of any real `t`: `dim / 2` cosines, then as many sines, in float32.

    Frequencies are max_period^(-i / (dim / 2)), i = 0 .. dim / 2 - 1; `dim` must be even.
    """
    if dim % 2:
        raise ValueError(f"sinusoid: dim must be even, got {dim}")
    half = dim // 2
    frequencies = jnp.exp(-math.log(max_period) / half * jnp.arange(half, dtype=jnp.float32))
    angles = jnp.einsum(
        "...,f->...f", t.astype(jnp.float32), frequencies, precision=jax.lax.Precision.HIGHEST
    )
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def promote_dtype(arrays: tuple[Any, ...], *, dtype: Any) -> tuple[Any, ...]:
    """A layer's input, kernel and bias in the type that it computes in, the kernel whole."""
    x, kernel, bias = (None if array is None else jnp.asarray(array, dtype) for array in arrays)
    return x, sharding.whole(kernel), bias


def linear(
    inputs: int, outputs: int, *, bias: bool = True, zero: bool = False, dtype: Any, rngs: nnx.Rngs
) -> nnx.Linear:
    """A linear layer, LeCun-normal or, with `zero`, all zeros."""
    kernel_init = nnx.initializers.zeros_init() if zero else nnx.initializers.lecun_normal()
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        kernel_init=kernel_init,
        dtype=dtype,
        promote_dtype=promote_dtype,
        rngs=rngs,
    )


class Conv(nnx.Conv):
    """A convolution over (h, w) of every frame of a clip."""

    def __call__(self, x: Float[Array, "b t h w i"]) -> Float[Array, "b t _ _ o"]:
        """Frames stay apart, also where devices share a clip."""
        return sharding.each_frame(super().__call__, x)


def conv(
    inputs: int,
    outputs: int,
    *,
    stride: int = 1,
    padding: Any = 1,
    zero: bool = False,
    dtype: Any,
    rngs: nnx.Rngs,
) -> Conv:
    """A 3x3 convolution over (h, w), LeCun-normal or, with `zero`, all zeros."""
    kernel_init = nnx.initializers.zeros_init() if zero else nnx.initializers.lecun_normal()
    return Conv(
        inputs,
        outputs,
        (3, 3),
        strides=stride,
        padding=padding,
        kernel_init=kernel_init,
        dtype=dtype,
        promote_dtype=promote_dtype,
        rngs=rngs,
    )


class TemporalConv(nnx.Module):
    """A convolution over three frames, zero-padded in time: a 3D kernel of (3, 1, 1)."""

    def __init__(
        self, inputs: int, outputs: int, *, kernel_init: Any = None, dtype: Any, rngs: nnx.Rngs
    ):
        kernel_init = kernel_init or nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(kernel_init(rngs.params(), (3, inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b t h w i"]) -> Float[Array, "b t h w o"]:
        """Mixes every pixel with itself in the previous and the next frame."""
        b, t, h, w, c = x.shape
        kernel = sharding.whole(self.kernel[...].astype(self.dtype))
        x = x.astype(self.dtype).reshape(b, t, h * w, c)
        if t == 1:
            # Two taps see padding alone. Of the convolution XLA makes, on a GPU, the gradient of
            # one whose kernels have h w pixels.
            y = jnp.einsum("btsi,io->btso", x, kernel[1])
        else:
            y = jax.lax.conv_general_dilated(
                x,
                kernel[:, None],
                window_strides=(1, 1),
                padding=((1, 1), (0, 0)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        bias = self.bias[...].astype(self.dtype).reshape(1, 1, 1, -1)
        return (y + bias).reshape(b, t, h, w, -1)


class GroupNorm(nnx.Module):
    """Group normalisation over a frame or, with `over_frames`, over a whole clip."""

    def __init__(
        self, channels: int, *, eps: float, groups: int = GROUPS, over_frames: bool = False
    ):
        if channels % groups:
            raise ValueError(f"group norm: {channels} channels do not divide into {groups} groups")
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))
        self.eps = eps
        self.groups = groups
        self.over_frames = over_frames

    def __call__(
        self, x: Float[Array, "b t h w c"], *, silu: bool = False
    ) -> Float[Array, "b t h w c"]:
        """Normalises in float32 and returns the dtype of `x`; with `silu`, SiLU of the result."""
        scale, bias = jnp.asarray(self.scale[...]), jnp.asarray(self.bias[...])
        return normalize.group_norm(x, scale, bias, self.groups, self.eps, self.over_frames, silu)


class LayerNorm(nnx.Module):
    """Layer normalisation over channels, computed in float32."""

    def __init__(self, channels: int, *, eps: float = 1e-5):
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        """Normalises in float32 and returns the dtype of `x`."""
        scale, bias = jnp.asarray(self.scale[...]), jnp.asarray(self.bias[...])
        return normalize.layer_norm(x, scale, bias, self.eps)


class MLP(nnx.Module):
    """Linear, SiLU, Linear: the embedding of noise level, vector or frame index."""

    def __init__(self, inputs: int, hidden: int, outputs: int, *, dtype: Any, rngs: nnx.Rngs):
        self.linear1 = linear(inputs, hidden, dtype=dtype, rngs=rngs)
        self.linear2 = linear(hidden, outputs, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        """Embeds the last axis."""
        return self.linear2(nnx.silu(self.linear1(x)))


class FeedForward(nnx.Module):
    """Gated feed-forward (GEGLU) of four times the width: value * GELU(gate), exact erf GELU."""

    def __init__(self, channels: int, *, dtype: Any, rngs: nnx.Rngs):
        self.proj = linear(channels, 8 * channels, dtype=dtype, rngs=rngs)
        self.out = linear(4 * channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        """Applies to every token alone.

        For the gradient the projected tokens are kept and not their gated product, which is made
        again from them: these are the widest arrays of a transformer. A gathered kernel is kept.
        """
        graphdef, params = nnx.split(self.out)
        narrow = jax.checkpoint(
            lambda params, x: nnx.merge(graphdef, params)(_gated(x)),
            policy=jax.checkpoint_policies.save_only_these_names(sharding.WHOLE),
        )
        return narrow(params, self.proj(x))


@jax.checkpoint
def _gated(x: Float[Array, "*n both"]) -> Float[Array, "*n c"]:
    """The first half of the channels times GELU of the second, computed in float32.

    While a gradient makes it again, its float32 is not kept either. By erf, because erfc, exact far
    below zero, is as slow as reading them.
    """
    value, gate = (half.astype(jnp.float32) for half in jnp.split(x, 2, axis=-1))
    cumulative = 0.5 + 0.5 * jax.lax.erf(gate * math.sqrt(0.5))
    return (value * (gate * cumulative)).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head attention of tokens to themselves or to a context; only the output has a bias."""

    def __init__(
        self,
        channels: int,
        *,
        head_channels: int,
        context_dim: int | None = None,
        impl: attention.Implementation | None = None,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        if channels % head_channels:
            raise ValueError(f"attention: {channels} channels in heads of {head_channels}")
        context_dim = context_dim or channels
        self.to_q = linear(channels, channels, bias=False, dtype=dtype, rngs=rngs)
        self.to_k = linear(context_dim, channels, bias=False, dtype=dtype, rngs=rngs)
        self.to_v = linear(context_dim, channels, bias=False, dtype=dtype, rngs=rngs)
        self.to_out = linear(channels, channels, dtype=dtype, rngs=rngs)
        self.head_channels = head_channels
        self.impl = impl

    def __call__(
        self, x: Float[Array, "b n c"], context: Float[Array, "b m d"] | None = None
    ) -> Float[Array, "b n c"]:
        """Attends to `context`, or to `x` itself."""
        context = x if context is None else context
        q, k, v = (self._heads(y) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out(attention.attention(q, k, v, impl=self.impl).reshape(x.shape))

    def across_frames(self, x: Float[Array, "b t s c"]) -> Float[Array, "b t s c"]:
        """Every pixel attends to itself in all frames."""
        q, k, v = (
            layer(x).reshape(*x.shape[:3], -1, self.head_channels)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out(sharding.each_clip(frame_attention.attention, q, k, v).reshape(x.shape))

    def one_key(self, context: Float[Array, "*n d"]) -> Float[Array, "*n c"]:
        """The result for any query where the context is a single token: the softmax is then 1."""
        return self.to_out(self.to_v(context))

    def _heads(self, x: Float[Array, "b n c"]) -> Float[Array, "b n h d"]:
        return x.reshape(*x.shape[:2], -1, self.head_channels)


def upsample(x: Float[Array, "b t h w c"]) -> Float[Array, "b t 2*h 2*w c"]:
    """Doubles height and width by repeating pixels."""
    b, t, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, :, None, :, None], (b, t, h, 2, w, 2, c))
    return x.reshape(b, t, 2 * h, 2 * w, c)


def call(block: nnx.Module, *args: Any, remat: bool | Remat) -> Any:
    """`block(*args)`; with `remat` the gradient recomputes the block instead of storing it.

    A gradient that recomputes takes what it needs of weights anew: where they are split over
    devices, it gathers them a second time and holds no block's for longer than that block.
    """
    if remat in (False, "none"):
        return block(*args)
    graphdef, params = nnx.split(block)
    pure = jax.checkpoint(
        lambda params, *args: nnx.merge(graphdef, params)(*args),
        policy=_is_product if remat == "dots" else None,
    )
    return pure(params, *args)


def _is_product(primitive: Any, *_: Any, **__: Any) -> bool:
    """A matrix product or a convolution: what takes time to compute again."""
    return primitive.name in ("dot_general", "conv_general_dilated")
