"""What conditions clips in training: what `v3d_jax.pipeline` gives them when sampling.

Axes: `b` clip, `t` frame.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from v3d_jax import errors
from v3d_jax.diffusion import guidance
from v3d_jax.nn import conditioner, generator
from v3d_jax.ops import image
from v3d_jax.state import Metrics


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


# Decoded frames [b k h w 3] in [-1, 1] and their places [b k] in the clips, to frames as sampled.
Finish = Callable[[Array, Array], Array]


class Conditioned(NamedTuple):
    """What conditions a batch, and what making it adds to the loss and to the metrics.

    `finish` is what sampling does with decoded frames, if anything.
    """

    condition: guidance.Condition
    loss: Float[Array, ""] | float
    metrics: Metrics
    finish: Finish | None = None


Conditioner = Callable[[generator.Generator, Any, Key[Array, ""], ConditionConfig], Conditioned]


def make(
    model: generator.Generator,
    batch: Any,
    key: Key[Array, ""],
    config: ConditionConfig,
) -> guidance.Condition:
    """Tokens of the input view, its latent and the scalars, as `pipeline.encode_condition`.

    The tokens are the batch's, where a tower that does not learn has made them.

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
    if "tokens" in batch:
        tokens = batch["tokens"]
    else:
        tokens = model.vision(image.to_network(batch["image"].astype(jnp.float32) / 255.0))
    values = scalars(batch, level, config)
    unknown = sorted(set(wanted.scalars) - set(values))
    if unknown:
        raise errors.UserError(
            f"training knows no scalar {', '.join(unknown)}; it has {', '.join(sorted(values))}"
        )
    vector = conditioner.vector(wanted, {name: values[name] for name in wanted.scalars})
    return guidance.Condition(tokens, first, vector)


def of_object(
    model: generator.Generator, batch: Any, key: Key[Array, ""], config: ConditionConfig
) -> Conditioned:
    """`make`, with no loss of its own."""
    return Conditioned(make(model, batch, key, config), 0.0, {})


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
