"""Training the video model on latents: the UNet, and the image tower that gives it context.

Axes: `b` clip, `t` frame, `h w` latents, `c` channel. The autoencoder is frozen and its latents
are computed once, before training. Frame 0 is the input view. What conditions a frame is what
`v3d_jax.pipeline` gives it when sampling.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from v3d_jax import errors, pipeline
from v3d_jax.data import latents, loader, orbits
from v3d_jax.diffusion import guidance, sampler
from v3d_jax.diffusion import loss as edm
from v3d_jax.nn import autoencoder as autoencoders
from v3d_jax.nn import clip, conditioner, generator, unet
from v3d_jax.ops import image, metrics
from v3d_jax.state import Metrics, Params
from v3d_jax.training import autoencoder, objective, perceptual
from v3d_jax.training.perceptual import PerceptualConfig
from v3d_jax.weights import folder as model_folder
from v3d_jax.weights.folder import FloatName

PARTS = ("unet", "vision")


@dataclasses.dataclass(frozen=True)
class ConditionConfig:
    """Scalars of the published models, for generators whose conditioner names them.

    For one that names `cond_aug`, noise of standard deviation exp(N(mean, std^2)) is added to the
    input view's latent, and that deviation is the scalar (V3D's values).
    """

    augment_mean: float = -3.0
    augment_std: float = 0.5
    fps_id: float = 1.0
    motion_bucket_id: float = 300.0


@dataclasses.dataclass(frozen=True)
class CachedLatentsConfig:
    """The frozen autoencoder's folder, and where and how its latents are kept."""

    autoencoder: str = "runs/mini_vae/model"
    folder: str | None = None  # beside the data set if None
    save: bool = True
    cache: latents.CacheConfig = dataclasses.field(default_factory=latents.CacheConfig)


class Frozen(NamedTuple):
    """Weights that training leaves alone."""

    autoencoder: Params
    lpips: perceptual.Networks | None


def build(
    model: generator.GeneratorConfig,
    loss_config: edm.LossConfig,
    perceptual_config: PerceptualConfig,
    condition_config: ConditionConfig,
    sampling: sampler.SamplingConfig,
    data: objective.DataConfig,
    cached: CachedLatentsConfig,
    dtype: Any,
) -> objective.Objective:
    """The objective over the cached latents of orbit data sets; activations are `dtype`.

    The generator takes the autoencoder's settings from its folder. Encodes every data set whose
    latents are not kept from before.
    """
    autoencoder_config, autoencoder_params = autoencoder.load(Path(cached.autoencoder))
    model = _with_autoencoder(model, autoencoder_config)
    sources, heldout = objective.train_sources(data), objective.heldout_source(data)
    encode = _encoder(autoencoder_config, autoencoder_params, dtype)
    # Scaled when they are encoded: no step's program holds the measured scale.
    weights = latents.fingerprint(
        {"params": autoencoder_params, "scale": np.float64(autoencoder_config.scale_factor)}
    )
    cache = functools.partial(_latents, encode=encode, weights=weights, cached=cached)
    clips = loader.JoinedClips([cache(source) for source in sources])
    heldout_clips = None if heldout is None else cache(heldout)
    settings = pipeline.Settings(model, sampling, activations=jnp.dtype(dtype).name)

    preview_batch, held = objective.preview_batch(data, clips, heldout_clips)

    frozen = Frozen(autoencoder_params, perceptual.load(perceptual_config, model.frame_size))

    def merged(params: Params, frozen: Frozen) -> generator.Generator:
        return pipeline.networks(settings, {**params, "autoencoder": frozen.autoencoder})

    def init(key: jax.Array) -> Params:
        rngs = nnx.Rngs(key)
        modules = {
            "unet": unet.VideoUNet(model.unet, dtype=dtype, rngs=rngs),
            "vision": clip.VisionTransformer(model.vision, dtype=dtype, rngs=rngs),
        }
        return {name: nnx.to_pure_dict(nnx.state(module)) for name, module in modules.items()}

    def load(path: Path) -> Params:
        whole = nnx.to_pure_dict(model_folder.load(path).params)
        return {name: whole[name] for name in PARTS}

    def loss(params: Params, frozen: Frozen, batch: Any, key: jax.Array):
        return video_loss(
            merged(params, frozen),
            batch,
            key,
            loss_config,
            condition_config,
            None if frozen.lpips is None else (frozen.lpips, perceptual_config),
        )

    def preview(params: Params, frozen: Frozen, batch: Any, key: jax.Array):
        whole = {**params, "autoencoder": frozen.autoencoder}
        condition = make_condition(merged(params, frozen), batch, key, condition_config)
        images, psnr = samples(settings, whole, batch, condition, key)
        clips = batch["latents"].astype(jnp.float32)
        losses = fixed_noise_loss(merged(params, frozen), clips, condition, key, loss_config)
        return images, {"psnr": psnr, "loss": losses}

    def export(path: Path, params: Params, metadata: dict[str, Any], dtype: FloatName) -> None:
        whole = {**params, "autoencoder": autoencoder_params}
        model_folder.save(path, model, sampling, whole, dtype=dtype, metadata=metadata)

    return objective.Objective(
        init=init,
        load=load,
        loss=loss,
        frozen=frozen,
        clips=clips,
        preview=preview,
        preview_batch=preview_batch,
        heldout=held,
        export=export,
    )


def video_loss(
    model: generator.Generator,
    batch: Any,
    key: Key[Array, ""],
    loss_config: edm.LossConfig,
    condition_config: ConditionConfig,
    compare: tuple[perceptual.Networks, PerceptualConfig] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The EDM loss of a batch of latent clips; gradients reach the UNet and the image tower.

    With `compare`, LPIPS between decoded denoised and clean frames is added.
    """
    loss_key, augment_key, frames_key = jax.random.split(key, 3)
    condition = make_condition(model, batch, augment_key, condition_config)
    loss, seen = edm.edm_loss(model.unet, batch["latents"], condition, loss_key, loss_config)
    # Whether a change helps shows first where there is much noise, or little.
    noisy = seen.log_sigma > loss_config.p_mean
    found = {
        "loss_high": _mean_where(seen.clip_loss, noisy),
        "loss_low": _mean_where(seen.clip_loss, ~noisy),
    }
    if compare is not None:
        networks, config = compare
        scale = model.config.autoencoder.scale_factor
        found["lpips"] = perceptual.distance(
            networks,
            model.autoencoder.decode,
            seen.denoised / scale,
            batch["latents"].astype(jnp.float32) / scale,
            frames_key,
            config,
            model.unet.dtype,
        )
        loss = loss + config.weight * found["lpips"]
    return loss, found


def make_condition(
    model: generator.Generator,
    batch: Any,
    key: Key[Array, ""],
    config: ConditionConfig,
) -> guidance.Condition:
    """Tokens of the input view, its latent and the scalars, as `pipeline.encode_condition`.

    The latent is the posterior's mean: scaled, or for a model told of `cond_aug` not scaled and
    with noise. The batch's latents are scaled. Raises `UserError` for a scalar that the data do
    not give.
    """
    wanted = model.config.conditioner
    first = batch["latents"][:, 0].astype(jnp.float32)
    level = jnp.zeros(first.shape[0])
    if "cond_aug" in wanted.scalars:
        level_key, noise_key = jax.random.split(key)
        drawn = jax.random.normal(level_key, level.shape)
        level = jnp.exp(config.augment_mean + config.augment_std * drawn)
        first = first / model.config.autoencoder.scale_factor
        first = first + level[:, None, None, None] * jax.random.normal(noise_key, first.shape)
    view = image.to_network(batch["image"].astype(jnp.float32) / 255.0)
    values = scalars(batch, level, config)
    unknown = sorted(set(wanted.scalars) - set(values))
    if unknown:
        raise errors.UserError(
            f"training knows no scalar {', '.join(unknown)}; it has {', '.join(sorted(values))}"
        )
    vector = conditioner.vector(wanted, {name: values[name] for name in wanted.scalars})
    return guidance.Condition(model.vision(view), first, vector)


def scalars(
    batch: Any, augment_level: Float[Array, " b"], config: ConditionConfig
) -> dict[str, Float[Array, "b t"]]:
    """Every scalar that can condition a frame.

    `azimuth` is the turn since the input view in degrees, in [0, 360); `elevation` in degrees.
    """
    azimuth = batch["azimuth"]
    frames = jnp.zeros_like(azimuth)
    return {
        "azimuth": jnp.mod(azimuth - azimuth[:, :1], 360.0),
        "elevation": frames + batch["elevation"][:, None],
        "cond_aug": frames + augment_level[:, None],
        "fps_id": frames + config.fps_id,
        "motion_bucket_id": frames + config.motion_bucket_id,
    }


def samples(
    settings: pipeline.Settings,
    params: Params,
    batch: Any,
    condition: guidance.Condition,
    key: Key[Array, ""],
) -> tuple[Float[Array, "r t h w 3"], Float[Array, " b"]]:
    """Rows of clips, each above its sample from the same input view, and every sample's PSNR.

    The clips are decoded latents, which is what a perfect sample would look like; the PSNR in dB
    is over the unseen frames.
    """

    def decode(clip: Float[Array, "t h w c"]) -> Float[Array, "t H W 3"]:
        return pipeline.decode(settings, params, clip[None])[0]

    drawn = pipeline.sample_latents(settings, params, condition, key)
    truth, sample = (
        jax.lax.map(decode, clips) for clips in (batch["latents"].astype(jnp.float32), drawn)
    )
    rows = jnp.stack([truth, sample], axis=1).reshape(-1, *truth.shape[1:])
    psnr = metrics.psnr(sample[:, 1:], truth[:, 1:])
    return rows, jnp.mean(psnr, axis=1)


def fixed_noise_loss(
    model: generator.Generator,
    clips: Float[Array, "b t h w c"],
    condition: guidance.Condition,
    key: Key[Array, ""],
    config: edm.LossConfig,
    draws: int = 8,
) -> Float[Array, " b"]:
    """The loss of every clip with nothing dropped: comparable between steps for the same key."""
    config = dataclasses.replace(config, drop_context=0.0, drop_latent=0.0)

    def draw(key: Key[Array, ""]) -> Float[Array, " b"]:
        return edm.edm_loss(model.unet, clips, condition, key, config)[1].clip_loss

    return jnp.mean(jax.lax.map(draw, jax.random.split(key, draws)), axis=0)


def _with_autoencoder(
    model: generator.GeneratorConfig, config: autoencoders.AutoencoderConfig
) -> generator.GeneratorConfig:
    try:
        return dataclasses.replace(model, autoencoder=config)
    except ValueError as error:
        raise errors.UserError(f"this autoencoder does not fit the model: {error}") from None


def _encoder(
    config: autoencoders.AutoencoderConfig, params: Params, dtype: Any
) -> Callable[[np.ndarray], Float[Array, "b h w c"]]:
    module = nnx.eval_shape(lambda: autoencoders.Autoencoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef = nnx.split(module)[0]
    params = jax.tree.map(jnp.asarray, params)

    @jax.jit
    def encode(params: Params, frames: Any) -> Float[Array, "b h w c"]:
        images = image.to_network(frames.astype(jnp.float32) / 255.0)
        return nnx.merge(graphdef, params).encode(images).mean * config.scale_factor

    return lambda frames: encode(params, frames)


def _latents(
    source: orbits.Source, encode: latents.Encode, weights: str, cached: CachedLatentsConfig
) -> latents.LatentCache:
    folder = source.path if cached.folder is None else Path(cached.folder)
    return latents.open_or_encode(
        source,
        encode,
        weights,
        cached.cache,
        folder=folder,
        save=cached.save and jax.process_index() == 0,
    )


def _mean_where(values: Float[Array, " b"], chosen: Any) -> Float[Array, ""]:
    """The mean of the chosen values; 0 where there are none."""
    return jnp.sum(jnp.where(chosen, values, 0.0)) / jnp.maximum(jnp.sum(chosen), 1)
