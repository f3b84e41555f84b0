"""The TPU kernels of compositing against the plain path, interpreted by Pallas on a CPU."""

import functools
from dataclasses import replace
from unittest import mock

import fixtures
import gaussian_scenes as scenes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.ops import target
from v3d_jax.splat import bin, rasterize
from v3d_jax.splat.kernels import mosaic, tpu

IMAGE, GRADIENT = 1e-5, 1e-4
WIDTH, HEIGHT, COUNT = 29, 19, 60  # no multiples of a tile
CONFIG = rasterize.RasterConfig(width=WIDTH, height=HEIGHT, slots=1 << 11)
BACKGROUND = np.asarray([1.0, 0.5, 0.0], np.float32)


@functools.cache
def compiled(config):
    """Images and gradients as a function of Gaussians, background and cameras."""

    def run(gaussians, background, camera):
        gradient = jax.grad(scenes.loss, argnums=(0, 1), has_aux=True)
        return gradient(gaussians, background, camera, scenes.fast(config))

    return fixtures.jit(run)


def fused(config):
    return compiled(replace(config, compositing="pallas"))


def check(gaussians, camera, config=CONFIG, draw=None, atol=IMAGE):
    """Images and gradients of both paths agree; returns the kernels' images."""
    arguments = (gaussians, jnp.asarray(BACKGROUND), camera)
    (gradient, of_background), images = (draw or fused(config))(*arguments)
    (true_gradient, true_of_background), true_images = compiled(config)(*arguments)
    for image, true in zip(images, true_images, strict=True):
        np.testing.assert_allclose(image, true, atol=atol * max(1.0, float(true.max())))
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


def scene(kind, count=COUNT):
    return scenes.as_float(scenes.scene(kind, count), jnp.float32)


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_equal_the_plain_path(kind):
    images = check(scene(kind), scenes.views(2, WIDTH, HEIGHT))
    assert float(images[1].max()) > (0.02 if kind == "faint" else 0.3)


def test_one_view_of_one_gaussian_that_covers_all_of_it():
    one = scene("mixed", 1)
    wide = one._replace(means=0 * one.means, log_scales=0 * one.log_scales + 1.0)
    camera = scenes.views(1, WIDTH, HEIGHT)
    images = check(wide, camera)
    assert float(images[1].min()) > 0.1
    # alpha at its cap has no gradient
    check(wide._replace(opacity_logits=0 * one.opacity_logits + 8.0), camera)


def test_views_of_different_intrinsics():
    camera = scenes.views(2, WIDTH, HEIGHT)
    other = np.array(camera.intrinsics)
    other[1] = [[55.0, 0.0, 9.0], [0.0, 31.0, 14.0], [0.0, 0.0, 1.0]]
    images = check(scene("mixed"), camera._replace(intrinsics=jnp.asarray(other)))
    assert np.abs(np.asarray(images[0][0] - images[0][1])).max() > 0.1


def test_nothing_in_view_leaves_the_background():
    far = scene("mixed")
    far = far._replace(means=far.means + jnp.asarray([[0.0, 0.0, 1e3]]))
    arguments = (far, jnp.asarray(BACKGROUND), scenes.views(2, WIDTH, HEIGHT))
    (gradient, _), images = fused(CONFIG)(*arguments)
    np.testing.assert_array_equal(images[0], np.broadcast_to(BACKGROUND, images[0].shape))
    assert not np.asarray(images[1]).any()
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(gradient))


def test_gaussians_at_and_behind_the_camera_stay_finite():
    gaussians, camera = scene("mixed"), scenes.views(2, WIDTH, HEIGHT)
    to_camera = np.asarray(camera.world_to_camera)
    eye = -np.einsum("vji,vj->vi", to_camera[:, :3, :3], to_camera[:, :3, 3])
    means = gaussians.means.at[:2].set(eye).at[2].set(eye[0] * (1 - 1e-2)).at[3].set(2 * eye[0])
    arguments = (gaussians._replace(means=means), jnp.asarray(BACKGROUND), camera)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(fused(CONFIG)(*arguments)))


def test_gradients_stay_finite_when_gaussians_are_missing():
    small = replace(CONFIG, slots=150)
    camera = scenes.views(2, WIDTH, HEIGHT)
    check(scene("mixed"), camera, small)
    drawn = fixtures.jit(rasterize.rasterize, static_argnums=2)(scene("mixed"), camera, small)
    assert bool(drawn.overflow(small))


def test_gradients_repeat_bit_for_bit():
    arguments = (scene("opaque"), jnp.asarray(BACKGROUND), scenes.views(2, WIDTH, HEIGHT))
    run = fused(CONFIG)
    for a, b in zip(
        jax.tree.leaves(run(*arguments)), jax.tree.leaves(run(*arguments)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_tiles_and_blocks_that_two_launches_share():
    """Lists of several blocks, four pieces a launch: state is given on, finished tiles skipped."""
    with mock.patch.object(tpu, "SEGMENT", 4), mock.patch.object(tpu, "WINDOW", 1024):
        draw = compiled.__wrapped__(replace(CONFIG, compositing="pallas", slots=1 << 13))
        camera = scenes.views(1, WIDTH, HEIGHT)
        check(scene("opaque", 400), camera, replace(CONFIG, slots=1 << 13), draw)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixed", "opaque", "needle"])
def test_equal_the_plain_path_on_larger_images(kind):
    # A needle's exponent is a small difference of large numbers: rounding alone moves both paths.
    atol = 1e-4 if kind == "needle" else IMAGE
    check(scene(kind, scenes.COUNT), scenes.views(), scenes.CONFIG, atol=atol)


def test_every_slot_is_in_one_piece_of_its_tile():
    rng = np.random.default_rng(0)
    counts = rng.choice([0, 1, 3, 127, 128, 129, 500], 40)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    slots = int(offsets[-1]) + 77
    zero = jnp.zeros(slots, jnp.int32)
    bins = bin.Bins(zero, zero, zero, zero, zero, jnp.asarray(offsets), jnp.int32(slots))
    pieces = tpu.cut(bins)
    total, tile = int(pieces.total), np.full(slots, -1)
    ends, fresh = 0, []
    for block, owner, word in zip(*(np.asarray(part[:total]) for part in pieces[:3]), strict=True):
        low, high = word & 255, word >> mosaic.HIGH & 255
        assert 0 <= low < high <= mosaic.K
        at = block * mosaic.K + np.arange(low, high)
        assert (tile[at] == -1).all()
        assert bool(word >> mosaic.BEGINS & 1) == (at[0] == offsets[owner])
        assert bool(word >> mosaic.ENDS & 1) == (at[-1] == offsets[owner + 1] - 1)
        tile[at] = owner
        ends += word >> mosaic.ENDS & 1
        fresh += [block] if word >> mosaic.FRESH & 1 else []
    np.testing.assert_array_equal(tile[: offsets[-1]], np.repeat(np.arange(40), counts))
    assert (tile[offsets[-1] :] == -1).all()
    assert ends == (counts > 0).sum()
    np.testing.assert_array_equal(fresh, np.unique(np.arange(offsets[-1]) // mosaic.K))


def test_take_gathers_columns():
    rng = np.random.default_rng(0)
    array = rng.normal(size=(mosaic.ROWS, 3000)).astype(np.float32)
    index = rng.integers(0, 3000, 2500).astype(np.int32)
    with mock.patch.object(tpu, "WINDOW", 1024):
        found = jax.jit(tpu.take)(array, index)
    np.testing.assert_array_equal(found[:, :2500], array[:, index])


def test_running_sums_start_anew_at_every_head():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(mosaic.ROWS, 2048)).astype(np.float32)
    head = np.zeros(2048, np.float32)
    head[np.cumsum(rng.choice([1, 2, 100, 300], 40)) % 2048] = 1
    true, total = np.zeros(values.shape), np.zeros(mosaic.ROWS)
    for i in range(2048):
        total = np.where(head[i], 0, total) + values[:, i]
        true[:, i] = total
    found = jax.jit(tpu._run_sums)(head, values)
    np.testing.assert_allclose(found, true, rtol=1e-5, atol=1e-5)


def test_what_the_kernels_do_not_take():
    tiles = bin.tiling(1, 8, 8)
    one = jnp.zeros(1, jnp.int32)
    bins = bin.Bins(one, one, one, one, one, jnp.zeros(2, jnp.int32), jnp.int32(0))
    with pytest.raises(ValueError, match="6 channels, not 7"):
        tpu.composite(tiles, (jnp.zeros(1),) * 13, bins)
    with target.traced_for("gpu"), pytest.raises(ValueError, match="for TPUs, not for gpu"):
        tpu.composite(tiles, (jnp.zeros(1),) * 10, bins)


def test_auto_does_not_choose_them():
    for platform in ("cpu", "tpu"):
        with target.traced_for(platform):
            assert rasterize.compositing(replace(CONFIG, compositing="auto")) == "xla"
            assert rasterize.compositing(replace(CONFIG, compositing="pallas")) == "pallas"
