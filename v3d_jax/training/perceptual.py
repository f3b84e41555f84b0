"""LPIPS of denoised frames: an optional term beside the EDM loss of the video model.

Where there is much noise the squared error is least for the mean of all orbits that fit the input
view, a blur. LPIPS is not: with it, what is denoised looks like one of them, so fewer steps and
less guidance are needed. Source: arXiv 2401.00110, with LPIPS for the features of the model itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from v3d_jax import errors
from v3d_jax.nn import lpips
from v3d_jax.ops import image
from v3d_jax.training.conditioning import Finish
from v3d_jax.weights import lpips as lpips_weights

Networks = tuple[lpips.LPIPSParams, ...]


@dataclass(frozen=True)
class PerceptualConfig:
    """`weight` of the term, 0 to leave it out; what it compares.

    Of every clip, `frames` random frames are decoded, each alone, and compared at a `shrink`-th of
    their width and height with the `target`: the clean latents decoded, or the data's own pictures,
    which the autoencoder has not smoothed. Frame 0, the input view, is left out where both sides
    come from the same decoder. With several `nets` their distances are added, and with `absolute`
    so many times the mean absolute difference of pixels in [-1, 1].
    """

    weight: float = 0.0
    target: Literal["decoded", "pictures"] = "decoded"
    frames: int = 2
    shrink: int = 2
    nets: tuple[Literal["vgg", "alex"], ...] = ("vgg",)
    absolute: float = 0.0

    @property
    def pictures(self) -> int:
        """How many pictures of every clip the term needs."""
        return self.frames if self.weight > 0.0 and self.target == "pictures" else 0


def load(config: PerceptualConfig, frame_size: tuple[int, int]) -> Networks | None:
    """The networks that the settings name, None if they ask for none.

    Raises `UserError` where frames of this height and width cannot be shrunk as asked, and where
    the weights are not installed: a loss without its term would train another model.
    """
    if config.weight <= 0.0:
        return None
    if config.shrink < 1 or any(side % config.shrink for side in frame_size):
        raise errors.UserError(f"--perceptual.shrink {config.shrink}: must divide {frame_size}")
    if not config.nets:
        raise errors.UserError("--perceptual.nets: name vgg, alex or both")
    try:
        return tuple(lpips_weights.load(net) for net in config.nets)
    except lpips_weights.LPIPSUnavailable as error:
        raise errors.UserError(f"{error}, or leave out --perceptual.weight") from None


class Pictures(NamedTuple):
    """Frames of every clip as the data have them, and which of the clip's they are."""

    frames: UInt8[Array, "b k H W 3"]
    places: Int[Array, "b k"]


class Distances(NamedTuple):
    """Means over the compared frames."""

    lpips: Float[Array, ""]  # the sum of all networks'
    absolute: Float[Array, ""]


def distances(
    networks: Networks,
    decode: Callable[[Array], Array],
    denoised: Float[Array, "b t h w c"],
    clean: Float[Array, "b t h w c"],
    key: Key[Array, ""],
    config: PerceptualConfig,
    dtype: Any = jnp.float32,
    *,
    decode_clean: Callable[[Array], Array] | None = None,
    pictures: Pictures | None = None,
    finish: Finish | None = None,
) -> Distances:
    """Between decoded frames, or these and `pictures`; `decode` takes clips of unscaled latents.

    `finish` is applied to denoised frames once they are decoded. Each clip has its own frames.
    Frame 0, the input view, is one of them only with `pictures` or with `decode_clean`, the decoder
    that is the measure where `decode` learns: frames that are clear must stay so. LPIPS runs in
    `dtype`.
    """
    if pictures is None:
        clips, views = denoised.shape[:2]
        first = 1 if decode_clean is None else 0
        compared = jnp.tile(jnp.arange(first, views), (clips, 1))
        places = jax.random.permutation(key, compared, axis=1, independent=True)
        places = places[:, : config.frames]
    else:
        places = pictures.places

    def chosen(
        latents: Float[Array, "b t h w c"], decode: Callable[[Array], Array]
    ) -> Float[Array, "n H W 3"]:
        picked = jax.vmap(lambda clip, index: clip[index])(latents, places)
        one_frame_clips = picked.reshape(-1, 1, *latents.shape[2:])
        return decode(one_frame_clips)[:, 0]

    images = chosen(denoised, decode)
    if finish is not None:
        clips = images.reshape(*places.shape, *images.shape[1:])
        images = finish(clips, places).reshape(images.shape)
    images = _shrink(images, config.shrink)
    if pictures is None:
        target = chosen(clean, decode_clean or decode)
    else:
        target = image.to_network(pictures.frames.astype(jnp.float32) / 255.0)
        target = target.reshape(-1, *target.shape[2:])
    target = jax.lax.stop_gradient(_shrink(target, config.shrink))
    found = (jnp.mean(lpips.distance(net, images, target, dtype=dtype)) for net in networks)
    return Distances(sum(found), jnp.mean(jnp.abs(images - target)))


def _shrink(images: Float[Array, "n h w 3"], factor: int) -> Float[Array, "n _ _ 3"]:
    """Means over squares of `factor` x `factor` pixels."""
    n, h, w, c = images.shape
    squares = images.reshape(n, h // factor, factor, w // factor, factor, c)
    return jnp.mean(squares.astype(jnp.float32), axis=(2, 4))
