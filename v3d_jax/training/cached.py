"""The frozen autoencoder of a run and the latents that it makes of the run's data, once.

Axes: `b` frame, `h w` image or latents, `c` channel. Latents are scaled when they are encoded, so
that no step's program holds the scale that was measured in training the autoencoder.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from v3d_jax.data import latents, orbits
from v3d_jax.nn.autoencoder import Autoencoder, AutoencoderConfig
from v3d_jax.ops import image
from v3d_jax.state import Params
from v3d_jax.training import autoencoder


@dataclasses.dataclass(frozen=True)
class CachedLatentsConfig:
    """The frozen autoencoder's folder, and where and how its latents are kept."""

    autoencoder: str = "runs/mini_vae/model"
    folder: str | None = None  # beside the data set if None
    save: bool = True
    cache: latents.CacheConfig = dataclasses.field(default_factory=latents.CacheConfig)


class Opened(NamedTuple):
    """The autoencoder of the settings, and how to get the latents of a data set."""

    config: AutoencoderConfig
    params: Params
    latents: Callable[[orbits.Source], latents.LatentCache]


def open_autoencoder(cached: CachedLatentsConfig, dtype: Any) -> Opened:
    """Reads the autoencoder; its `latents` encodes what is not kept from before, in `dtype`."""
    config, params = autoencoder.load(Path(cached.autoencoder))
    encode = encoder(config, params, dtype)
    weights = latents.fingerprint({"params": params, "scale": np.float64(config.scale_factor)})

    def open_or_encode(source: orbits.Source) -> latents.LatentCache:
        return latents.open_or_encode(
            source,
            encode,
            weights,
            cached.cache,
            folder=source.path if cached.folder is None else Path(cached.folder),
            save=cached.save and jax.process_index() == 0,
        )

    return Opened(config, params, open_or_encode)


def encoder(config: AutoencoderConfig, params: Params, dtype: Any) -> latents.Encode:
    """Scaled means of the posteriors of 8-bit frames on white, one compiled program a shape."""
    module = nnx.eval_shape(lambda: Autoencoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef = nnx.split(module)[0]
    params = jax.tree.map(jnp.asarray, params)

    @jax.jit
    def encode(params: Params, frames: Any) -> Float[Array, "b h w c"]:
        images = image.to_network(frames.astype(jnp.float32) / 255.0)
        return nnx.merge(graphdef, params).encode(images).mean * config.scale_factor

    return lambda frames: encode(params, frames)
