"""The temporal decoder a few frames at a time: the result of the whole clip in less memory.

Axes as in `v3d_jax.nn.autoencoder`. Frames see each other in two ways: convolutions over three
frames, which a frame on either side of a chunk serves, and group statistics over the clip, which no
number of frames beside a chunk does. So chunks run within a layer, not through all of them: what
is per frame up to the next layer across frames, then statistics of the clip, then the
convolutions with their neighbours. Whole are only the activations between layers, two at a time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v3d_jax.nn import autoencoder, layers
from v3d_jax.ops import normalize

Clip = Float[Array, "b _ _ _ _"]  # frames, height, width and channels: a layer may change them
Index = int | Int[Array, ""]


def decode(
    decoder: autoencoder.TemporalDecoder, latents: Float[Array, "b t i j c"], frames: int
) -> Float[Array, "b t h w 3"]:
    """What `decoder(latents)` is, `frames` at a time; not to be differentiated.

    Raises ValueError if the clip's frames do not divide by `frames`.
    """
    if latents.shape[1] % frames:
        raise ValueError(f"{latents.shape[1]} frames do not divide into chunks of {frames}")
    x = _block(decoder.mid1, latents, frames, decoder.conv_in)
    x = _block(decoder.mid2, x, frames, decoder.attn)
    before: Callable[[Clip], Clip] | None = None
    for level in reversed(decoder.up):
        for block in level.blocks:
            x = _block(block, x, frames, before)
            before = None
        if level.resample is not None:
            # Bound now: the next level has another.
            before = lambda y, resample=level.resample: resample(layers.upsample(y))  # noqa: E731
    x = _per_frame(lambda y: decoder.conv_out(decoder.norm_out(y, silu=True)), x, frames)
    return decoder.time_mix_conv(x)


def _block(
    block: autoencoder.TemporalBlock,
    x: Clip,
    frames: int,
    before: Callable[[Clip], Clip] | None,
) -> Clip:
    """A block on `before` of its input; the blend takes the place of the spatial result."""
    before = before or (lambda y: y)
    spatial = _per_frame(lambda y: block.spatial(before(y)), x, frames)
    temporal = block.temporal
    hidden = _across(temporal.norm1, temporal.conv1, spatial, frames)
    second = _convolve(temporal.norm2, temporal.conv2, hidden, frames)

    def blend(start: Index, clip: Clip) -> Clip:
        own = jax.lax.dynamic_slice_in_dim(clip, start, frames, axis=1)
        return block.mix(own, own + second(start))

    return _fill(blend, spatial, frames)


def _per_frame(f: Callable[[Clip], Clip], x: Clip, frames: int) -> Clip:
    """`f(x)`, which works on every frame alone."""

    def chunk(start: Index, out: Clip) -> Clip:
        del out
        return f(jax.lax.dynamic_slice_in_dim(x, start, frames, axis=1))

    return _fill(chunk, _room(f, x), frames)


def _across(norm: layers.GroupNorm, conv: layers.TemporalConv, x: Clip, frames: int) -> Clip:
    """`conv(norm(x, silu=True))`."""
    convolved = _convolve(norm, conv, x, frames)
    return _fill(lambda start, out: convolved(start), _room(conv, x), frames)


def _convolve(
    norm: layers.GroupNorm, conv: layers.TemporalConv, x: Clip, frames: int
) -> Callable[[Index], Clip]:
    """`conv(norm(x, silu=True))` for the chunk that starts at a frame."""
    count = x.shape[1]
    statistics = _statistics(norm, x, frames)
    scale, bias = jnp.asarray(norm.scale[...]), jnp.asarray(norm.bias[...])

    def chunk(start: Index) -> Clip:
        index = start + jnp.arange(-1, frames + 1)
        near = jnp.take(x, jnp.clip(index, 0, count - 1), axis=1)
        normal = normalize.apply_statistics(near, scale, bias, *statistics, silu=True)
        # Beyond the clip is zero after normalisation, as the convolution's own padding.
        inside = ((index >= 0) & (index < count)).reshape(1, -1, 1, 1, 1)
        return conv(jnp.where(inside, normal, 0))[:, 1:-1]

    return chunk


def _statistics(norm: layers.GroupNorm, x: Clip, frames: int) -> tuple[Clip, Clip]:
    """`group_statistics` of the whole clip, of which no more than a chunk is ever in float32."""
    first, chunks = x[:, :1, :1, :1].astype(jnp.float32), x.shape[1] // frames

    def add(i: Index, sums: tuple[Clip, Clip]) -> tuple[Clip, Clip]:
        part = jax.lax.dynamic_slice_in_dim(x, i * frames, frames, axis=1)
        found = normalize.deviations(part, first, over_frames=True)
        return sums[0] + found[0], sums[1] + found[1]

    zero = jnp.zeros_like(first)
    shift, square = jax.lax.fori_loop(0, chunks, add, (zero, zero))
    return normalize.combine(first, shift / chunks, square / chunks, norm.groups, norm.eps)


def _fill(f: Callable[[Index, Clip], Clip], clip: Clip, frames: int) -> Clip:
    """Writes `f(start, clip)` into `clip`, a chunk after another."""

    def put(i: Index, clip: Clip) -> Clip:
        start = i * frames
        return jax.lax.dynamic_update_slice_in_dim(clip, f(start, clip), start, axis=1)

    return jax.lax.fori_loop(0, clip.shape[1] // frames, put, clip)


def _room(f: Callable[[Clip], Clip], x: Clip) -> Clip:
    """An array like `f(x)`, to be overwritten.

    It holds a value of `x`, because zeros depend on nothing and may be laid out long before.
    """
    made = jax.eval_shape(f, x)
    return jnp.broadcast_to(x[:1, :1, :1, :1, :1].astype(made.dtype), made.shape)
