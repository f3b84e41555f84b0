"""The fused kernels of every back end against the plain path.

Triton's run on a GPU where there is one (`V3D_TEST_PLATFORM=cuda pytest -m "gpu or not gpu"`),
and are interpreted elsewhere, which needs the package `triton` (Linux; it comes with torch and with
the extra `cuda`); Pallas' are interpreted on a CPU. Both are slow: images are small.
"""

from dataclasses import replace

import fixtures
import gaussian_scenes as scenes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fused_splats import (
    BACKGROUND,
    CONFIG,
    GRADIENT,
    HEIGHT,
    WIDTH,
    check,
    evaluate,
    repeats,
    scene,
)

from v3d_jax.splat import rasterize


@pytest.fixture
def config(kernels):
    return replace(CONFIG, compositing=kernels)


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_equal_the_plain_path(kind, config):
    images = check(evaluate(config), scene(kind), scenes.views(2, WIDTH, HEIGHT), config)
    assert float(images[1].max()) > (0.02 if kind == "faint" else 0.3)


def test_one_view_of_one_gaussian_that_covers_all_of_it(config):
    one = scene("mixed", 1)
    wide = one._replace(means=0 * one.means, log_scales=0 * one.log_scales + 1.0)
    run, camera = evaluate(config), scenes.views(1, WIDTH, HEIGHT)
    images = check(run, wide, camera, config)
    assert float(images[1].min()) > 0.1
    # alpha at its cap has no gradient
    check(run, wide._replace(opacity_logits=0 * one.opacity_logits + 8.0), camera, config)


def test_views_of_different_intrinsics(config):
    camera = scenes.views(2, WIDTH, HEIGHT)
    other = np.array(camera.intrinsics)
    other[1] = [[55.0, 0.0, 9.0], [0.0, 31.0, 14.0], [0.0, 0.0, 1.0]]
    camera = camera._replace(intrinsics=jnp.asarray(other))
    images = check(evaluate(config), scene("mixed"), camera, config)
    assert np.abs(np.asarray(images[0][0] - images[0][1])).max() > 0.1


def test_nothing_in_view_leaves_the_background(config):
    far = scene("mixed")
    far = far._replace(means=far.means + jnp.asarray([[0.0, 0.0, 1e3]]))
    arguments = (far, jnp.asarray(BACKGROUND), scenes.views(2, WIDTH, HEIGHT))
    (gradient, _), images = evaluate(config)(*arguments)
    np.testing.assert_array_equal(images[0], np.broadcast_to(BACKGROUND, images[0].shape))
    assert not np.asarray(images[1]).any()
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(gradient))


def test_gaussians_at_and_behind_the_camera_stay_finite(config):
    gaussians, camera = scene("mixed"), scenes.views(2, WIDTH, HEIGHT)
    to_camera = np.asarray(camera.world_to_camera)
    eye = -np.einsum("vji,vj->vi", to_camera[:, :3, :3], to_camera[:, :3, 3])
    means = gaussians.means.at[:2].set(eye).at[2].set(eye[0] * (1 - 1e-2)).at[3].set(2 * eye[0])
    arguments = (gaussians._replace(means=means), jnp.asarray(BACKGROUND), camera)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(evaluate(config)(*arguments)))


def test_gradients_stay_finite_when_gaussians_are_missing(config):
    small = replace(config, slots=150)
    camera = scenes.views(2, WIDTH, HEIGHT)
    check(evaluate(small), scene("mixed"), camera, small)
    drawn = fixtures.jit(rasterize.rasterize, static_argnums=2)(scene("mixed"), camera, small)
    assert bool(drawn.overflow(small))


def test_gradients_repeat_bit_for_bit(config):
    arguments = (scene("opaque"), jnp.asarray(BACKGROUND), scenes.views(2, WIDTH, HEIGHT))
    repeats(evaluate(config), *arguments)


def test_under_vmap_scenes_come_as_one_by_one(config):
    camera = scenes.views(1, WIDTH, HEIGHT)
    clouds = [scene("mixed"), scene("opaque")]
    both = jax.tree.map(lambda *x: jnp.stack(x), *clouds)

    def shown(gaussians):
        return rasterize.rasterize(gaussians, camera, config).color

    def slope(gaussians):
        return jax.grad(lambda g: jnp.sum(jnp.square(shown(g))))(gaussians)

    for function in (shown, slope):
        alone = [fixtures.jit(function)(cloud) for cloud in clouds]
        wanted = jax.tree.map(lambda *x: jnp.stack(x), *alone)
        found = fixtures.jit(jax.vmap(function))(both)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert scenes.relative(x, y) <= GRADIENT
