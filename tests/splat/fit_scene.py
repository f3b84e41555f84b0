"""A known cloud of Gaussians, six views of it, and settings of a short fit."""

from dataclasses import replace

import fixtures
import jax
import jax.numpy as jnp
import numpy as np

from v3d_jax.ops import camera
from v3d_jax.splat import fit, rasterize, start
from v3d_jax.splat.densify import DensifyConfig
from v3d_jax.splat.objective import LossConfig

SIZE, VIEWS, COUNT, CHUNK = 48, 6, 200, 40
RASTER = rasterize.RasterConfig(width=SIZE, height=SIZE, slots=1 << 14)
CONFIG = fit.FitConfig(
    count=COUNT,
    steps=120,
    views=2,
    loss=LossConfig(dssim=0.2, lpips=0.0, opacity=0.01),
    rates=fit.RateConfig(means=1e-3, sh=1e-2, log_scales=1e-2),
    densify=DensifyConfig(every=20, start=20, stop=100),
)
GAIN = replace(
    CONFIG, view_gain=True, rates=replace(CONFIG.rates, log_gain=0.02), background="random"
)


def cameras():
    return camera.orbit(VIEWS, width=SIZE, height=SIZE, elevation=15.0)


def cloud(seed, color=None):
    rng = np.random.default_rng(seed)
    means = jnp.asarray(rng.normal(size=(COUNT, 3)) * 0.25, jnp.float32)
    colors = rng.uniform(size=(COUNT, 3)) if color is None else np.full((COUNT, 3), color)
    return start.from_points(means, jnp.asarray(colors, jnp.float32), opacity=0.8)


draw = fixtures.jit(rasterize.rasterize, static_argnums=2)


def render(gaussians, background=None):
    return draw(gaussians, cameras(), RASTER, background)


def run(config=CONFIG, raster=RASTER, *, targets, begun=None, seed=0, **more):
    begun = cloud(1, color=0.5) if begun is None else begun
    more.setdefault("chunk", CHUNK)
    return fit.run(config, raster, targets, begun, jax.random.key(seed), **more)
