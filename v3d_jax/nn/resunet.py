"""The feature network of the scene model: a ResNet-34 of three levels with a way back up.

Axes: `b` clip, `v` view, `h w` image, `c` channel. Images are in [-1, 1]; features are at a quarter
of their resolution. Parameters are float32; `dtype` is that of activations, statistics are float32.
Source: V3D's release, scene model; ResNet arXiv 1512.03385, table 1.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from v3d_jax.nn import layers

Clips = Float[Array, "b v h w c"]
Valid = Bool[Array, "b v"]


@dataclasses.dataclass(frozen=True)
class ResUNetConfig:
    """Sizes of the feature network; the defaults are those of V3D.

    A level has so many residual `blocks`, halves the resolution and doubles the channels of the
    one before; the first has `channels`, and so have the features. The `norm` "batch" is V3D's,
    with the statistics of all images at hand: of a clip alone they are others than in training,
    and so are its features. "layer" normalises every pixel by itself.
    """

    channels: int = 64
    blocks: tuple[int, ...] = (3, 4, 6)
    norm: Literal["batch", "layer"] = "batch"
    eps: float = 1e-5

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.channels * 2**level for level in range(len(self.blocks)))


class BatchNorm(nnx.Module):
    """Normalises every channel by its statistics over all valid images, at evaluation too."""

    def __init__(self, channels: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))
        self.eps = eps

    def __call__(self, x: Clips, valid: Valid) -> Clips:
        """Images that are not valid count for nothing; at least one must be valid."""
        wide, share = x.astype(jnp.float32), valid[..., None, None, None].astype(jnp.float32)
        share = share / (jnp.sum(share) * x.shape[2] * x.shape[3])
        mean = jnp.sum(wide * share, axis=(0, 1, 2, 3), keepdims=True)
        variance = jnp.sum(jnp.square(wide - mean) * share, axis=(0, 1, 2, 3), keepdims=True)
        scale, bias = (x[...].reshape(1, 1, 1, 1, -1) for x in (self.scale, self.bias))
        gain = scale * jax.lax.rsqrt(variance + self.eps)
        return ((wide - mean) * gain + bias).astype(x.dtype)


class ConvNorm(nnx.Module):
    """A convolution, reflected at the border, and a norm."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        size: int = 3,
        stride: int = 1,
        bias: bool = False,
        norm: Literal["batch", "layer"],
        eps: float,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.conv = nnx.Conv(
            inputs,
            outputs,
            (size, size),
            strides=stride,
            padding="VALID",
            use_bias=bias,
            kernel_init=nnx.initializers.he_normal(),
            dtype=dtype,
            promote_dtype=layers.promote_dtype,
            rngs=rngs,
        )
        kind = BatchNorm if norm == "batch" else layers.LayerNorm
        self.norm = kind(outputs, eps=eps)

    def __call__(self, x: Float[Array, "b v h w i"], valid: Valid) -> Float[Array, "b v H W o"]:
        """Keeps the resolution, divided by the stride."""
        reach = self.conv.kernel_size[0] // 2
        if reach:
            border = ((0, 0), (0, 0), (reach, reach), (reach, reach), (0, 0))
            x = jnp.pad(x, border, mode="reflect")
        x = self.conv(x)
        return self.norm(x, valid) if isinstance(self.norm, BatchNorm) else self.norm(x)


class BasicBlock(nnx.Module):
    """Two convolutions and a shortcut, which is a 1x1 convolution where shapes change."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, **settings: Any):
        self.unit1 = ConvNorm(inputs, outputs, stride=stride, **settings)
        self.unit2 = ConvNorm(outputs, outputs, **settings)
        shortcut = None
        if stride != 1 or inputs != outputs:
            shortcut = ConvNorm(inputs, outputs, size=1, stride=stride, **settings)
        self.shortcut = shortcut

    def __call__(self, x: Float[Array, "b v h w i"], valid: Valid) -> Float[Array, "b v H W o"]:
        """Keeps the resolution, divided by the stride."""
        y = self.unit2(nnx.relu(self.unit1(x, valid)), valid)
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x, valid)))


class ResUNet(nnx.Module):
    """Images to features at a quarter of their resolution."""

    def __init__(self, config: ResUNetConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        settings = {"norm": config.norm, "eps": config.eps, "dtype": dtype, "rngs": rngs}
        widths = config.widths
        self.stem = ConvNorm(3, config.channels, size=7, stride=2, **settings)
        levels, channels = [], config.channels
        for width, count in zip(widths, config.blocks, strict=True):
            blocks = [BasicBlock(channels, width, stride=2, **settings)]
            blocks += [BasicBlock(width, width, stride=1, **settings) for _ in range(count - 1)]
            levels.append(nnx.List(blocks))
            channels = width
        self.levels = nnx.List(levels)
        # up[i] and merge[i] lead from level i + 1 to the resolution and the channels of level i.
        steps = list(zip(widths[1:], widths[:-1], strict=True))
        self.up = nnx.List([ConvNorm(i, o, bias=True, **settings) for i, o in steps])
        self.merge = nnx.List([ConvNorm(2 * o, o, bias=True, **settings) for _, o in steps])
        self.conv_out = nnx.Conv(
            config.channels,
            config.channels,
            (1, 1),
            dtype=dtype,
            promote_dtype=layers.promote_dtype,
            rngs=rngs,
        )

    def __call__(
        self, images: Float[Array, "b v h w 3"], valid: Valid | None = None
    ) -> Float[Array, "b v i j c"]:
        """Features of every image; those of images that are not valid mean nothing, but are finite.

        Height and width must be multiples of the deepest level's factor (of three levels 16), from
        twice it on.
        """
        factor = 2 ** (len(self.levels) + 1)
        if any(size % factor or size < 2 * factor for size in images.shape[2:4]):
            raise ValueError(
                f"ResUNet: images of {images.shape[2:4]} are not multiples of {factor}, "
                f"{2 * factor} or more"
            )
        if valid is None:
            valid = jnp.ones(images.shape[:2], bool)
        images = jnp.where(valid[..., None, None, None], images, 0.0).astype(self.dtype)
        x = nnx.relu(self.stem(images, valid))
        skips = []
        for level in self.levels:
            for block in level:
                x = block(x, valid)
            skips.append(x)
        skips.pop()
        for up, merge, skip in zip(self.up[::-1], self.merge[::-1], skips[::-1], strict=True):
            x = nnx.elu(up(double(x), valid))
            x = nnx.elu(merge(jnp.concatenate([x, skip], axis=-1), valid))
        return self.conv_out(x)


def double(x: Float[Array, "b v h w c"]) -> Float[Array, "b v 2*h 2*w c"]:
    """Twice the resolution by linear interpolation that keeps the corner pixels in the corners."""
    rows, columns = (jnp.asarray(_doubling(length)) for length in x.shape[2:4])
    wide = x.astype(jnp.float32)
    wide = jnp.einsum("ih,bvhwc->bviwc", rows, wide, precision="highest")
    wide = jnp.einsum("jw,bviwc->bvijc", columns, wide, precision="highest")
    return wide.astype(x.dtype)


def _doubling(length: int) -> np.ndarray:
    """[2 length, length]: the weights of `double` along one axis."""
    place = np.linspace(0.0, length - 1, 2 * length)
    return np.maximum(1.0 - np.abs(place[:, None] - np.arange(length)), 0.0).astype(np.float32)
