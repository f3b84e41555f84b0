"""Blocks that work on a clip: a layer per frame, a layer across frames, and their blend.

Axes: `b` clip, `t` frame, `h w` image, `s` image tokens, `c` channel. `image_only` marks frames
that are images rather than parts of a clip; they keep the spatial result. Source: Stable Video
Diffusion (arXiv 2311.15127), whose networks V3D keeps.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from v3d_jax.nn import layers
from v3d_jax.ops import attention
from v3d_jax.parallel import sharding


class Answer(NamedTuple):
    """The result of cross-attention to a context of one token, for all queries of a frame or clip.

    The softmax over one key is 1: only the context decides, so one computation serves all steps.
    """

    value: Float[Array, "b u 1 c"]


class Answers(NamedTuple):
    """Those of one transformer: per frame, and across frames."""

    spatial: Answer
    temporal: Answer


class Blend(nnx.Module):
    """A learned mean of the spatial and the temporal result with weight alpha = sigmoid(factor).

    alpha weighs the spatial result in the UNet and, with `alpha_weighs_temporal`, the temporal one
    in the autoencoder.
    """

    def __init__(self, factor: float, *, alpha_weighs_temporal: bool = False):
        self.mix_factor = nnx.Param(jnp.full((1,), factor, jnp.float32))
        self.alpha_weighs_temporal = alpha_weighs_temporal

    def __call__(
        self,
        spatial: Float[Array, "b t h w c"],
        temporal: Float[Array, "b t h w c"],
        image_only: Bool[Array, "b t"] | None = None,
    ) -> Float[Array, "b t h w c"]:
        """Blends in float32; frames marked `image_only` are the spatial result."""
        alpha = jax.nn.sigmoid(self.mix_factor[...]).reshape(1, 1, 1, 1, 1)
        weight = 1 - alpha if self.alpha_weighs_temporal else alpha
        if image_only is not None:
            weight = jnp.where(image_only[:, :, None, None, None], 1.0, weight)
        return _mean(weight, spatial, temporal)


@jax.checkpoint
def _mean(
    weight: Float[Array, "#b #t 1 1 1"],
    spatial: Float[Array, "b t h w c"],
    temporal: Float[Array, "b t h w c"],
) -> Float[Array, "b t h w c"]:
    """In float32, of which nothing is kept for the gradient."""
    blended = weight * spatial.astype(jnp.float32) + (1 - weight) * temporal.astype(jnp.float32)
    return blended.astype(spatial.dtype)


class ResBlock(nnx.Module):
    """Residual block per frame, with an optional embedding added between its two convolutions."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        emb_dim: int | None = None,
        eps: float,
        zero: bool,
        groups: int = layers.GROUPS,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.norm1 = layers.GroupNorm(inputs, eps=eps, groups=groups)
        self.conv1 = layers.conv(inputs, outputs, dtype=dtype, rngs=rngs)
        self.emb = layers.linear(emb_dim, outputs, dtype=dtype, rngs=rngs) if emb_dim else None
        self.norm2 = layers.GroupNorm(outputs, eps=eps, groups=groups)
        self.conv2 = layers.conv(outputs, outputs, zero=zero, dtype=dtype, rngs=rngs)
        changes = inputs != outputs
        self.skip = layers.linear(inputs, outputs, dtype=dtype, rngs=rngs) if changes else None

    def __call__(
        self, x: Float[Array, "b t h w i"], emb: Float[Array, "b t e"] | None = None
    ) -> Float[Array, "b t h w o"]:
        """`emb` is one embedding a frame."""
        h = self.conv1(self.norm1(x, silu=True))
        if self.emb is not None:
            h = h + self.emb(nnx.silu(emb))[:, :, None, None, :]
        h = self.conv2(self.norm2(h, silu=True))
        return (x if self.skip is None else self.skip(x)) + h


class TemporalResBlock(nnx.Module):
    """Residual block across frames: normalised over the whole clip, convolved over time only."""

    def __init__(
        self,
        channels: int,
        *,
        emb_dim: int | None = None,
        groups: int = layers.GROUPS,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        norm = {"eps": 1e-5, "groups": groups, "over_frames": True}
        self.norm1 = layers.GroupNorm(channels, **norm)
        self.conv1 = layers.TemporalConv(channels, channels, dtype=dtype, rngs=rngs)
        self.emb = layers.linear(emb_dim, channels, dtype=dtype, rngs=rngs) if emb_dim else None
        self.norm2 = layers.GroupNorm(channels, **norm)
        zeros = nnx.initializers.zeros_init()
        self.conv2 = layers.TemporalConv(
            channels, channels, kernel_init=zeros, dtype=dtype, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "b t h w c"], emb: Float[Array, "b t e"] | None = None
    ) -> Float[Array, "b t h w c"]:
        """`emb` is one embedding a frame."""
        h = self.conv1(self.norm1(x, silu=True))
        if self.emb is not None:
            h = h + self.emb(nnx.silu(emb))[:, :, None, None, :]
        return x + self.conv2(self.norm2(h, silu=True))


class VideoResBlock(nnx.Module):
    """A residual block per frame, one across frames on its result, and their blend."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        emb_dim: int,
        groups: int = layers.GROUPS,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        settings = {"emb_dim": emb_dim, "groups": groups, "dtype": dtype, "rngs": rngs}
        self.spatial = ResBlock(inputs, outputs, eps=1e-5, zero=True, **settings)
        self.temporal = TemporalResBlock(outputs, **settings)
        self.mix = Blend(0.5)

    def __call__(
        self,
        x: Float[Array, "b t h w x"],
        emb: Float[Array, "b t e"],
        image_only: Bool[Array, "b t"] | None = None,
        skip: Float[Array, "b t h w s"] | None = None,
    ) -> Float[Array, "b t h w o"]:
        """`emb` is one embedding a frame; `skip` becomes the last channels of `x`.

        Joined here, a gradient that recomputes the block stores both apart, where others have them.
        """
        x = x if skip is None else jnp.concatenate([x, skip], axis=-1)
        spatial = self.spatial(x, emb)
        return self.mix(spatial, self.temporal(spatial, emb), image_only)


class SpatialBlock(nnx.Module):
    """Transformer block on the tokens of each frame: self-attention, context, feed-forward."""

    def __init__(
        self,
        channels: int,
        *,
        head_channels: int,
        context_dim: int,
        impl: attention.Implementation | None,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.norm1 = layers.LayerNorm(channels)
        self.attn1 = layers.Attention(
            channels, head_channels=head_channels, impl=impl, dtype=dtype, rngs=rngs
        )
        self.norm2 = layers.LayerNorm(channels)
        self.attn2 = layers.Attention(
            channels,
            head_channels=head_channels,
            context_dim=context_dim,
            impl=impl,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm3 = layers.LayerNorm(channels)
        self.ff = layers.FeedForward(channels, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t s c"], context: Float[Array, "b #t n d"] | Answer
    ) -> Float[Array, "b t s c"]:
        """`context` is per frame, or one for the clip."""
        x = x + sharding.each_frame(self._attend, self.norm1(x))
        x = x + attend_context(self.attn2, self.norm2, x, context)
        return x + self.ff(self.norm3(x))

    def _attend(self, x: Float[Array, "b t s c"]) -> Float[Array, "b t s c"]:
        """Tokens attend to those of their frame."""
        return self.attn1(x.reshape(-1, *x.shape[2:])).reshape(x.shape)


class TemporalBlock(nnx.Module):
    """Transformer block on each pixel across frames, with a feed-forward layer in front."""

    def __init__(
        self,
        channels: int,
        *,
        head_channels: int,
        context_dim: int,
        impl: attention.Implementation | None,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.norm_in = layers.LayerNorm(channels)
        self.ff_in = layers.FeedForward(channels, dtype=dtype, rngs=rngs)
        self.norm1 = layers.LayerNorm(channels)
        self.attn1 = layers.Attention(channels, head_channels=head_channels, dtype=dtype, rngs=rngs)
        self.norm2 = layers.LayerNorm(channels)
        self.attn2 = layers.Attention(
            channels,
            head_channels=head_channels,
            context_dim=context_dim,
            impl=impl,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm3 = layers.LayerNorm(channels)
        self.ff = layers.FeedForward(channels, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t s c"], context: Float[Array, "b 1 n d"] | Answer
    ) -> Float[Array, "b t s c"]:
        """`context` is one for the clip."""
        x = x + self.ff_in(self.norm_in(x))
        x = x + self.attn1.across_frames(self.norm1(x))
        x = x + attend_context(self.attn2, self.norm2, x, context)
        return x + self.ff(self.norm3(x))


def attend_context(
    attn: layers.Attention,
    norm: layers.LayerNorm,
    x: Float[Array, "b t s c"],
    context: Float[Array, "b u n d"] | Answer,
) -> Float[Array, "b #t #s c"]:
    """Cross-attention of every token to its frame's context, or to the clip's where u is 1.

    Each query stands alone, so a context shared by the clip takes the tokens of all its frames as
    one sequence and is never repeated. A single token gives all queries one answer, [b, u, 1, c].
    """
    if isinstance(context, Answer):
        return context.value
    b, t, s, c = x.shape
    u, n = context.shape[1:3]
    if n == 1:
        return attn.one_key(context)
    context = context.reshape(b * u, n, -1)
    queries = norm(x).reshape(b * u, (t // u) * s, c)
    return attn(queries, context).reshape(b, t, s, c)


class SpatialVideoTransformer(nnx.Module):
    """A transformer per frame, one across frames on its result, their blend, and a residual."""

    def __init__(
        self,
        channels: int,
        *,
        head_channels: int,
        context_dim: int,
        impl: attention.Implementation | None = None,
        groups: int = layers.GROUPS,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        settings = {
            "head_channels": head_channels,
            "context_dim": context_dim,
            "impl": impl,
            "dtype": dtype,
            "rngs": rngs,
        }
        self.norm = layers.GroupNorm(channels, eps=1e-6, groups=groups)
        self.proj_in = layers.linear(channels, channels, dtype=dtype, rngs=rngs)
        self.spatial = SpatialBlock(channels, **settings)
        self.frame_embed = layers.MLP(channels, 4 * channels, channels, dtype=dtype, rngs=rngs)
        self.temporal = TemporalBlock(channels, **settings)
        self.mix = Blend(0.5)
        self.proj_out = layers.linear(channels, channels, zero=True, dtype=dtype, rngs=rngs)

    def answers(self, context: Float[Array, "b #t 1 d"]) -> Answers:
        """What stands for a context of one token in `__call__`."""
        return Answers(
            Answer(self.spatial.attn2.one_key(context)),
            Answer(self.temporal.attn2.one_key(context[:, :1])),
        )

    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        context: Float[Array, "b #t n d"] | Answers,
        image_only: Bool[Array, "b t"] | None = None,
    ) -> Float[Array, "b t h w c"]:
        """Frames attend to their own context, the clip to that of frame 0."""
        b, t, h, w, c = x.shape
        own, shared = context if isinstance(context, Answers) else (context, context[:, :1])
        tokens = self.proj_in(self.norm(x)).reshape(b, t, h * w, c)
        spatial = self.spatial(tokens, own)
        index = self.frame_embed(layers.sinusoid(jnp.arange(t, dtype=jnp.float32), c))
        temporal = self.temporal(spatial + index[None, :, None, :], shared)
        blended = self.mix(spatial.reshape(x.shape), temporal.reshape(x.shape), image_only)
        return x + self.proj_out(blended)
