"""Scalars that condition the UNet (SVD's fps, motion bucket, noise augmentation) as one vector.

Axes: `b` clip, `t` frame, `a` vector channels. Each scalar becomes a sinusoid of `dim` channels,
cosines first; the sinusoids are concatenated in the order of the names. No parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from v3d_jax.nn import layers


@dataclass(frozen=True)
class ConditionerConfig:
    """Names of the scalars in the order of the vector, and channels of each sinusoid.

    The defaults are those of SVD and V3D, whose vector has 768 channels.
    """

    scalars: tuple[str, ...] = ("fps_id", "motion_bucket_id", "cond_aug")
    dim: int = 256

    @property
    def vector_dim(self) -> int:
        """Channels of the whole vector."""
        return len(self.scalars) * self.dim


def vector(
    config: ConditionerConfig, values: Mapping[str, Float[Array, "b t"]]
) -> Float[Array, "b t a"]:
    """The vector of every frame, from one value a frame for each scalar of the config, in float32.

    A missing or an unknown name raises a ValueError.
    """
    if set(values) != set(config.scalars):
        raise ValueError(f"scalars {sorted(values)} given, {sorted(config.scalars)} expected")
    parts = [layers.sinusoid(values[name], config.dim) for name in config.scalars]
    return jnp.concatenate(parts, axis=-1)
