"""The autoencoder of latents: an encoder of images and a decoder of clips.

Axes: `b` clip, `t` frame, `h w` image, `c` channel. Images are in [-1, 1]. Latents here are those
of the encoder; the diffusion model's are `scale_factor` times these. Levels are numbered from full
resolution down. Source: arXiv 2311.15127, appendix D (the decoder with layers across frames).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from v3d_jax.nn import layers, spatiotemporal
from v3d_jax.ops import attention

EPS = 1e-6
# Of an untrained encoder. From a unit variance, training finds shapes first and leaves colour, a
# small part of the error, under the noise for long.
INITIAL_LOGVAR = -6.0


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the autoencoder; the defaults are those of SVD and V3D.

    `channel_mult` has one entry a level, each level but the last halves the image; a level has
    `num_res_blocks` blocks in the encoder and one more in the decoder. Every width must divide by
    `groups`, those of group normalisation. `remat` recomputes blocks in the backward pass. With
    `frames_alone` the decoder takes every frame as a clip of its own, for weights trained so.
    """

    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latent_channels: int = 4
    groups: int = layers.GROUPS
    scale_factor: float = 0.18215
    frames_alone: bool = False
    remat: bool = False
    attention_impl: attention.Implementation | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.channels * mult for mult in self.channel_mult)

    @property
    def factor(self) -> int:
        """Pixels of an image along a side of one latent pixel."""
        return 2 ** (len(self.channel_mult) - 1)


class Posterior(NamedTuple):
    """Diagonal Gaussian over the latents of an image; `mean` is its mode."""

    mean: Float[Array, "*b h w c"]
    logvar: Float[Array, "*b h w c"]

    def sample(self, key: jax.Array) -> Float[Array, "*b h w c"]:
        """One draw."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    def kl(self) -> Float[Array, "*b"]:
        """KL divergence from the standard normal in nats, summed over each image's latents."""
        terms = jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * jnp.sum(terms, axis=(-3, -2, -1))


class AttentionBlock(nnx.Module):
    """Residual single-head attention between the pixels of a frame."""

    def __init__(
        self,
        channels: int,
        *,
        impl: attention.Implementation | None,
        groups: int,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        settings = {"dtype": dtype, "rngs": rngs}
        self.norm = layers.GroupNorm(channels, eps=EPS, groups=groups)
        self.to_q = layers.linear(channels, channels, **settings)
        self.to_k = layers.linear(channels, channels, **settings)
        self.to_v = layers.linear(channels, channels, **settings)
        self.to_out = layers.linear(channels, channels, **settings)
        self.impl = impl

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        """Attends within each frame."""
        b, t, h, w, c = x.shape
        tokens = self.norm(x).reshape(b * t, h * w, c)
        q, k, v = (f(tokens)[:, :, None, :] for f in (self.to_q, self.to_k, self.to_v))
        out = attention.attention(q, k, v, impl=self.impl)
        return x + self.to_out(out[:, :, 0, :]).reshape(x.shape)


class TemporalBlock(nnx.Module):
    """A residual block per frame, one across frames on its result, and their blend."""

    def __init__(self, inputs: int, outputs: int, *, groups: int, dtype: Any, rngs: nnx.Rngs):
        settings = {"groups": groups, "dtype": dtype, "rngs": rngs}
        self.spatial = spatiotemporal.ResBlock(inputs, outputs, eps=EPS, zero=False, **settings)
        self.temporal = spatiotemporal.TemporalResBlock(outputs, **settings)
        self.mix = spatiotemporal.Blend(0.0, alpha_weighs_temporal=True)

    def __call__(self, x: Float[Array, "b t h w i"]) -> Float[Array, "b t h w o"]:
        """Takes the frames of one clip."""
        spatial = self.spatial(x)
        return self.mix(spatial, self.temporal(spatial))


class Level(nnx.Module):
    """The blocks of one level, and the convolution that leaves it (None on the last)."""

    def __init__(self, blocks: list[nnx.Module], resample: nnx.Conv | None):
        self.blocks = nnx.List(blocks)
        self.resample = resample


class Encoder(nnx.Module):
    """Image to the moments of its posterior; knows nothing of time."""

    def __init__(self, config: AutoencoderConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.config = config
        settings = {"dtype": dtype, "rngs": rngs}
        res_block = {"eps": EPS, "zero": False, "groups": config.groups, **settings}
        channels = config.channels
        self.conv_in = layers.conv(3, channels, **settings)
        levels = []
        for level, width in enumerate(config.widths):
            inputs = (channels,) + (width,) * (config.num_res_blocks - 1)
            blocks = [spatiotemporal.ResBlock(i, width, **res_block) for i in inputs]
            resample = None
            if level < len(config.widths) - 1:
                # One pixel of padding, right and below only.
                padding = ((0, 1), (0, 1))
                resample = layers.conv(width, width, stride=2, padding=padding, **settings)
            levels.append(Level(blocks, resample))
            channels = width
        self.down = nnx.List(levels)
        self.mid1 = spatiotemporal.ResBlock(channels, channels, **res_block)
        self.attn = AttentionBlock(
            channels, impl=config.attention_impl, groups=config.groups, **settings
        )
        self.mid2 = spatiotemporal.ResBlock(channels, channels, **res_block)
        self.norm_out = layers.GroupNorm(channels, eps=EPS, groups=config.groups)
        self.conv_out = layers.conv(channels, 2 * config.latent_channels, **settings)
        self.conv_out.bias[...] = jnp.repeat(
            jnp.asarray([0.0, INITIAL_LOGVAR]), config.latent_channels
        )

    def __call__(self, images: Float[Array, "b t h w 3"]) -> Float[Array, "b t i j m"]:
        """Means, then log-variances, on the last axis."""
        run, remat = layers.call, self.config.remat
        x = self.conv_in(images)
        for level in self.down:
            for block in level.blocks:
                x = run(block, x, remat=remat)
            if level.resample is not None:
                x = level.resample(x)
        for block in (self.mid1, self.attn, self.mid2):
            x = run(block, x, remat=remat)
        return self.conv_out(self.norm_out(x, silu=True))


class TemporalDecoder(nnx.Module):
    """Latents of a clip to its frames, with convolutions across frames in every block."""

    def __init__(self, config: AutoencoderConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.config = config
        settings = {"dtype": dtype, "rngs": rngs}
        channels = config.widths[-1]
        self.conv_in = layers.conv(config.latent_channels, channels, **settings)
        self.mid1 = TemporalBlock(channels, channels, groups=config.groups, **settings)
        self.attn = AttentionBlock(
            channels, impl=config.attention_impl, groups=config.groups, **settings
        )
        self.mid2 = TemporalBlock(channels, channels, groups=config.groups, **settings)
        levels = []
        for level, width in reversed(list(enumerate(config.widths))):
            inputs = (channels,) + (width,) * config.num_res_blocks
            blocks = [TemporalBlock(i, width, groups=config.groups, **settings) for i in inputs]
            resample = layers.conv(width, width, **settings) if level > 0 else None
            levels.append(Level(blocks, resample))
            channels = width
        # Numbered as levels are: up[0] is full resolution and runs last.
        self.up = nnx.List(levels[::-1])
        self.norm_out = layers.GroupNorm(channels, eps=EPS, groups=config.groups)
        self.conv_out = layers.conv(channels, 3, **settings)
        # Starts as the identity: an untrained decoder is one of images.
        self.time_mix_conv = layers.TemporalConv(3, 3, kernel_init=_identity, **settings)

    def __call__(self, latents: Float[Array, "b t i j c"]) -> Float[Array, "b t h w 3"]:
        """Takes the frames of one clip, or of a chunk of it."""
        run, remat = layers.call, self.config.remat
        x = self.conv_in(latents)
        for block in (self.mid1, self.attn, self.mid2):
            x = run(block, x, remat=remat)
        for level in reversed(self.up):
            for block in level.blocks:
                x = run(block, x, remat=remat)
            if level.resample is not None:
                x = level.resample(layers.upsample(x))
        return self.time_mix_conv(self.conv_out(self.norm_out(x, silu=True)))


def _identity(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> Float[Array, "3 i o"]:
    """A temporal kernel that passes the middle frame on."""
    del key
    return jnp.zeros(shape, dtype).at[1].set(jnp.eye(*shape[1:], dtype=dtype))


class Autoencoder(nnx.Module):
    """Encoder of images and decoder of clips; either part may be used alone."""

    def __init__(self, config: AutoencoderConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        rngs = layers.Keys(rngs.params())
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.decoder = TemporalDecoder(config, dtype=dtype, rngs=rngs)

    def encode(self, images: Float[Array, "b h w 3"]) -> Posterior:
        """Posterior of the unscaled latents, in float32, log-variance clamped to [-30, 20].

        Latents have 1 / `config.factor` of the height and width, which must divide by it.
        """
        factor = self.config.factor
        if images.shape[1] % factor or images.shape[2] % factor:
            raise ValueError(f"encode: images of {images.shape[1:3]} do not divide by {factor}")
        moments = self.encoder(images[:, None])[:, 0].astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(self, latents: Float[Array, "b t i j c"]) -> Float[Array, "b t h w 3"]:
        """Frames in about [-1, 1] of unscaled latents, in the dtype of `latents`.

        Frames outside the given ones count as zero, so decoding in chunks changes the result,
        unless `config.frames_alone`.
        """
        if not self.config.frames_alone:
            return self.decoder(latents).astype(latents.dtype)
        clips = latents.reshape(-1, 1, *latents.shape[2:])
        frames = self.decoder(clips).astype(latents.dtype)
        return frames.reshape(*latents.shape[:2], *frames.shape[2:])
