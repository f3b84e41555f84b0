"""Rasterizing by fused kernels and by the plain path, side by side."""

import functools
from dataclasses import replace

import fixtures
import gaussian_scenes as scenes
import jax
import jax.numpy as jnp
import numpy as np

from v3d_jax.splat import rasterize

IMAGE, GRADIENT = 1e-5, 1e-4
WIDTH, HEIGHT, COUNT = 29, 19, 60  # no multiples of a tile
CONFIG = rasterize.RasterConfig(width=WIDTH, height=HEIGHT, slots=1 << 11)
BACKGROUND = np.asarray([1.0, 0.5, 0.0], np.float32)


def evaluate(config):
    """Images and gradients as a function of Gaussians, background and cameras; traced anew."""

    def run(gaussians, background, camera):
        gradient = jax.grad(scenes.loss, argnums=(0, 1), has_aux=True)
        return gradient(gaussians, background, camera, scenes.fast(config))

    return fixtures.jit(run)


@functools.cache
def plain(config):
    return evaluate(replace(config, compositing="xla"))


def scene(kind, count=COUNT):
    return scenes.as_float(scenes.scene(kind, count), jnp.float32)


def check(run, gaussians, camera, config=CONFIG):
    """Images and gradients that `run` gives are the plain path's; returns its images."""
    arguments = (gaussians, jnp.asarray(BACKGROUND), camera)
    (gradient, of_background), images = run(*arguments)
    (true_gradient, true_of_background), true_images = plain(config)(*arguments)
    for image, true in zip(images, true_images, strict=True):
        np.testing.assert_allclose(image, true, atol=IMAGE * max(1.0, float(true.max())))
    scale = np.linalg.norm(true_gradient.log_scales)
    for name, found, true in zip(scenes.FIELDS, gradient, true_gradient, strict=True):
        assert np.isfinite(found).all(), name
        # a round Gaussian has no gradient of its rotation to compare with
        if name == "rotations" and np.linalg.norm(true) < 1e-4 * scale:
            assert np.linalg.norm(found - true) < 1e-4 * scale
        else:
            assert scenes.relative(found, true) <= GRADIENT, name
    np.testing.assert_allclose(of_background, true_of_background, rtol=GRADIENT, atol=1e-5)
    return images


def repeats(run, *arguments):
    """Two runs give the same bits."""
    first, second = (jax.tree.leaves(run(*arguments)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
