"""The frozen autoencoder of a run and the latents that it makes of the run's data, once.

Axes: `b` frame, `h w` image or latents, `c` channel. Latents are scaled when they are encoded.
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

from v3d_jax.data import latents, orbits, towers
from v3d_jax.nn import clip
from v3d_jax.nn.autoencoder import Autoencoder, AutoencoderConfig
from v3d_jax.ops import image
from v3d_jax.state import Params
from v3d_jax.training import autoencoder
from v3d_jax.weights import folder as model_folder


@dataclasses.dataclass(frozen=True)
class CachedLatentsConfig:
    """The frozen autoencoder's folder, and where and how its latents are kept.

    Where the image tower gives one vector a view and does not learn, its vectors are kept there as
    well, unless `tokens` is false: then it runs in every step.
    """

    autoencoder: str = "runs/mini_vae/model"
    folder: str | None = None  # beside the data set if None
    save: bool = True
    tokens: bool = True
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
            folder=_folder(source, cached),
            save=_save(cached),
        )

    return Opened(config, params, open_or_encode)


def add_tokens(
    caches: list[latents.LatentCache],
    config: clip.VisionConfig,
    params: Params,
    cached: CachedLatentsConfig,
    dtype: Any,
) -> list[latents.LatentCache]:
    """The caches with what an image tower of these weights makes of every view.

    Encodes what is not kept from before, in `dtype`.
    """
    encode = tower(config, params, dtype)
    weights = latents.fingerprint({"params": params, "config": np.str_(repr(config))})
    return [
        dataclasses.replace(
            cache,
            tokens=towers.open_or_encode(
                cache.source,
                encode,
                weights,
                cached.cache,
                folder=_folder(cache.source, cached),
                save=_save(cached),
            ),
        )
        for cache in caches
    ]


def _folder(source: orbits.Source, cached: CachedLatentsConfig) -> Path:
    return source.path if cached.folder is None else Path(cached.folder)


def _save(cached: CachedLatentsConfig) -> bool:
    return cached.save and jax.process_index() == 0


def write(path: Path, model: str, cached: CachedLatentsConfig, dtype: Any) -> None:
    """Keeps the latents of a data set's splits for a model's folder, and its tower's vectors.

    Of a tower that gives patches nothing is kept: it is there to be trained.
    """
    opened = open_autoencoder(dataclasses.replace(cached, autoencoder=model), dtype)
    caches = [opened.latents(orbits.source(path, split)) for split in orbits.splits(path)]
    if not autoencoder.is_generator(Path(model)):
        return
    found = model_folder.load(Path(model))
    if found.generator.vision.output == "pooled":
        params = nnx.to_pure_dict(found.params)["vision"]
        add_tokens(caches, found.generator.vision, params, cached, dtype)


def tower(config: clip.VisionConfig, params: Params, dtype: Any) -> towers.Encode:
    """Tokens of 8-bit frames on white, one compiled program a shape."""
    module = nnx.eval_shape(lambda: clip.VisionTransformer(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef = nnx.split(module)[0]
    params = jax.tree.map(jnp.asarray, params)

    @jax.jit
    def encode(params: Params, frames: Any) -> Float[Array, "b k d"]:
        images = image.to_network(frames.astype(jnp.float32) / 255.0)
        return nnx.merge(graphdef, params)(images).astype(jnp.float32)

    return lambda frames: encode(params, frames)


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
