from dataclasses import replace

import fit_scene
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax import errors
from v3d_jax.ops import camera, metrics
from v3d_jax.splat import fit, rasterize

WHITE = jnp.ones(3)


@pytest.fixture(scope="module")
def targets():
    return fit.Targets(fit_scene.render(fit_scene.cloud(0), WHITE).color, None, fit_scene.cameras())


@pytest.fixture(scope="module")
def fitted(targets):
    told = []
    state, raster = fit_scene.run(targets=targets, progress=lambda *seen: told.append(seen))
    return state, raster, told


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_fit_finds_the_cloud_it_was_rendered_from(targets, fitted):
    """Far beyond the start, white, and the best single colour of every view."""
    state, raster, told = fitted
    truth = targets.images
    mean = jnp.broadcast_to(truth.mean(axis=(1, 2), keepdims=True), truth.shape)
    begun = fit_scene.render(fit_scene.cloud(1, color=0.5), WHITE).color
    unfitted = [metrics.psnr(x, truth) for x in (mean, jnp.ones_like(truth), begun)]
    found = metrics.psnr(fit_scene.render(state.parameters.gaussians, WHITE).color, truth)
    assert float((found - jnp.stack(unfitted).max(axis=0)).min()) > 6.0
    assert float(found.min()) > 25.0
    assert int(state.step) == 120
    assert [done for done, _ in told] == [40, 80, 120]
    assert told[0][1] > told[1][1] > told[2][1] > 0
    assert raster == fit_scene.RASTER
    assert 0 < int(state.slots) <= raster.slots


def test_views_between_those_it_saw(fitted):
    state = fitted[0]
    between = camera.orbit(
        6, width=fit_scene.SIZE, height=fit_scene.SIZE, elevation=15.0, start_azimuth=30.0
    )
    truth, found, begun = (
        fit_scene.draw(gaussians, between, fit_scene.RASTER, WHITE).color
        for gaussians in (
            fit_scene.cloud(0),
            state.parameters.gaussians,
            fit_scene.cloud(1, color=0.5),
        )
    )
    gained = metrics.psnr(found, truth) - metrics.psnr(begun, truth)
    assert float(gained.min()) > 1.5


def test_same_seed_same_bits_and_another_seed_others(targets, fitted):
    """Of a chunk as `fitted` had it, so that nothing is compiled for it."""

    def run(seed):
        begun = fit.begin(fit_scene.cloud(1, color=0.5), fit_scene.VIEWS)
        given = (None, None, targets, begun, jax.random.key(seed), fit_scene.CHUNK)
        return fit.advance_jit(fit_scene.CONFIG, fit_scene.RASTER, *given)

    (one, losses), (again, same), (other, _) = run(0), run(0), run(1)
    equal((again, same), (one, losses))
    assert float(losses[-1]) == fitted[2][0][1]
    difference = other.parameters.gaussians.means - one.parameters.gaussians.means
    assert float(jnp.abs(difference).max()) > 1e-3


@pytest.mark.slow
def test_chunks_change_nothing(targets, fitted):
    """One of 120 steps instead of three of 40."""
    whole, _ = fit_scene.run(targets=targets, chunk=120)
    equal(whole, fitted[0])


@pytest.mark.slow
def test_a_chunk_that_overflows_is_run_again_and_nothing_is_lost(targets, fitted):
    short = replace(fit_scene.RASTER, slots=1 << 11)
    assert int(fitted[0].slots) > short.slots
    told = []
    state, raster = fit_scene.run(
        raster=short, targets=targets, progress=lambda done, _: told.append(done)
    )
    equal(state, fitted[0])
    assert int(state.slots) <= raster.slots < fit_scene.RASTER.slots
    assert told == [40, 80, 120]


def test_nan_frames_stop_the_fit(targets):
    broken = targets._replace(images=targets.images.at[3, 0, 0, 0].set(jnp.nan))
    with pytest.raises(errors.UserError, match="not a number after 40 steps"):
        fit_scene.run(targets=broken)


def test_views_come_equally_often(key):
    draw = jax.jit(fit.draw_views, static_argnums=(2, 3))
    for total, count in ((6, 2), (7, 3), (3, 5)):
        drawn = [draw(key, jnp.asarray(step), total, count) for step in range(2 * total)]
        assert (np.bincount(np.concatenate(drawn), minlength=total) == 2 * count).all()
        deck = np.concatenate(drawn)[:total]
        assert sorted(deck) == list(range(total))
    decks = [tuple(np.asarray(draw(key, jnp.asarray(i), 6, 6))) for i in range(4)]
    assert len(set(decks)) > 1


def test_extent_is_that_of_the_release(key):
    assert float(fit.extent(camera.orbit(width=8, height=8))) == pytest.approx(2.2, rel=1e-5)


@pytest.mark.slow
def test_needed_slots_are_those_of_the_worst_view(targets):
    each = []
    for view in range(fit_scene.VIEWS):
        lens = camera.Camera(*(part[view : view + 1] for part in targets.cameras))
        each.append(int(fit_scene.draw(fit_scene.cloud(0), lens, fit_scene.RASTER).slots))
    found = fit.rasterize.needed_slots(fit_scene.cloud(0), targets.cameras, fit_scene.RASTER)
    assert int(found) == max(each) > min(each)


def test_harmonics_join_in_degree_by_degree():
    config = replace(fit_scene.CONFIG, degree=2, degree_every=10)
    begun = fit_scene.cloud(0)
    rng = np.random.default_rng(0)
    sh = jnp.asarray(rng.normal(size=(fit_scene.COUNT, 9, 3)), jnp.float32)
    for step, joined in ((0, 1), (9, 1), (10, 4), (20, 9), (99, 9)):
        masked = fit._with_degree(config, begun._replace(sh=sh), jnp.asarray(step)).sh
        np.testing.assert_array_equal(masked[:, :joined], sh[:, :joined])
        assert not np.asarray(masked[:, joined:]).any()


def test_means_slow_down_and_rates_follow_the_batch():
    state = fit.begin(fit_scene.cloud(0), fit_scene.VIEWS)
    size = jnp.asarray(2.0)

    def rate(step, views):
        config = replace(fit_scene.CONFIG, steps=101, views=views)
        rates = fit._rates(config, state._replace(step=jnp.asarray(step)), size)
        return float(rates.gaussians.means), float(rates.gaussians.rotations)

    assert rate(0, 1) == pytest.approx((2e-3, 1e-3))
    assert rate(50, 1) == pytest.approx((2e-4, 1e-3), rel=1e-4)
    assert rate(100, 4) == pytest.approx((4e-5, 2e-3), rel=1e-4)


@pytest.mark.slow
def test_regularisers_end_with_the_moves_that_they_serve(targets, key, monkeypatch):
    """From step 100 on nothing is moved; the release has its own throughout."""

    def blank(gaussians, cameras, config):
        shape = (len(cameras.intrinsics), fit_scene.SIZE, fit_scene.SIZE)
        grey = jnp.full((*shape, 3), 0.5) + 0.0 * gaussians.means.sum()
        return rasterize.Render(grey, jnp.ones(shape), jnp.ones(shape), jnp.int32(1))

    # What they add does not depend on the picture, and half a minute of compilation is saved.
    monkeypatch.setattr(rasterize, "rasterize", blank)
    advance = jax.jit(fit.advance, static_argnums=(0, 1, 2, 7))

    def losses(settled):
        weights = replace(fit_scene.CONFIG.loss, opacity=0.25, settled=settled)
        config = replace(fit_scene.CONFIG, loss=weights)
        begun = fit.begin(fit_scene.cloud(0), fit_scene.VIEWS)
        states = [begun._replace(step=jnp.asarray(step)) for step in (99, 100)]
        return [
            float(advance(config, fit_scene.RASTER, None, None, targets, state, key, 1)[1][0])
            for state in states
        ]

    ended, kept = losses(0.0), losses(1.0)
    assert ended[0] == kept[0]
    share = 0.25 * float(fit_scene.cloud(0).opacities.mean())
    assert kept[1] - ended[1] == pytest.approx(share, rel=1e-5)
    assert fit.FAITHFUL.loss.settled == 1.0


def test_faithful_preset_has_the_weights_of_the_release():
    """V3D's README: --lambda_dssim 1.0 --lambda_lpips 2.0, and 0.1 mean opacity in the script."""
    loss = fit.FAITHFUL.loss
    assert (loss.l1, loss.dssim, loss.lpips, loss.opacity, loss.scale) == (0.0, 1.0, 2.0, 0.1, 0.0)
    assert (fit.FAITHFUL.steps, fit.FAITHFUL.count, fit.FAITHFUL.degree) == (4000, 100_000, 0)
    # Its means' rate falls to 1 % over 30,000 steps.
    assert fit.FAITHFUL.rates.means_left == pytest.approx(0.01 ** (4000 / 30000), abs=1e-3)
