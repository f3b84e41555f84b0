"""What a fit minimises: distances between renders and targets, and regularisers.

Images are in [0, 1], sRGB. Axes: i view of a step, h w image, n Gaussian.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from v3d_jax.ops import metrics
from v3d_jax.splat.gaussians import Gaussians

Features = Any  # a tree of arrays with the view as first axis


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss's terms.

    The defaults are V3D's with the L1 term that its flags remove (release: recon/train_from_vid.py
    with --lambda_dssim 1 --lambda_lpips 2): 1 - lambda_dssim = 0 there, 0.8 as in 3DGS here.
    """

    l1: float = 0.8
    dssim: float = 1.0  # of 1 - SSIM
    lpips: float = 2.0
    opacity: float = 0.1  # of the mean opacity
    scale: float = 0.0  # of the mean deviation, in the scene's extent
    settled: float = 0.0  # share of these two once faint Gaussians are no longer moved
    padded_ssim: bool = False  # windows reach beyond the border, onto black, as in the release
    unit_lpips: bool = False  # images go to LPIPS in [0, 1] instead of [-1, 1], as in the release


@dataclass(frozen=True)
class Perceptual:
    """A perceptual distance as functions of its parameters, such as those of `nn.lpips`.

    `features(params, images)` are of images [i, h, w, 3] in [-1, 1]; `distance(params, images,
    features)` is one number a view, from images to those of which the features are.
    """

    features: Callable[[Any, Float[Array, "i h w 3"]], Features]
    distance: Callable[[Any, Float[Array, "i h w 3"], Features], Float[Array, "i"]]
    prepare: Callable[[Any], Any] = lambda params: params  # once, before many steps


def perceptual_input(config: LossConfig, images: Float[Array, "i h w 3"]) -> Array:
    """Images as the perceptual network takes them."""
    return images if config.unit_lpips else 2.0 * images - 1.0


def target_features(
    config: LossConfig, perceptual: Perceptual, params: Any, images: Float[Array, "v h w 3"]
) -> Features:
    """Features of all targets, which do not change during a fit; one view at a time."""

    def one(image: Array) -> Features:
        tree = perceptual.features(params, perceptual_input(config, image[None]))
        return jax.tree.map(lambda leaf: leaf[0], tree)

    return lax.map(one, images)


def image_loss(
    config: LossConfig, render: Float[Array, "i h w 3"], target: Float[Array, "i h w 3"]
) -> Float[Array, ""]:
    """L1 and 1 - SSIM, weighted; terms of weight 0 are not computed."""
    total = jnp.zeros(())
    if config.l1:
        total = total + config.l1 * jnp.mean(jnp.abs(render - target))
    if config.dssim:
        if config.padded_ssim:
            reach = metrics.WINDOW // 2
            border = ((0, 0), (reach, reach), (reach, reach), (0, 0))
            render, target = jnp.pad(render, border), jnp.pad(target, border)
        total = total + config.dssim * (1.0 - jnp.mean(metrics.ssim(render, target)))
    return total


def regularization(
    config: LossConfig,
    gaussians: Gaussians,
    extent: Float[Array, ""] | Float[Array, "n"],
    moving: Bool[Array, ""],
) -> Float[Array, ""]:
    """Mean opacity and mean deviation, weighted (3DGS-MCMC section 3.4; V3D has the first).

    Deviations are in units of `extent`, of the scene or at every Gaussian.
    They free Gaussians to be moved; once that is over (not `moving`) they only pull at the image.
    """
    total = config.opacity * jnp.mean(gaussians.opacities) if config.opacity else jnp.zeros(())
    if config.scale and extent.ndim:
        total = total + config.scale * jnp.mean(gaussians.scales / extent[:, None])
    elif config.scale:
        total = total + config.scale * jnp.mean(gaussians.scales) / extent
    return total * jnp.where(moving, 1.0, config.settled)
