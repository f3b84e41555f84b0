"""Posed views of a place to frames along any path: what `v3d_jax.pipeline` is for scene models.

    model = pipeline.load("scene_mini")
    frames = scene_pipeline.views_to_frames(*model, views, targets, jax.random.key(0))

Axes: `b` clip, `v` source view, `t` frame, `h w` image, `i j` latents, `c` channel. Frames are in
[0, 1], `views` in [-1, 1]. Cameras are normalised, those of views and of frames together
(`data.clips.normalise`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from v3d_jax import pipeline
from v3d_jax.diffusion.guidance import Condition
from v3d_jax.nn import blend, generator, pixelnerf
from v3d_jax.ops import image
from v3d_jax.ops.camera import Camera


class SceneCondition(NamedTuple):
    """What a scene model is conditioned on, and how near is what its frames show."""

    condition: Condition
    disparity: blend.Disparity


def scene_condition(
    settings: pipeline.Settings,
    params: Any,
    views: pixelnerf.Views,
    targets: Camera,
    key: Key[Array, ""],
) -> SceneCondition:
    """What a scene model is conditioned on: its first source view, and features of the targets.

    `targets` [b, t] are the cameras of the frames, the first of them that of the first view. They
    and the views' are normalised, as those of `data.clips.Clip`.
    """
    first = image.from_network(views.images[:, 0])
    condition = pipeline.encode_condition(settings, params, first, key)
    network, size = pipeline.networks(settings, params), settings.generator.latent_shape[1:3]
    if "latents" in network.pixelnerf.config.carried:
        views = views._replace(latents=view_latents(settings, network, views.images))
    rendering = network.pixelnerf(views, targets, size)
    condition = condition._replace(features=rendering.features)
    return SceneCondition(condition, rendering.disparity)


def view_latents(
    settings: pipeline.Settings, network: generator.Generator, images: Float[Array, "b v h w 3"]
) -> Float[Array, "b v i j c"]:
    """Source views' latents: the posterior's mean, scaled as the latents that are denoised."""
    means = jax.lax.map(lambda x: network.autoencoder.encode(x).mean, jnp.moveaxis(images, 1, 0))
    return jnp.moveaxis(means, 0, 1) * settings.generator.autoencoder.scale_factor


def views_to_frames(
    settings: pipeline.Settings,
    params: Any,
    views: pixelnerf.Views,
    targets: Camera,
    key: Key[Array, ""],
) -> Float[Array, "b t h w 3"]:
    """Frames of scenes from the cameras `targets`, of which `scene_condition` says more."""
    condition_key, noise_key = pipeline.split_key(key)
    made = scene_condition(settings, params, views, targets, condition_key)
    latents = pipeline.sample_latents(settings, params, made.condition, noise_key)
    frames = pipeline.decode(settings, params, latents)
    return finish(settings, params, frames, views, targets, made.disparity)


def finish(
    settings: pipeline.Settings,
    params: Any,
    frames: Float[Array, "b t h w 3"],
    views: pixelnerf.Views,
    targets: Camera,
    disparity: blend.Disparity,
) -> Float[Array, "b t h w 3"]:
    """Decoded frames of a scene with what its views show of them, where the model does that."""
    network, frames = pipeline.networks(settings, params).pixelnerf, image.to_network(frames)
    return image.from_network(network.finish(frames, views, targets, disparity))
