"""The tiled rasterizer against its dense twin in float64; repeatability, capacity, edge cases."""

import functools
from dataclasses import replace

import fixtures
import gaussian_scenes as scenes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.splat import bin, rasterize

BACKGROUND = np.asarray([1.0, 0.5, 0.0])
IMAGE_MAX, IMAGE_RMS, GRADIENT = 2e-5, 5e-7, 2e-5
# Needles: float32 conics of 300:1 ellipses; gsplat's float32 code is as far off.
LOOSER = {"needle": (3e-3, 1e-5, 5e-4)}


@functools.cache
def compiled(config=scenes.CONFIG):
    return scenes.evaluate(scenes.fast(config))


@functools.cache
def reference(kind):
    """Images and gradients of the dense twin in float64, as numpy arrays."""
    with jax.enable_x64(True):
        camera = jax.tree.map(
            lambda x: x.astype(np.float64) if x.dtype == np.float32 else x,
            jax.tree.map(np.asarray, scenes.views()),
        )
        gaussians = scenes.as_float(scenes.scene(kind), jnp.float64)
        camera = jax.tree.map(jnp.asarray, camera)
        result = scenes.evaluate(scenes.slow)(gaussians, jnp.asarray(BACKGROUND), camera)
        return jax.tree.map(np.asarray, result)


def run(kind, config=scenes.CONFIG):
    gaussians = scenes.as_float(scenes.scene(kind), jnp.float32)
    return compiled(config)(gaussians, jnp.asarray(BACKGROUND, jnp.float32), scenes.views())


def check(kind, result):
    (images, (gradient, of_background)) = result
    true_images, (true_gradient, true_of_background) = reference(kind)
    assert true_images[1].max() > (0.05 if kind == "faint" else 0.8)
    largest, rms, bound = LOOSER.get(kind, (IMAGE_MAX, IMAGE_RMS, GRADIENT))
    for image, true in zip(images, true_images, strict=True):
        error = np.asarray(image, np.float64) - true
        assert np.abs(error).max() <= largest * max(1.0, true.max())
        assert np.sqrt(np.mean(error**2)) <= rms * max(1.0, true.max())
    scale_norm = np.linalg.norm(true_gradient.log_scales)
    for name, found, true in zip(scenes.FIELDS, gradient, true_gradient, strict=True):
        assert np.isfinite(found).all(), name
        # a round Gaussian has no gradient of its rotation to compare with
        if name == "rotations" and np.linalg.norm(true) < 1e-6 * scale_norm:
            assert np.linalg.norm(found) < 1e-5 * scale_norm
            continue
        assert scenes.relative(found, true) <= bound, name
    assert scenes.relative(of_background, true_of_background) <= bound


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_equals_float64_dense(kind):
    check(kind, run(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", scenes.KINDS)
def test_fused_kernels_equal_float64_dense(kind, kernels, request):
    if (kind, kernels) == ("needle", "triton"):
        # Interpreted, they round one more pixel to the other side of the cut at 1 / 255 than the
        # plain path does: 1.07e-5 of the bound of 1e-5 for the root mean square.
        interpreted = jax.default_backend() != "gpu"
        request.applymarker(pytest.mark.xfail(strict=interpreted, reason="a pixel at the cut"))
    check(kind, run(kind, replace(scenes.CONFIG, compositing=kernels)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixed", "opaque"])
def test_unrolled_chains_equal_float64_dense(kind):
    check(kind, run(kind, replace(scenes.CONFIG, unroll=True)))


def test_a_block_is_a_sixth_of_the_capacity_within_bounds():
    """Chunks there can be: slots / 16 and one a tile."""
    sizes = ((48, 1 << 14, 1), (256, 1 << 17, 1), (800, 1_441_792, 1), (512, 6_600_000, 18))
    found = []
    for side, slots, views in sizes:
        config = rasterize.RasterConfig(width=side, height=side, slots=slots)
        found.append(rasterize._block(config, bin.tiling(views, side, side)))
    assert found == [1024, 2048, 16384, 65536]
    small = rasterize.RasterConfig(width=16, height=16, slots=64)
    assert rasterize._block(small, bin.tiling(1, 16, 16)) == 4 + 4


@pytest.mark.slow
def test_blocks_of_chunks_do_not_matter():
    whole = run("mixed")
    cut = run("mixed", replace(scenes.CONFIG, block=96))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * np.abs(a).max())


def test_gradients_repeat_bit_for_bit():
    for a, b in zip(jax.tree.leaves(run("opaque")), jax.tree.leaves(run("opaque")), strict=True):
        np.testing.assert_array_equal(a, b)


def test_too_small_a_capacity_is_flagged_and_grown():
    gaussians = scenes.as_float(scenes.scene("mixed"), jnp.float32)
    background = jnp.asarray(BACKGROUND, jnp.float32)
    (color, *_), _ = run("mixed")
    small = replace(scenes.CONFIG, slots=2400)
    short = fixtures.jit(rasterize.rasterize, static_argnums=2)(
        gaussians, scenes.views(), small, background
    )
    needed = int(short.slots)
    assert bool(short.overflow(small))
    assert 0.5 * needed < small.slots < 0.7 * needed
    assert all(np.isfinite(x).all() for x in short)
    assert np.abs(np.asarray(short.color - color)).max() > 0.1
    grown, config = rasterize.rasterize_growing(gaussians, scenes.views(), small, background)
    assert needed <= config.slots <= 1.3 * needed
    assert not bool(grown.overflow(config))
    assert int(grown.slots) == needed
    np.testing.assert_allclose(grown.color, color, atol=1e-6)
    _, kept = rasterize.rasterize_growing(gaussians, scenes.views(), config, background)
    assert kept == config


@pytest.mark.slow
def test_gradients_stay_finite_when_gaussians_are_missing():
    images, gradient = run("mixed", replace(scenes.CONFIG, slots=2400))
    assert np.abs(np.asarray(images[0]) - run("mixed")[0][0]).max() > 0.1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((images, gradient)))


def test_nothing_in_view_leaves_the_background():
    gaussians = scenes.as_float(scenes.scene("mixed"), jnp.float32)
    behind = gaussians._replace(means=gaussians.means + jnp.asarray([[0.0, 0.0, 1e3]]))
    images, gradient = compiled()(behind, jnp.asarray(BACKGROUND, jnp.float32), scenes.views())
    np.testing.assert_array_equal(images[0], np.broadcast_to(BACKGROUND, images[0].shape))
    assert not np.asarray(images[1]).any()
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(gradient[0]))


def test_gaussians_at_and_behind_the_camera_stay_finite():
    gaussians = scenes.as_float(scenes.scene("mixed"), jnp.float32)
    camera = scenes.views()
    eye = -np.einsum(
        "vji,vj->vi", camera.world_to_camera[:, :3, :3], camera.world_to_camera[:, :3, 3]
    )
    means = gaussians.means.at[:2].set(eye).at[2].set(eye[0] * (1 - 1e-2)).at[3].set(2 * eye[0])
    images, gradient = compiled()(
        gaussians._replace(means=means), jnp.asarray(BACKGROUND, jnp.float32), camera
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((images, gradient)))


def test_views_are_independent():
    gaussians = scenes.as_float(scenes.scene("mixed"), jnp.float32)
    camera = scenes.views()
    background = jnp.asarray(BACKGROUND, jnp.float32)
    first, _ = compiled()(gaussians, background, camera)
    swapped, _ = compiled()(gaussians, background, jax.tree.map(lambda x: x[::-1], camera))
    for a, b in zip(first, swapped, strict=True):
        assert np.abs(a[0] - a[1]).max() > 0.1
        np.testing.assert_allclose(a, b[::-1], atol=1e-6)
