"""The denoising objective of EDM with V3D's distribution of noise levels.

With sigma_data 1 the weight cancels c_out^2, so the loss is the mean squared error of the raw
network against the v-prediction target (n - sigma y) / sqrt(sigma^2 + 1).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from v3d_jax.diffusion import guidance, precondition
from v3d_jax.diffusion.guidance import Condition, ConditionalNetwork


@dataclass(frozen=True)
class LossConfig:
    """ln sigma ~ N(p_mean, p_std^2), and how often a part of the conditioning is dropped.

    The defaults are V3D's, except that all frames of a clip share one noise level as they do when
    sampling; the release draws one a frame (`per_frame_sigma`). Features, which scene models have,
    are dropped a frame at a time.
    """

    p_mean: float = 1.5
    p_std: float = 2.0
    per_frame_sigma: bool = False
    drop_context: float = 0.2
    drop_latent: float = 0.2
    drop_features: float = 0.0


class LossMetrics(NamedTuple):
    """What the loss saw, clip by clip."""

    clip_loss: Float[Array, " b"]
    log_sigma: Float[Array, " b"]  # mean over the frames
    denoised: Float[Array, "b t h w c"]


def draw_sigma(
    key: Key[Array, ""], clips: int, frames: int, config: LossConfig
) -> Float[Array, "{clips} {frames}"]:
    """Log-normal noise levels (EDM, table 1), one a clip or one a frame."""
    drawn = (clips, frames if config.per_frame_sigma else 1)
    log_sigma = config.p_mean + config.p_std * jax.random.normal(key, drawn)
    return jnp.broadcast_to(jnp.exp(log_sigma), (clips, frames))


def drop_condition(key: Key[Array, ""], condition: Condition, config: LossConfig) -> Condition:
    """Zeroes tokens and latent, independently and a clip at a time, and frames' features.

    The vector stays.
    """
    context_key, latent_key = jax.random.split(key)
    features = condition.features
    if features is not None:
        kept = 1 - config.drop_features
        shape = (*features.shape[:2], 1, 1, 1)
        keep = jax.random.bernoulli(jax.random.fold_in(key, 1), kept, shape)
        features = jnp.where(keep, features, 0)
    clips = condition.context.shape[0]
    keep_context = jax.random.bernoulli(context_key, 1 - config.drop_context, (clips, 1, 1))
    keep_latent = jax.random.bernoulli(latent_key, 1 - config.drop_latent, (clips, 1, 1, 1))
    return condition._replace(
        context=jnp.where(keep_context, condition.context, 0),
        latent=jnp.where(keep_latent, condition.latent, 0),
        features=features,
    )


def edm_loss(
    network: ConditionalNetwork,
    latents: Float[Array, "b t h w c"],
    condition: Condition,
    key: Key[Array, ""],
    config: LossConfig,
) -> tuple[Float[Array, ""], LossMetrics]:
    """Weighted squared error of the denoiser on scaled, clean latents (EDM, equations 2 and 8).

    The weight is (sigma^2 + 1) / sigma^2; the error is a mean over everything but the clip, then
    over clips. `network` is called as diffusion/guidance.py states.
    """
    sigma_key, noise_key, drop_key = jax.random.split(key, 3)
    clips, frames = latents.shape[:2]
    latents = latents.astype(jnp.float32)
    sigma = draw_sigma(sigma_key, clips, frames, config)
    noise = jax.random.normal(noise_key, latents.shape)
    noisy = latents + sigma[..., None, None, None] * noise
    kept = drop_condition(drop_key, condition, config)
    conditioned = guidance.condition_network(network, kept)
    denoised = precondition.denoise(conditioned, noisy, sigma)
    error = jnp.mean(jnp.square(denoised - latents), axis=(2, 3, 4))
    clip_loss = jnp.mean((sigma**2 + 1) / sigma**2 * error, axis=1)
    metrics = LossMetrics(clip_loss, jnp.mean(jnp.log(sigma), axis=1), denoised)
    return jnp.mean(clip_loss), metrics
