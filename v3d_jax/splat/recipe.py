"""Frames on white to Gaussians as one pure function: start on the visual hull, then fit.

Axes: t frame, h w image, s step.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int, Key

from v3d_jax.ops import camera
from v3d_jax.splat import cloud, fit, objective, rasterize, silhouette, start
from v3d_jax.splat.carve import CarveConfig
from v3d_jax.splat.densify import DensifyConfig
from v3d_jax.splat.fit import FitConfig
from v3d_jax.splat.gaussians import Gaussians
from v3d_jax.splat.objective import LossConfig

# Of scenes: 3DGS-MCMC's loss with moves that end early, as benchmarks/lego.py has it. What
# stays at a few percent of opacity is moved as well: of lego in a room, two fifths were below 0.1.
SCENE = FitConfig(
    count=200_000,
    steps=7_000,
    degree=3,
    scale=0.5,  # points on pixels are uneven: gaps between neighbours are larger than what is there
    background="black",
    contract=True,
    loss=LossConfig(dssim=0.2, lpips=0.0, opacity=0.01, scale=0.01),
    densify=DensifyConfig(start=500, stop=4_200, min_opacity=0.05, split=1.0, pull=0.5),
)
SCENE_MINI = replace(
    SCENE,
    count=8_000,
    steps=600,
    degree=0,
    rates=fit.MINI.rates,
    densify=replace(SCENE.densify, every=50, start=100, stop=450),
)


@dataclass(frozen=True)
class SplatConfig:
    """How frames become Gaussians."""

    fit: FitConfig = field(default_factory=FitConfig)
    carve: CarveConfig = field(default_factory=CarveConfig)
    slots: int = 1 << 20  # the rasterizer's capacity for the views of one step


class Splats(NamedTuple):
    """Frames, the Gaussians fitted to them, and what says whether to trust them."""

    frames: Float[Array, "t h w 3"]
    gaussians: Gaussians
    cloud: cloud.Cloud  # where the fit started
    losses: Float[Array, "s"]  # of every step
    slots: Int[Array, ""]  # capacity that a step needed: with more than was set, fit again


def from_frames(
    config: SplatConfig,
    frames: Float[Array, "t h w 3"],
    cameras: camera.Camera,
    key: Key[Array, ""],
    perceptual: objective.Perceptual | None = None,
    perceptual_params: Any = None,
) -> Splats:
    """Masks from white, visual hull, fit; without `perceptual` its term is left out."""
    start_key, fit_key = jax.random.split(key)
    count, height, width = frames.shape[:3]
    begun, gaussians = begin(config, frames, silhouette.from_white(frames), cameras, start_key)
    targets = fit.with_features(
        config.fit, fit.Targets(frames, None, cameras), perceptual, perceptual_params
    )
    state, losses = fit.advance(
        config.fit,
        rasterize.RasterConfig(width=width, height=height, slots=config.slots),
        perceptual,
        perceptual_params,
        targets,
        fit.begin(gaussians, count),
        fit_key,
        config.fit.steps,
    )
    return Splats(frames, state.parameters.gaussians, begun, losses, state.slots)


def begin(
    config: SplatConfig,
    frames: silhouette.Images,
    masks: silhouette.Alpha | None,
    cameras: camera.Camera,
    key: Key[Array, ""],
) -> tuple[cloud.Cloud, Gaussians]:
    """Points on the frames' visual hull, and the Gaussians that a fit starts from on them."""
    told = config.fit
    begun = cloud.initial(key, frames, masks, cameras, told.count, config.carve)
    gaussians = start.from_points(
        begun.positions, begun.colors, degree=told.degree, opacity=told.opacity, scale=told.scale
    )
    return begun, gaussians
