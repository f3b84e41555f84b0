"""What a fit of a field minimises: distances of rays from frames, and what an SDF should be.

Colours are in [0, 1], sRGB. Axes: r ray, n point. Weights and definitions are the release's
(mesh_recon/systems/neus_videonvs.py) unless said otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from v3d_jax.sdf import field

# distance(params, a, b): one number an image, for images [i, h, w, 3] in [-1, 1].
Perceptual = Callable[[Any, Array, Array], Float[Array, "i"]]

_CLAMP = 1e-3  # opacities this near 0 and 1 are certain enough
_SHARP = 100.0  # of the sparsity's exponential
_FACING = -0.1  # cosine to a viewing ray from which an estimated normal counts


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss's terms; terms of weight 0 are not computed."""

    color: float = 0.5
    mask: float = 1.0
    eikonal: float = 0.2
    smooth: float = 1.0
    sparsity: float = 0.5
    normal: float = 0.0  # V3D: 0.1 where there are estimated normals
    lpips: float = 0.0  # of a patch a step, late in the fit
    points: int = 2048  # random ones in the box, for smoothness, sparsity and the eikonal term
    nudge: float = 1e-2  # standard deviation of their neighbours' offsets, half sides of the box
    patch: int = 64  # pixels a side
    patch_from: float = 0.75  # share of the steps without patches


def color(
    found: Float[Array, "r 3"], wanted: Float[Array, "r 3"], counts: Bool[Array, "r"]
) -> Float[Array, ""]:
    """Squared error, summed over channels, mean of the rays that count."""
    error = jnp.sum(jnp.square(found - wanted), axis=-1)
    return _mean(error, counts)


def mask(opacity: Float[Array, "r"], alpha: Float[Array, "r"]) -> Float[Array, ""]:
    """Binary cross-entropy between opacity and the frames' alpha."""
    opacity = jnp.clip(opacity, _CLAMP, 1.0 - _CLAMP)
    return -jnp.mean(alpha * jnp.log(opacity) + (1.0 - alpha) * jnp.log1p(-opacity))


def eikonal(gradient: Float[Array, "n 3"], counts: Bool[Array, "n"]) -> Float[Array, ""]:
    """How far the gradient's length is from 1, squared (arXiv 2002.10099 eq. 2)."""
    # sqrt has no derivative at 0, where a field may be.
    length = jnp.sqrt(jnp.sum(jnp.square(gradient), axis=-1) + 1e-12)
    return _mean(jnp.square(length - 1.0), counts)


def smoothness(gradient: Float[Array, "n 3"], nearby: Float[Array, "n 3"]) -> Float[Array, ""]:
    """Mean absolute difference between gradients at points and next to them."""
    return jnp.mean(jnp.abs(gradient - nearby))


def sparsity(sdf: Float[Array, "n"], radius: float) -> Float[Array, ""]:
    """exp(-100 distance), of random points: surfaces that no view asks for fade."""
    return jnp.mean(jnp.exp(-_SHARP / radius * jnp.abs(sdf)))


def normal(
    found: Float[Array, "r 3"],
    wanted: Float[Array, "r 3"],
    directions: Float[Array, "r 3"],
    counts: Bool[Array, "r"],
) -> Float[Array, ""]:
    """1 - cosine between rendered and estimated normals, straight views counting more.

    Estimated normals of length 0 and such as face away do not count. The weights, exp|cosine to
    the ray|, are normalised over all rays.
    """
    facing = jnp.sum(field.unit(wanted) * directions, axis=-1)
    weight = jnp.exp(jnp.abs(facing))
    weight = weight / weight.sum()
    apart = 1.0 - jnp.sum(field.unit(found) * field.unit(wanted), axis=-1)
    known = jnp.sum(jnp.square(wanted), axis=-1) > 0.25
    return jnp.sum(jnp.where(counts & known & (facing < _FACING), weight * apart, 0.0))


def _mean(values: Float[Array, "n"], counts: Bool[Array, "n"]) -> Float[Array, ""]:
    """Mean of the values that count; 0 without any."""
    return jnp.where(counts, values, 0.0).sum() / jnp.maximum(counts.sum(), 1)
