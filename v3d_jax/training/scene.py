"""Training the scene model: the video model, and the PixelNeRF that tells it where cameras are.

Axes: `b` clip, `t` frame, `s` source view, `h w` image. Beside the denoising loss, whose gradient
reaches the PixelNeRF through the features, its colours are compared with the frames. Source: V3D's
release, `StandardDiffusionLossWithPixelNeRFLoss`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from v3d_jax import errors
from v3d_jax.data import posed
from v3d_jax.diffusion import loss as edm
from v3d_jax.diffusion import sampler
from v3d_jax.nn import generator, pixelnerf
from v3d_jax.ops import image
from v3d_jax.ops.camera import Camera
from v3d_jax.training import conditioning, objective, video
from v3d_jax.training.cached import CachedLatentsConfig
from v3d_jax.training.parts import SCENE_PARTS, Part
from v3d_jax.training.perceptual import PerceptualConfig


@dataclasses.dataclass(frozen=True)
class SceneConfig:
    """The source views of a clip, and the weight of the colours' loss (V3D's is 1)."""

    sources: posed.SourceConfig = dataclasses.field(default_factory=posed.SourceConfig)
    rgb_weight: float = 1.0


def build(
    model: generator.GeneratorConfig,
    loss_config: edm.LossConfig,
    perceptual_config: PerceptualConfig,
    condition_config: conditioning.ConditionConfig,
    scene_config: SceneConfig,
    sampling: sampler.SamplingConfig,
    data: objective.DataConfig,
    latents: CachedLatentsConfig,
    dtype: Any,
    parts: tuple[Part, ...] = SCENE_PARTS,
    init_from: str | None = None,
    train_only: tuple[str, ...] = (),
) -> objective.Objective:
    """`video.build` over data sets of scenes; `init_from` may be a model of objects.

    Raises `UserError` also where the model has no PixelNeRF, and for more source views than frames.
    """
    if model.pixelnerf is None:
        raise errors.UserError(
            "this model has no pixelnerf: objects are trained by configs/mini.py"
        )
    most = scene_config.sources.max_sources
    if most > data.loader.num_frames:
        raise errors.UserError(
            f"--scene.sources.max-sources {most}: a clip has {data.loader.num_frames} frames"
        )
    return video.build(
        model,
        loss_config,
        perceptual_config,
        condition_config,
        sampling,
        data,
        latents,
        dtype,
        parts,
        init_from,
        train_only,
        video.Kind(
            functools.partial(posed.PosedClips, config=scene_config.sources),
            functools.partial(condition, scene_config),
        ),
    )


def condition(
    scene_config: SceneConfig,
    model: generator.Generator,
    batch: Any,
    key: Key[Array, ""],
    config: conditioning.ConditionConfig,
) -> conditioning.Conditioned:
    """What conditions a batch of `data.posed` clips, and the loss of the colours."""
    condition_key, jitter_key = jax.random.split(key)
    views, targets = posed_views(batch)
    size = batch["latents"].shape[2:4]
    if "latents" in model.config.pixelnerf.carried:
        views = views._replace(latents=_at(batch["latents"], batch["source_places"]))
    rendering = model.pixelnerf(views, targets, size, jitter_key)
    rgb = jnp.mean(pixelnerf.rgb_loss(rendering.rgb, batch["small"].astype(jnp.float32) / 255.0))
    made = conditioning.make(model, batch, condition_key, config)

    def finish(frames: Float[Array, "b k h w 3"], places: Int[Array, "b k"]) -> Any:
        cameras = jax.tree.map(lambda x: _at(x, places), targets)
        near = rendering.disparity
        near = near._replace(frames=_at(near.frames, places))
        return model.pixelnerf.finish(frames, views, cameras, near)

    return conditioning.Conditioned(
        made._replace(features=rendering.features),
        scene_config.rgb_weight * rgb,
        {"rgb": rgb},
        finish if model.config.pixelnerf.blend else None,
    )


def posed_views(batch: Any) -> tuple[pixelnerf.Views, Camera]:
    """The source views of a batch, and the cameras [b, t] of its frames."""
    height, width = batch["sources"].shape[2:4]
    clips, frames = batch["world_to_camera"].shape[:2]
    size = jnp.ones((clips, frames), jnp.int32)
    targets = Camera(batch["world_to_camera"], batch["intrinsics"], width * size, height * size)
    cameras = jax.tree.map(lambda x: _at(x, batch["source_places"]), targets)
    images = image.to_network(batch["sources"].astype(jnp.float32) / 255.0)
    return pixelnerf.Views(images, cameras, batch["valid"]), targets


def _at(of_frames: Array, places: Int[Array, "b s"]) -> Array:
    """What the frames [b, t, ...] of clips have at some of them, [b, s, ...]."""
    return jax.vmap(lambda clip, chosen: clip[chosen])(of_frames, places)
