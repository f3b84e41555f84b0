"""Targets that are not plain frames: features, alpha, frames whose colours disagree."""

from dataclasses import replace

import fit_scene
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.ops import camera, metrics
from v3d_jax.splat import fit, objective

CALLS = []


def _features(params, images):
    jax.debug.callback(lambda count: CALLS.append(int(count)), jnp.asarray(images.shape[0]))
    return (params * images, images[:, ::4, ::4])


def _distance(params, images, wanted):
    found = _features(params, images)
    pairs = zip(found, wanted, strict=True)
    return sum(jnp.mean(jnp.square(x - y), axis=(1, 2, 3)) for x, y in pairs)


PERCEPTUAL = objective.Perceptual(_features, _distance)


@pytest.fixture(scope="module")
def truth():
    return fit_scene.render(fit_scene.cloud(0))


@pytest.mark.slow
def test_features_of_targets_are_computed_once(truth):
    config = replace(
        fit_scene.CONFIG, steps=8, loss=replace(fit_scene.CONFIG.loss, lpips=1.0, l1=0.0)
    )
    targets = fit.Targets(truth.color, truth.alpha, fit_scene.cameras())
    CALLS.clear()
    more = {"perceptual": PERCEPTUAL, "params": jnp.asarray(1.0)}
    fit_scene.run(config, targets=targets, chunk=4, **more)
    jax.effects_barrier()
    assert CALLS.count(1) == fit_scene.VIEWS
    assert CALLS.count(config.views) == config.steps
    assert len(CALLS) == fit_scene.VIEWS + config.steps


@pytest.mark.slow
def test_perceptual_term_is_the_distance_of_scaled_images(truth):
    targets = fit.Targets(truth.color, truth.alpha, fit_scene.cameras())
    loss = objective.LossConfig(l1=0.0, dssim=0.0, lpips=3.0, opacity=0.0)
    config = replace(fit_scene.CONFIG, loss=loss, views=fit_scene.VIEWS, steps=1)
    alpha = truth.alpha[..., None]
    white = truth.color * alpha + (1.0 - alpha)  # colours are taken for straight
    begun = fit_scene.render(fit_scene.cloud(1, color=0.5), jnp.ones(3)).color
    for unit, scale in ((True, 1.0), (False, 4.0)):  # [-1, 1] is twice as wide
        told = []
        fit_scene.run(
            replace(config, loss=replace(loss, unit_lpips=unit)),
            replace(fit_scene.RASTER, slots=1 << 15),
            targets=targets,
            perceptual=PERCEPTUAL,
            params=jnp.asarray(1.0),
            progress=lambda _, value: told.append(value),  # noqa: B023
        )
        squared = jnp.square(begun - white)
        expected = 3.0 * scale * (squared.mean() + squared[:, ::4, ::4].mean())
        assert told[0] == pytest.approx(float(expected), rel=1e-4)


def test_random_backgrounds_and_fixed_features_exclude_each_other(truth):
    config = replace(fit_scene.GAIN, loss=replace(fit_scene.CONFIG.loss, lpips=1.0))
    targets = fit.Targets(truth.color, truth.alpha, fit_scene.cameras())
    with pytest.raises(ValueError, match="random backgrounds"):
        fit.with_features(config, targets, PERCEPTUAL, jnp.asarray(1.0))


@pytest.mark.slow
def test_gain_recovers_what_each_view_was_multiplied_by():
    """Views near each other, which see the same Gaussians: no colour can stand for a gain."""
    wide = camera.orbit(60, width=fit_scene.SIZE, height=fit_scene.SIZE, elevation=15.0)
    near = camera.Camera(*(part[: fit_scene.VIEWS] for part in wide))
    truth = fit_scene.draw(fit_scene.cloud(0), near, fit_scene.RASTER, None)
    factors = np.exp(np.random.default_rng(5).normal(size=(fit_scene.VIEWS, 3)) * 0.12)
    factors /= np.exp(np.log(factors).mean(axis=0))
    straight = np.asarray(truth.color) / np.maximum(np.asarray(truth.alpha)[..., None], 1e-6)
    images = jnp.asarray(straight * factors[:, None, None] * 0.7, jnp.float32)
    targets = fit.Targets(images, truth.alpha, near)
    begun = fit_scene.cloud(0, color=0.5)
    state, _ = fit_scene.run(replace(fit_scene.GAIN, steps=120), targets=targets, begun=begun)
    error = np.abs(np.log(fit.gains(state.parameters.log_gain)) - np.log(factors)).mean()
    assert error < 0.2 * np.abs(np.log(factors)).mean()
    gains = np.asarray(fit.gains(state.parameters.log_gain))
    np.testing.assert_allclose(np.exp(np.log(gains).mean(axis=0)), 1.0, rtol=1e-5)


def test_padded_ssim_is_that_of_the_release():
    """A window at every pixel, zeros beyond the border, against a direct convolution."""
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(size=(1, 16, 18, 3)) for _ in range(2))
    taps = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(taps, taps) / taps.sum() ** 2

    def blur(image):
        padded = np.pad(image, ((0, 0), (5, 5), (5, 5), (0, 0)))
        views = np.lib.stride_tricks.sliding_window_view(padded, (11, 11), axis=(1, 2))
        return (views * window).sum(axis=(-1, -2))

    means = blur(a), blur(b)
    variances = blur(a * a) - means[0] ** 2, blur(b * b) - means[1] ** 2
    covariance = blur(a * b) - means[0] * means[1]
    value = (2 * means[0] * means[1] + 1e-4) * (2 * covariance + 9e-4)
    value /= (means[0] ** 2 + means[1] ** 2 + 1e-4) * (sum(variances) + 9e-4)
    config = objective.LossConfig(l1=0.0, dssim=1.0, padded_ssim=True)
    found = objective.image_loss(config, jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    assert float(found) == pytest.approx(1.0 - value.mean(), abs=1e-5)
    inner = metrics.ssim(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    assert abs(float(1.0 - inner[0]) - float(found)) > 1e-3
