"""The video UNet of Stable Video Diffusion, which V3D trains without changing it.

Axes: `b` clip, `t` frame, `h w` latent image, `c` channel, `n` context tokens, `a` vector. Levels
are numbered from full resolution down. Source: arXiv 2311.15127, appendix D; V3D section 3.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from v3d_jax.nn import layers, spatiotemporal
from v3d_jax.ops import attention
from v3d_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Sizes of the UNet; the defaults are those of SVD-XT and of V3D at 512 pixels.

    `channel_mult` has one entry a level; a level has `num_res_blocks` blocks on the way down and
    one more on the way up. Levels whose downsampling factor is in `attention_resolutions` have
    transformers, the middle always has one. Every width must divide by `groups`, those of
    group normalisation, and where there is attention by `head_channels`. `remat` says what of
    residual blocks and transformers the backward pass computes again (`layers.Remat`).
    """

    in_channels: int = 8
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (4, 2, 1)
    head_channels: int = 64
    context_dim: int = 1024
    vector_dim: int = 768
    groups: int = layers.GROUPS
    remat: bool | layers.Remat = False
    attention_impl: attention.Implementation | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.model_channels * mult for mult in self.channel_mult)

    @property
    def emb_dim(self) -> int:
        """Channels of the embedding of noise level and vector."""
        return 4 * self.model_channels

    def has_attention(self, level: int) -> bool:
        """Whether the blocks of a level have transformers."""
        return 2**level in self.attention_resolutions


# Of every block in the order they run; None where there is no transformer.
Answers = tuple[spatiotemporal.Answers | None, ...]


class Block(nnx.Module):
    """A residual block and, on some levels, a transformer."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        config: UNetConfig,
        *,
        attend: bool,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.res = spatiotemporal.VideoResBlock(
            inputs,
            outputs,
            emb_dim=config.emb_dim,
            groups=config.groups,
            dtype=dtype,
            rngs=rngs,
        )
        attn = None
        if attend:
            attn = spatiotemporal.SpatialVideoTransformer(
                outputs,
                head_channels=config.head_channels,
                context_dim=config.context_dim,
                impl=config.attention_impl,
                groups=config.groups,
                dtype=dtype,
                rngs=rngs,
            )
        self.attn = attn
        self.remat = config.remat

    def __call__(
        self,
        x: Float[Array, "b t h w i"],
        emb: Float[Array, "b t e"],
        context: Float[Array, "b #t n d"] | spatiotemporal.Answers | None,
        image_only: Bool[Array, "b t"] | None,
        skip: Float[Array, "b t h w s"] | None = None,
    ) -> Float[Array, "b t h w o"]:
        """`emb` is one embedding a frame, `context` one set of tokens a frame or a clip.

        `skip` is what the other side of the UNet made, and becomes the last channels of `x`.
        """
        x = layers.call(self.res, x, emb, image_only, skip, remat=self.remat)
        x = sharding.pin_clips(x)
        if self.attn is None:
            return x
        return sharding.pin_clips(layers.call(self.attn, x, context, image_only, remat=self.remat))


class Level(nnx.Module):
    """The blocks of one level on one side of the UNet, and the layer that leaves the level.

    `resample` is the stride-2 convolution at the end of a level going down, or the convolution
    after doubling going up; the last level of each side has none.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        width: int,
        config: UNetConfig,
        *,
        attend: bool,
        resample_stride: int | None,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.blocks = nnx.List(
            [Block(i, width, config, attend=attend, dtype=dtype, rngs=rngs) for i in inputs]
        )
        resample = None
        if resample_stride is not None:
            resample = layers.conv(width, width, stride=resample_stride, dtype=dtype, rngs=rngs)
        self.resample = resample


class VideoUNet(nnx.Module):
    """Predicts F of v-prediction with EDM's c_noise for every frame of a clip."""

    def __init__(self, config: UNetConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        settings = {"dtype": dtype, "rngs": layers.Keys(rngs.params())}
        widths, emb_dim, base = config.widths, config.emb_dim, config.model_channels
        self.time_embed = layers.MLP(base, emb_dim, emb_dim, **settings)
        self.label_embed = layers.MLP(config.vector_dim, emb_dim, emb_dim, **settings)
        self.conv_in = layers.conv(config.in_channels, base, **settings)
        skips, channels, last = [base], base, len(widths) - 1
        down = []
        for level, width in enumerate(widths):
            inputs = (channels,) + (width,) * (config.num_res_blocks - 1)
            stride = None if level == last else 2
            attend = config.has_attention(level)
            down.append(
                Level(inputs, width, config, attend=attend, resample_stride=stride, **settings)
            )
            skips += [width] * (config.num_res_blocks + (stride is not None))
            channels = width
        self.down = nnx.List(down)
        self.mid1 = Block(channels, channels, config, attend=True, **settings)
        self.mid2 = Block(channels, channels, config, attend=False, **settings)
        up = []
        for level, width in reversed(list(enumerate(widths))):
            inputs = tuple(
                (channels if i == 0 else width) + skips.pop()
                for i in range(config.num_res_blocks + 1)
            )
            stride = None if level == 0 else 1
            attend = config.has_attention(level)
            up.append(
                Level(inputs, width, config, attend=attend, resample_stride=stride, **settings)
            )
            channels = width
        # Numbered as levels are, so that down[i] and up[i] have the same resolution.
        self.up = nnx.List(up[::-1])
        self.norm_out = layers.GroupNorm(channels, eps=1e-5, groups=config.groups)
        self.conv_out = layers.conv(channels, config.out_channels, zero=True, **settings)

    def blocks(self) -> Iterator[Block]:
        """All blocks in the order they run."""
        for level in self.down:
            yield from level.blocks
        yield from (self.mid1, self.mid2)
        for level in reversed(self.up):
            yield from level.blocks

    def answers(self, context: Float[Array, "b #t 1 d"]) -> Answers:
        """All of the network that a context of one token takes part in, once for all steps."""
        context = context.astype(self.dtype)
        return tuple(
            None if block.attn is None else block.attn.answers(context) for block in self.blocks()
        )

    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        noise: Float[Array, "b t"],
        context: Float[Array, "b #t n d"] | Answers,
        vector: Float[Array, "b #t a"],
        image_only: Bool[Array, "b t"] | None = None,
    ) -> Float[Array, "b t h w o"]:
        """One forward pass; h and w must divide by 2 for every level but the last.

        `x` is the scaled noisy latents and the conditioning latents, concatenated in this order;
        `noise` is c_noise; a frame axis of 1 in `context` and `vector` shares them in the clip.
        `context` may be what `answers` made of it.
        Returns the dtype of `x`.
        """
        factor = 2 ** (len(self.down) - 1)
        if x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(f"UNet: latents of {x.shape[2:4]} do not divide by {factor}")
        emb = self.time_embed(layers.sinusoid(noise, self.config.model_channels))
        emb = emb + self.label_embed(vector)
        if not isinstance(context, tuple):
            context = itertools.repeat(context.astype(self.dtype))
        contexts = iter(context)
        h = sharding.pin_clips(self.conv_in(x))
        skips = [h]
        for level in self.down:
            for block in level.blocks:
                h = block(h, emb, next(contexts), image_only)
                skips.append(h)
            if level.resample is not None:
                h = sharding.pin_clips(level.resample(h))
                skips.append(h)
        for block in (self.mid1, self.mid2):
            h = block(h, emb, next(contexts), image_only)
        for level in reversed(self.up):
            for block in level.blocks:
                h = block(h, emb, next(contexts), image_only, skips.pop())
            if level.resample is not None:
                h = sharding.pin_clips(level.resample(layers.upsample(h)))
        return self.conv_out(self.norm_out(h, silu=True)).astype(x.dtype)


def widen(params: Any, in_channels: int) -> Any:
    """A UNet's parameters for an input of more channels, of which it ignores the new, last ones.

    So a scene model starts from one of 8 channels: noisy latents 4, conditioning latents 4, then
    the features of `pixelnerf`. Takes whatever has the parameters' tree, such as their average.
    """
    found, structure = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in found]
    first = [i for i, (path, _) in enumerate(found) if _names(path) == ["conv_in", "kernel"]]
    if not first:
        raise ValueError("widen: no conv_in.kernel, so these are not a UNet's parameters")
    kernel = leaves[first[0]]
    new = jnp.zeros((*kernel.shape[:2], in_channels - kernel.shape[2], kernel.shape[3]))
    leaves[first[0]] = jnp.concatenate([kernel, new.astype(kernel.dtype)], axis=2)
    return jax.tree.unflatten(structure, leaves)


def _names(path: Any) -> list[Any]:
    """Of a path to a leaf; the array of a variable lies below its name, as an attribute."""
    return [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
