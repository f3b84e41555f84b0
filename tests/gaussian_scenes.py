"""Scenes that are hard in different ways, and what tests render and differentiate of them."""

import jax
import jax.numpy as jnp
import numpy as np

from v3d_jax.ops import camera as cameras
from v3d_jax.splat import dense, rasterize
from v3d_jax.splat.gaussians import SH_C0, Gaussians

WIDTH, HEIGHT, COUNT, VIEWS = 96, 80, 400, 2
CONFIG = rasterize.RasterConfig(width=WIDTH, height=HEIGHT, slots=1 << 16)
KINDS = ("mixed", "needle", "opaque", "tiny", "faint")
FIELDS = Gaussians._fields


def scene(kind, count=COUNT, seed=0, degree=3):
    """Gaussians in float64 as numpy arrays."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(count, 3)) * 0.3
    rotations = rng.normal(size=(count, 4))
    if kind == "mixed":
        scales = np.exp(rng.uniform(np.log(0.004), np.log(0.12), (count, 3)))
        opacities = 1 / (1 + np.exp(-2 * rng.normal(size=count)))
    elif kind == "needle":  # 300 times as long as wide
        scales = np.tile([0.6, 2e-3, 2e-3], (count, 1))
        opacities = rng.uniform(0.3, 0.99, count)
    elif kind == "opaque":  # heavy overlap: pixels finish early
        scales = np.exp(rng.uniform(np.log(0.05), np.log(0.3), (count, 3)))
        opacities = rng.uniform(0.9, 0.999, count)
    elif kind == "tiny":  # far smaller than a pixel: the blur decides
        scales = np.full((count, 3), 5e-4)
        opacities = rng.uniform(0.05, 0.9, count)
    else:  # around the cut at 1/255
        scales = np.exp(rng.uniform(np.log(0.01), np.log(0.1), (count, 3)))
        opacities = rng.uniform(0.002, 0.02, count)
    sh = 0.2 * rng.normal(size=(count, (degree + 1) ** 2, 3))
    sh[:, 0] = (rng.uniform(size=(count, 3)) - 0.5) / SH_C0
    logits = np.log(opacities / (1 - opacities))
    return Gaussians(means, rotations, np.log(scales), logits, sh)


def as_float(gaussians, dtype):
    return Gaussians(*(jnp.asarray(field, dtype) for field in gaussians))


def views(count=VIEWS, width=WIDTH, height=HEIGHT):
    return cameras.orbit(count, width=width, height=height, start_azimuth=6.0, elevation=4.0)


def loss(gaussians, background, camera, draw):
    """A loss of colour, alpha and accumulated depth; and the three."""
    rng = np.random.default_rng(1)
    color, alpha, depth = draw(gaussians, camera, background)
    dtype = color.dtype
    wanted = jnp.asarray(rng.uniform(size=color.shape), dtype)
    cover = jnp.asarray(rng.uniform(size=alpha.shape), dtype)
    total = jnp.sum((color - wanted) ** 2) + jnp.sum((alpha - cover) ** 2)
    return total + jnp.sum((alpha * depth - cover) ** 2), (color, alpha, alpha * depth)


def fast(config):
    return lambda *arguments: rasterize.rasterize(*arguments[:2], config, arguments[2])[:3]


def slow(*arguments):
    return dense.rasterize(*arguments, width=WIDTH, height=HEIGHT)


def evaluate(draw):
    """Compiles (gaussians, background, camera) -> images, gradients."""

    def run(gaussians, background, camera):
        gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
        found, images = gradient(gaussians, background, camera, draw)
        return images, found

    return jax.jit(run)


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
