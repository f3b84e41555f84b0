"""CLIP's image tower: a vision transformer of pre-norm blocks with a class token.

Axes: `b` image, `h w` image, `n` tokens (class token first, then patches in row-major order), `c`
channels. Parameters are float32; `dtype` is that of activations; norms and the softmax are float32.
The defaults are OpenCLIP ViT-H-14, which conditions SVD and V3D; the same class at a small size
with `output="tokens"` and `preprocess="plain"` gives a model trained from scratch the input
view's patches as context.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from v3d_jax.nn import layers
from v3d_jax.ops import attention, image

# Of the images that CLIP was trained on, in [0, 1] (Radford et al. 2021, released code).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionConfig:
    """The image tower's size, what it returns and how it prepares images.

    `output` is "pooled" (the class token alone) or "tokens" (the patches, without the class token).
    `preprocess` is "clip" (SVD's resampling and CLIP's normalisation) or "plain" (antialiased
    bilinear resizing, values left in [-1, 1]).
    """

    image_size: int = 224
    patch: int = 14
    width: int = 1280
    layers: int = 32
    heads: int = 16
    mlp: int = 5120
    output_dim: int = 1024
    output: Literal["pooled", "tokens"] = "pooled"
    preprocess: Literal["clip", "plain"] = "clip"
    remat: bool = False
    attention_impl: attention.Implementation | None = None

    def __post_init__(self):
        if self.image_size % self.patch:
            raise ValueError(f"images of {self.image_size} do not divide into {self.patch} patches")
        if self.width % self.heads:
            raise ValueError(f"{self.width} channels do not divide into {self.heads} heads")

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch) ** 2


class SelfAttention(nnx.Module):
    """Multi-head self-attention; every projection has a bias."""

    def __init__(self, config: VisionConfig, *, dtype: Any, rngs: nnx.Rngs):
        width = config.width
        self.to_q = layers.linear(width, width, dtype=dtype, rngs=rngs)
        self.to_k = layers.linear(width, width, dtype=dtype, rngs=rngs)
        self.to_v = layers.linear(width, width, dtype=dtype, rngs=rngs)
        self.to_out = layers.linear(width, width, dtype=dtype, rngs=rngs)
        self.heads = config.heads
        self.impl = config.attention_impl

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """Every token attends to all of its image."""
        q, k, v = (
            y.reshape(*y.shape[:2], self.heads, -1)
            for y in (self.to_q(x), self.to_k(x), self.to_v(x))
        )
        return self.to_out(attention.attention(q, k, v, impl=self.impl).reshape(x.shape))


class Block(nnx.Module):
    """Pre-norm transformer block: self-attention, then a GELU (exact erf) feed-forward layer."""

    def __init__(self, config: VisionConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.norm1 = layers.LayerNorm(config.width)
        self.attn = SelfAttention(config, dtype=dtype, rngs=rngs)
        self.norm2 = layers.LayerNorm(config.width)
        self.linear1 = layers.linear(config.width, config.mlp, dtype=dtype, rngs=rngs)
        self.linear2 = layers.linear(config.mlp, config.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """Residual in both layers."""
        x = x + self.attn(self.norm1(x))
        return x + self.linear2(nnx.gelu(self.linear1(self.norm2(x)), approximate=False))


class VisionTransformer(nnx.Module):
    """Images to context tokens for the UNet; the output is not normalised to unit length."""

    def __init__(self, config: VisionConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        width, patch = config.width, config.patch
        rngs = layers.Keys(rngs.params())
        normal = nnx.initializers.normal(width**-0.5)
        # A patch is one row of pixels (row, column, channel): the kernel of a strided convolution.
        self.patch_embed = layers.linear(3 * patch**2, width, bias=False, dtype=dtype, rngs=rngs)
        self.class_embedding = nnx.Param(normal(rngs.params(), (width,), jnp.float32))
        positions = (config.num_patches + 1, width)
        self.position_embedding = nnx.Param(normal(rngs.params(), positions, jnp.float32))
        self.norm_pre = layers.LayerNorm(width)
        self.blocks = nnx.List(
            [Block(config, dtype=dtype, rngs=rngs) for _ in range(config.layers)]
        )
        self.norm_post = layers.LayerNorm(width)
        self.proj = layers.linear(width, config.output_dim, bias=False, dtype=dtype, rngs=rngs)
        self.config = config
        self.dtype = dtype

    def preprocess(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b s s 3"]:
        """Images in [-1, 1] of any size to the tower's size and range, in float32."""
        images, size = images.astype(jnp.float32), self.config.image_size
        if self.config.preprocess == "plain":
            return image.resize(images, (size, size), "bilinear")
        unit = 0.5 * (image.clip_resize(images, size) + 1.0)
        mean, std = (jnp.asarray(x).reshape(1, 1, 1, 3) for x in (CLIP_MEAN, CLIP_STD))
        return (unit - mean) / std

    def encode(self, images: Float[Array, "b s s 3"]) -> Float[Array, "b n d"]:
        """Tokens of images that are already preprocessed: n is 1 if pooled, else the patches."""
        x = self.patch_embed(_patches(images.astype(self.dtype), self.config.patch))
        first = self.class_embedding[...].astype(x.dtype)[None, None]
        first = jnp.broadcast_to(first, (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([first, x], axis=1)
        x = self.norm_pre(x + self.position_embedding[...].astype(x.dtype)[None])
        for block in self.blocks:
            x = layers.call(block, x, remat=self.config.remat)
        x = x[:, :1] if self.config.output == "pooled" else x[:, 1:]
        return self.proj(self.norm_post(x))

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        """Context tokens of images in [-1, 1], of any size: preprocesses, then encodes."""
        return self.encode(self.preprocess(images))


def _patches(images: Float[Array, "b s s c"], patch: int) -> Float[Array, "b n p"]:
    """Cuts images into rows of patch * patch * c values."""
    b, height, width, c = images.shape
    rows, columns = height // patch, width // patch
    x = images.reshape(b, rows, patch, columns, patch, c)
    return jax.lax.transpose(x, (0, 1, 3, 2, 4, 5)).reshape(b, rows * columns, -1)
