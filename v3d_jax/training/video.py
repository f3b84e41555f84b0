"""Training the video model on latents: the UNet, and the image tower that gives it context.

Axes: `b` clip, `t` frame, `h w` latents, `c` channel. The encoder is frozen and its latents are
computed once, before training; the decoder may learn to make more of latents that are not quite
right. Frame 0 is the input view. What conditions a frame is what `v3d_jax.pipeline` gives it when
sampling.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from v3d_jax import errors, pipeline
from v3d_jax.data import latents as latent_caches
from v3d_jax.data import loader
from v3d_jax.diffusion import guidance, sampler
from v3d_jax.diffusion import loss as edm
from v3d_jax.nn import autoencoder as autoencoders
from v3d_jax.nn import generator
from v3d_jax.ops import image, metrics
from v3d_jax.parallel import sharding
from v3d_jax.state import Loss, Metrics, Params
from v3d_jax.training import cached, conditioning, objective, perceptual
from v3d_jax.training import parts as learning
from v3d_jax.training.cached import CachedLatentsConfig
from v3d_jax.training.conditioning import ConditionConfig, Conditioner
from v3d_jax.training.parts import PARTS, Part
from v3d_jax.training.perceptual import PerceptualConfig
from v3d_jax.weights import folder as model_folder
from v3d_jax.weights.tensors import FloatName


class Frozen(NamedTuple):
    """Weights that training leaves alone."""

    autoencoder: Params
    lpips: perceptual.Networks | None
    rest: Params  # of UNet and tower, what does not learn
    # Of latents; here, so that a compiled perceptual term serves every autoencoder.
    scale: Float[Array, ""]


class Kind(NamedTuple):
    """What differs between models of objects and of scenes (`training.scene`)."""

    clips: Callable[[Sequence[latent_caches.LatentCache]], loader.Clips]
    condition: Conditioner


def build(
    model: generator.GeneratorConfig,
    loss_config: edm.LossConfig,
    perceptual_config: PerceptualConfig,
    condition_config: ConditionConfig,
    sampling: sampler.SamplingConfig,
    data: objective.DataConfig,
    latents: CachedLatentsConfig,
    dtype: Any,
    parts: tuple[Part, ...] = PARTS,
    init_from: str | None = None,
    train_only: tuple[str, ...] = (),
    kind: Kind | None = None,
) -> objective.Objective:
    """The objective over the cached latents of orbit data sets; activations are `dtype`.

    The generator takes the autoencoder's settings from its folder. Encodes every data set whose
    latents are not kept from before. Only `parts` learn, and of them only weights whose paths match
    `train_only`, if given; the others are those of `init_from`. Raises `UserError` where that
    cannot be.
    """
    kind = OBJECTS if kind is None else kind
    perceptually = perceptual_config.weight > 0.0
    learning.check(parts, train_only, perceptually, init_from, learning.of(model))
    opened = cached.open_autoencoder(latents, dtype)
    # The perceptual term decodes frames alone, and so must whoever uses what learnt from it.
    alone = opened.config.frames_alone or "decoder" in parts
    model = _with_autoencoder(model, dataclasses.replace(opened.config, frames_alone=alone))
    settings = pipeline.Settings(model, sampling, activations=jnp.dtype(dtype).name)

    def load(path: Path) -> Params:
        return learning.split(learning.load(path, parts, model), train_only)[0]

    def init(key: jax.Array) -> Params:
        others = tuple(name for name in parts if name != "decoder")
        made = learning.random(model, dtype, key, others)
        if "decoder" in parts:
            made["decoder"] = jax.tree.map(jnp.asarray, opened.params["decoder"])
        return learning.split(made, train_only)[0]

    rest = abstract_rest(model, dtype, parts, train_only)
    if rest:
        found = learning.load(Path(init_from), _with_rest(model, parts, train_only), model)
        found = learning.resting(found, parts, train_only)
        rest = objective.fit(found, rest, init_from)

    sources, heldout = objective.train_sources(data), objective.heldout_source(data)
    shown = [] if heldout is None else [heldout]
    caches = [opened.latents(source) for source in (*sources, *shown)]
    if keeps_tokens(model, latents, parts):
        caches = cached.add_tokens(caches, model.vision, rest["vision"], latents, dtype)
    clips = kind.clips(caches[: len(sources)])
    heldout_clips = kind.clips(caches[-1:]) if shown else None
    preview_batch, held = objective.preview_batch(data, clips, heldout_clips)

    networks = perceptual.load(perceptual_config, model.frame_size)
    pictures = perceptual_config.pictures
    if pictures > data.loader.num_frames:
        raise errors.UserError(
            f"--perceptual.frames {pictures}: a clip has {data.loader.num_frames} frames"
        )
    scale = jnp.float32(opened.config.scale_factor)
    frozen = Frozen(opened.params, networks, rest, scale)

    def preview(params: Params, frozen: Frozen, batch: Any, key: jax.Array):
        merged = pipeline.networks(settings, whole(params, frozen))
        made = kind.condition(merged, batch, key, condition_config)
        images, psnr = samples(settings, whole(params, frozen), batch, made, key)
        clips = batch["latents"].astype(jnp.float32)
        losses = fixed_noise_loss(merged, clips, made.condition, key, loss_config)
        return images, {"psnr": psnr, "loss": losses}

    def export(path: Path, params: Params, metadata: dict[str, Any], dtype: FloatName) -> None:
        weights = whole(params, frozen)
        model_folder.save(path, model, sampling, weights, dtype=dtype, metadata=metadata)

    return objective.Objective(
        init=init,
        load=load,
        loss=make_loss(
            settings, loss_config, perceptual_config, condition_config, parts, kind.condition
        ),
        frozen=frozen,
        clips=clips,
        preview=preview,
        preview_batch=preview_batch,
        heldout=held,
        export=export,
        pictures=pictures,
    )


def keeps_tokens(
    model: generator.GeneratorConfig, latents: CachedLatentsConfig, parts: tuple[Part, ...]
) -> bool:
    """Whether batches hold the image tower's vectors, so that it need not run."""
    return latents.tokens and "vision" not in parts and model.vision.output == "pooled"


def make_loss(
    settings: pipeline.Settings,
    loss_config: edm.LossConfig,
    perceptual_config: PerceptualConfig,
    condition_config: ConditionConfig,
    parts: tuple[Part, ...],
    conditioner: Conditioner | None = None,
) -> Loss:
    """`video_loss` as a function of what learns, what is `Frozen`, a batch and a key."""

    def loss(params: Params, frozen: Frozen, batch: Any, key: jax.Array):
        measure = None
        if "decoder" in parts and not perceptual_config.pictures:
            # With the decoder that does not learn, for clean latents.
            decoder = frozen.autoencoder["decoder"]
            measure = pipeline.networks(settings, whole({**params, "decoder": decoder}, frozen))
        return video_loss(
            pipeline.networks(settings, whole(params, frozen)),
            batch,
            key,
            loss_config,
            condition_config,
            None if frozen.lpips is None else (frozen.lpips, perceptual_config),
            measure,
            conditioner,
            frozen.scale,
        )

    return loss


def abstract_rest(
    model: generator.GeneratorConfig,
    dtype: Any,
    parts: tuple[Part, ...],
    train_only: tuple[str, ...],
) -> Params:
    """Shapes of what does not learn of UNet and tower, and of a decoder that learns in part."""
    names = _with_rest(model, parts, train_only)

    def made(key: jax.Array) -> Params:
        return learning.resting(learning.random(model, dtype, key, names), parts, train_only)

    return jax.eval_shape(made, jax.random.key(0))


def _with_rest(
    model: generator.GeneratorConfig, parts: tuple[Part, ...], train_only: tuple[str, ...]
) -> tuple[Part, ...]:
    """The networks that have weights which may not learn; patterns are of all that learn."""
    others = tuple(name for name in learning.of(model) if name not in parts)
    return (*others, *(parts if train_only else ()))


def whole(params: Params, frozen: Frozen) -> Params:
    """The generator's weights: those that learn, and those that do not."""
    networks = learning.join(frozen.rest, params)
    decoder = networks.pop("decoder", frozen.autoencoder["decoder"])
    return {**networks, "autoencoder": {**frozen.autoencoder, "decoder": decoder}}


def video_loss(
    model: generator.Generator,
    batch: Any,
    key: Key[Array, ""],
    loss_config: edm.LossConfig,
    condition_config: ConditionConfig,
    compare: tuple[perceptual.Networks, PerceptualConfig] | None = None,
    measure: generator.Generator | None = None,
    conditioner: Conditioner | None = None,
    scale: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The EDM loss of a batch of latent clips; gradients reach the UNet and the image tower.

    They reach what else `conditioner` runs, if it is not that of objects.

    With `compare`, distances of decoded denoised frames are added: from the batch's pictures, if it
    has them, or from decoded clean frames, the latter decoded by `measure`, if given. Gradients
    then reach the model's decoder as well. `scale` is that of the latents, if not the settings'.
    """
    loss_key, augment_key, frames_key = jax.random.split(key, 3)
    made = (conditioner or conditioning.of_object)(model, batch, augment_key, condition_config)
    condition = made.condition
    network = sharding.split_clips(model.unet)
    loss, seen = edm.edm_loss(network, batch["latents"], condition, loss_key, loss_config)
    # Whether a change helps shows first where there is much noise, or little.
    noisy = seen.log_sigma > loss_config.p_mean
    found = {
        "loss_high": _mean_where(seen.clip_loss, noisy),
        "loss_low": _mean_where(seen.clip_loss, ~noisy),
        **made.metrics,
    }
    loss = loss + made.loss
    if compare is not None:
        networks, config = compare
        scale = model.config.autoencoder.scale_factor if scale is None else scale
        seen_frames = perceptual.distances(
            networks,
            model.autoencoder.decode,
            seen.denoised / scale,
            batch["latents"].astype(jnp.float32) / scale,
            frames_key,
            config,
            model.unet.dtype,
            decode_clean=None if measure is None else measure.autoencoder.decode,
            pictures=(
                perceptual.Pictures(batch["pictures"], batch["places"])
                if "pictures" in batch
                else None
            ),
            finish=made.finish,
        )
        found["lpips"] = seen_frames.lpips
        term = seen_frames.lpips
        if config.absolute > 0.0:
            found["absolute"] = seen_frames.absolute
            term = term + config.absolute * seen_frames.absolute
        loss = loss + config.weight * term
    return loss, found


OBJECTS = Kind(loader.JoinedClips, conditioning.of_object)


def samples(
    settings: pipeline.Settings,
    params: Params,
    batch: Any,
    made: conditioning.Conditioned,
    key: Key[Array, ""],
) -> tuple[Float[Array, "r t h w 3"], Float[Array, " b"]]:
    """Rows of clips, each above its sample from the same input view, and every sample's PSNR.

    The clips are decoded latents, which is what a perfect sample would look like before it is
    finished, where that is done; the PSNR in dB is over the unseen frames.
    """

    def decode(clip: Float[Array, "t h w c"]) -> Float[Array, "t H W 3"]:
        return pipeline.decode(settings, params, clip[None])[0]

    drawn = pipeline.sample_latents(settings, params, made.condition, key)
    truth, sample = (
        jax.lax.map(decode, clips) for clips in (batch["latents"].astype(jnp.float32), drawn)
    )
    if made.finish is not None:
        places = jnp.broadcast_to(jnp.arange(sample.shape[1]), sample.shape[:2])
        sample = image.from_network(made.finish(image.to_network(sample), places))
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
    nothing = {"drop_context": 0.0, "drop_latent": 0.0, "drop_features": 0.0}
    config = dataclasses.replace(config, **nothing)

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


def _mean_where(values: Float[Array, " b"], chosen: Any) -> Float[Array, ""]:
    """The mean of the chosen values; 0 where there are none."""
    return jnp.sum(jnp.where(chosen, values, 0.0)) / jnp.maximum(jnp.sum(chosen), 1)
