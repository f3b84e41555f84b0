"""What given views tell of other views of a scene: features at latent resolution, and colours.

A feature map of every source view; on the ray of every target pixel so many samples; at each of
them the features of the views that see it, averaged; a network that gives samples weights, and one
that turns the weighted sum into the pixel's features and colour. The features become the last
channels of the video UNet's input (`unet.widen`); the colours are for a loss that teaches the
features where things are.

Axes: `b` clip, `v` source view, `t` target frame, `h w` target pixels, `n` rays computed at once,
`s` samples of a ray, `c` channel. Images are in [-1, 1], colours in [0, 1]; the scene lies in the
cube [-1, 1]^3. Geometry is float32, `dtype` is that of activations. Source: pixelNeRF (arXiv
2012.02190), as V3D's release has it for scenes. Different here:

* a view counts where it sees a sample; there, samples behind a camera or outside its picture get
  features all the same;
* rays that miss the cube end at the farthest exit of their frame; there, at the farthest entry;
* samples move by chance only if a key is given, of each ray by itself; there always, and between
  bins of disparity all rays alike;
* pixel centres lie at half-integers in feature maps too; there, corners are joined.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from v3d_jax.nn import blend, layers, resunet
from v3d_jax.ops import image, rays, view_moments
from v3d_jax.ops.camera import Camera
from v3d_jax.parallel import sharding

OCTAVES = 6


@dataclasses.dataclass(frozen=True)
class PixelNeRFConfig:
    """Sizes of the scene model; the defaults are those of V3D.

    `sampling` is where the samples of a ray are: evenly spaced through the cube [-1, 1]^3, or in
    disparity between the distances `near` and `far`. `deviation` adds to the mean of the views'
    features their standard deviation, `position` the sample's own place as sinusoids: in the world,
    which suits scenes in the cube, or as the first view has it (`in_view`), which tells a single
    picture's features how far away a sample is. `carried` is what of the pictures themselves stands
    in the place of the last features, which need not learn to keep it: their colours, their latents
    (`Views.latents`). With `blend` > 0 a network of so many channels puts the source pictures into
    decoded frames (`finish`). `rays_at_once` of every clip are computed together: memory follows
    it, times samples, views and clips, and not the number of frames.
    """

    encoder: resunet.ResUNetConfig = dataclasses.field(default_factory=resunet.ResUNetConfig)
    sampling: Literal["cube", "disparity"] = "cube"
    samples: int = 128
    near: float = 0.5
    far: float = 10_000.0
    deviation: bool = False
    position: Literal["none", "world", "view"] = "none"
    carried: tuple[Literal["colors", "latents"], ...] = ()
    hidden: int = 128
    features: int = 128
    blend: int = 0
    rays_at_once: int = 512

    @property
    def inputs(self) -> int:
        """What is known of a sample."""
        place = 0 if self.position == "none" else 3 + 6 * OCTAVES
        return self.encoder.channels * (2 if self.deviation else 1) + place


class Views(NamedTuple):
    """Source views, padded to as many in every clip; where not `valid`, the others may be anything.

    The first view of every clip must be valid. Latents, scaled, are for models that carry them.
    """

    images: Float[Array, "b v h w 3"]
    cameras: Camera  # [b, v]
    valid: Bool[Array, "b v"]
    latents: Float[Array, "b v k l d"] | None = None


class Source(NamedTuple):
    """Source views as the renderer needs them: their features, which cover the whole pictures."""

    maps: Float[Array, "b v i j c"]
    cameras: Camera  # [b, v]
    valid: Bool[Array, "b v"]


class Rendering(NamedTuple):
    """What the target frames show, and how near it is."""

    features: Float[Array, "b t h w c"]
    rgb: Float[Array, "b t h w 3"]
    disparity: blend.Disparity


class MLP(nnx.Module):
    """Three linear layers with ReLU between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int, *, dtype: Any, rngs: nnx.Rngs):
        settings = {"dtype": dtype, "rngs": rngs}
        self.linear1 = layers.linear(inputs, hidden, **settings)
        self.linear2 = layers.linear(hidden, hidden, **settings)
        self.linear3 = layers.linear(hidden, outputs, **settings)

    def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        """Applies to the last axis."""
        return self.linear3(nnx.relu(self.linear2(nnx.relu(self.linear1(x)))))


class Renderer(nnx.Module):
    """From what is known of a ray's samples to the ray's features and colour."""

    def __init__(self, config: PixelNeRFConfig, *, dtype: Any, rngs: nnx.Rngs):
        settings = {"dtype": dtype, "rngs": rngs}
        self.sample = MLP(config.inputs, config.hidden, config.features + 1, **settings)
        self.ray = MLP(config.features, config.hidden, 3 + config.features, **settings)
        self.dtype = dtype

    def __call__(
        self, known: Float[Array, "*n s i"]
    ) -> tuple[Float[Array, "*n c"], Float[Array, "*n 3"], Float[Array, "*n s"]]:
        """Also the samples' weights: a softmax, not of density and transmittance."""
        found = self.sample(known.astype(self.dtype))
        # Behind a barrier its gradient is computed once, not anew for each of the features beside.
        score = jax.lax.optimization_barrier(found[..., -1].astype(jnp.float32))
        weight = nnx.softmax(score, axis=-1)
        found = found[..., :-1].astype(jnp.float32)
        mean = jnp.einsum("...s,...sc->...c", weight, found, precision="highest")
        out = self.ray(mean.astype(self.dtype))
        return out[..., 3:], nnx.sigmoid(out[..., :3].astype(jnp.float32)), weight


class PixelNeRF(nnx.Module):
    """Renders features and colours of target frames from source views."""

    def __init__(self, config: PixelNeRFConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        settings = {"dtype": dtype, "rngs": layers.Keys(rngs.params())}
        self.encoder = resunet.ResUNet(config.encoder, **settings)
        self.renderer = Renderer(config, **settings)
        if config.blend:
            self.blend = blend.Blend(config.blend, **settings)

    def __call__(
        self, views: Views, targets: Camera, size: tuple[int, int], key: jax.Array | None = None
    ) -> Rendering:
        """Frames of `size` (height, width) from the cameras `targets` [b, t]."""
        source = self.encode(views)
        rendering = self.render(source, targets, size, key)
        if not self.config.blend:
            return rendering
        own = blend.filled(views.cameras, views.valid)
        near = self.render(source, own, size).disparity.frames
        return rendering._replace(disparity=rendering.disparity._replace(views=near))

    def encode(self, views: Views) -> Source:
        """Source views with their feature maps.

        Raises `ValueError` where views lack latents that are carried, or features the room.
        """
        maps = self.encoder(views.images, views.valid)
        own = {"colors": views.images, "latents": views.latents}
        carried = [own[name] for name in self.config.carried]
        if any(x is None for x in carried):
            raise ValueError("this PixelNeRF carries latents: give views with theirs")
        carried = [image.resize(x, maps.shape[2:4]).astype(maps.dtype) for x in carried]
        learned = maps.shape[-1] - sum(x.shape[-1] for x in carried)
        if learned < 1:
            raise ValueError(f"{maps.shape[-1]} features leave no room for what is carried")
        maps = jnp.concatenate([maps[..., :learned], *carried], axis=-1)
        return Source(maps, views.cameras, views.valid)

    def render(
        self, source: Source, targets: Camera, size: tuple[int, int], key: jax.Array | None = None
    ) -> Rendering:
        """As `__call__`, from what `encode` returned.

        The gradient computes a part's samples anew instead of storing them.
        """
        config = self.config
        clips, frames = targets.width.shape
        target = rays.pixel_rays(targets, size)
        parts = _parts((*target, *self._span(target)), config.rays_at_once)
        graphdef, params = nnx.split(self.renderer)
        wide = source.maps.astype(jnp.float32)

        def render_part(params, source, wide, key, part, index):
            key = None if key is None else jax.random.fold_in(key, index)
            known, distances = _sample(config, source, wide, part, key)
            features, rgb, weight = nnx.merge(graphdef, params)(known)
            near = jnp.sum(weight / jnp.maximum(distances, rays.NEAREST), axis=-1, keepdims=True)
            return features, rgb, near

        # Within a loop nothing needs to keep the compiler from merging the two computations.
        render_part = jax.checkpoint(render_part, prevent_cse=False)
        found = jax.lax.map(
            lambda xs: render_part(params, source, wide, key, *xs),
            (parts, jnp.arange(parts[0].shape[0])),
        )
        features, rgb, near = (sharding.pin_clips(_whole(x, (clips, frames, *size))) for x in found)
        axis = targets.world_to_camera[..., 2, :3]
        ahead = jnp.einsum("bthwi,bti->bthw", target.directions, axis, precision="highest")
        return Rendering(features, rgb, blend.Disparity(near[..., 0] / ahead, None))

    def finish(
        self,
        frames: Float[Array, "b k H W 3"],
        views: Views,
        targets: Camera,
        disparity: blend.Disparity,
    ) -> Float[Array, "b k H W 3"]:
        """Decoded frames in [-1, 1] with what the views' pictures show of them (`blend`).

        `disparity` is that of the `Rendering`, `targets` [b, k] are the frames' cameras; the
        pictures have the frames' size. Without `blend` frames stay as they are.
        """
        if not self.config.blend:
            return frames
        graphdef, params = nnx.split(self.blend)

        def one_frame(params: Any, frame: Any, target: Camera, near: Any) -> Any:
            near = disparity._replace(frames=near)
            warped = blend.warp(views.images, views.cameras, views.valid, target, near)
            return nnx.merge(graphdef, params)(frame, warped)

        if frames.shape[1] == 1:
            # The gradient of convolutions in a loop takes twelve times as long on a CPU.
            return one_frame(params, frames, targets, disparity.frames)
        # One after the other: at full size every frame has a picture of every view.
        alone = jax.tree.map(
            lambda x: jnp.moveaxis(x, 1, 0)[:, :, None], (frames, targets, disparity.frames)
        )
        found = jax.lax.map(lambda xs: one_frame(params, *xs), alone)
        return sharding.pin_clips(jnp.moveaxis(found[:, :, 0], 0, 1))

    def _span(self, target: rays.Rays) -> tuple[Float[Array, "b t h w"], Float[Array, "b t h w"]]:
        """The distances between which rays are sampled."""
        if self.config.sampling == "cube":
            return rays.cube_span(target)
        shape = target.directions.shape[:-1]
        return jnp.full(shape, self.config.near), jnp.full(shape, self.config.far)


# Origins and directions of rays, and the distances between which they are sampled; [b, n, ...].
Part = tuple[Float[Array, "b n 3"], Float[Array, "b n 3"], Float[Array, "b n"], Float[Array, "b n"]]


def _sample(
    config: PixelNeRFConfig,
    source: Source,
    wide: Float[Array, "b v i j c"],
    part: Part,
    key: jax.Array | None,
) -> tuple[Float[Array, "b n s k"], Float[Array, "b n s"]]:
    """What is known of every sample of some rays, and how far away each is.

    `wide` takes the gradient of the maps.
    """
    origins, directions, enter, leave = part
    jitter = None
    if key is not None:
        jitter = jax.random.uniform(key, (*enter.shape, config.samples))
    spread = rays.even_distances if config.sampling == "cube" else rays.disparity_distances
    distances = spread(enter, leave, config.samples, jitter)
    points = origins[:, :, None] + distances[..., None] * directions[:, :, None]
    # Devices that share a clip divide a part's rays as they do frames elsewhere.
    points = sharding.pin_clips(points[:, :, None])[:, :, 0]
    mean, deviation = look_up(source, wide, points)
    known = [mean]
    if config.deviation:
        known.append(deviation)
    if config.position == "world":
        known.append(sinusoids(points))
    if config.position == "view":
        known.append(sinusoids(in_view(source.cameras, points)))
    return jnp.concatenate(known, axis=-1), distances


def look_up(
    source: Source, wide: Float[Array, "b v i j c"], points: Float[Array, "b n s 3"]
) -> view_moments.Moments:
    """Mean and deviation of the features at points over the views that see them, [b n s c]."""
    maps, cameras, valid = source
    b, n, s, _ = points.shape
    pixels, seen = jax.vmap(rays.project)(cameras, points.reshape(b, n * s, 3))
    seen = seen & valid[..., None]
    size = jnp.stack([cameras.width, cameras.height], axis=-1).astype(jnp.float32)
    scale = jnp.asarray([[maps.shape[3:1:-1]]], jnp.float32) / jnp.maximum(size, 1.0)
    pixels = jnp.where(seen[..., None], pixels * scale[:, :, None], 0.0)
    # Rays and samples apart, or devices that divide the rays could not divide what follows.
    pixels, seen = (x.reshape(*x.shape[:2], n, s, *x.shape[3:]) for x in (pixels, seen))
    return view_moments.moments(maps, wide, pixels, seen)


def in_view(cameras: Camera, points: Float[Array, "b n s 3"]) -> Float[Array, "b n s 3"]:
    """Points as the first view's camera has them, along its axes, brought into the unit ball.

    A point p away becomes p / (1 + |p|): infinity lies on the sphere.
    """
    pose = cameras.world_to_camera[:, 0]
    local = jnp.einsum("bij,bnsj->bnsi", pose[:, :3, :3], points, precision="highest")
    local = local + pose[:, None, None, :3, 3]
    return local / (1.0 + jnp.linalg.norm(local, axis=-1, keepdims=True))


def sinusoids(points: Float[Array, "*n 3"]) -> Float[Array, "*n k"]:
    """Points, and an octave at a time the sines and cosines of pi 2^k times them."""
    # A cosine as a sine, so that all channels are one computation: neighbouring threads of a GPU
    # that follow different ones wait for each other.
    lead = (1,) * (points.ndim - 1)
    scale = np.pi * 2.0 ** np.arange(OCTAVES, dtype=np.float32).reshape(*lead, -1, 1, 1)
    phase = np.asarray([0.0, np.pi / 2], np.float32).reshape(*lead, 1, -1, 1)
    waves = jnp.sin(scale * points[..., None, None, :] + phase)
    return jnp.concatenate([points, waves.reshape(*points.shape[:-1], -1)], axis=-1)


def rgb_loss(
    rgb: Float[Array, "b t h w 3"], frames: Float[Array, "b t H W 3"]
) -> Float[Array, " b"]:
    """Mean squared error of each clip against its frames, both in [0, 1], at the size of `rgb`."""
    wanted = image.resize(frames, rgb.shape[2:4])
    return jnp.mean(jnp.square(rgb - wanted), axis=(1, 2, 3, 4))


def _parts(of_rays: Any, most: int) -> Any:
    """Arrays [b, t, h, w, ...] cut into parts [p, b, n, ...]; the last ray fills the last."""

    def cut(x: Array) -> Array:
        count = x.shape[1] * x.shape[2] * x.shape[3]
        size = min(most, count)
        x = x.reshape(x.shape[0], count, *x.shape[4:])
        border = ((0, 0), (0, -count % size), *((0, 0),) * (x.ndim - 2))
        x = jnp.pad(x, border, mode="edge")
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, of_rays)


def _whole(parts: Float[Array, "p b n c"], shape: tuple[int, ...]) -> Float[Array, "b t h w c"]:
    """The inverse of `_parts` for an array of frames of `shape`."""
    p, b, n, c = parts.shape
    joined = jnp.moveaxis(parts, 0, 1).reshape(b, p * n, c)
    return joined[:, : int(np.prod(shape[1:]))].reshape(*shape, c)
