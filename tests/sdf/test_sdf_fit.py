from dataclasses import replace

import jax
import jax.numpy as jnp
import known_shapes
import numpy as np
import pytest

from v3d_jax import errors
from v3d_jax.sdf import field, fit, occupancy, volume
from v3d_jax.sdf.field import FieldConfig
from v3d_jax.sdf.hashgrid import GridConfig
from v3d_jax.sdf.losses import LossConfig
from v3d_jax.sdf.render import RenderConfig
from v3d_jax.sdf.start import StartConfig
from v3d_jax.sdf.targets import Targets

SIZE, CHUNK = 32, 30
CONFIG = fit.FitConfig(
    steps=90,
    rays=128,
    open_first=1,
    refresh_all=32,
    field=FieldConfig(grid=GridConfig(levels=2, base=8, growth=2.0), width=32, color_width=16),
    render=RenderConfig(samples=16, coarse=48, occupancy=16),
    loss=LossConfig(points=128),
    rates=fit.RateConfig(geometry=5e-3, sharpness=5e-3),
    start=StartConfig(steps=100, points=1024),
)
CENTRE = np.float32([0.15, 0.0, -0.1])
RADIUS = 0.4


def ball(points):
    return np.linalg.norm(points - CENTRE, axis=-1) - RADIUS


@pytest.fixture(scope="module")
def seen():
    views = known_shapes.see(ball, SIZE, count=6)
    return Targets(jnp.asarray(views.images), jnp.asarray(views.masks), views.cameras)


@pytest.fixture(scope="module")
def fitted(seen):
    told = []
    state = run(seen, progress=lambda *one: told.append(one))
    return state, told


def run(seen, config=CONFIG, seed=0, **more):
    more.setdefault("chunk", CHUNK)
    return fit.run(config, seen, jax.random.key(seed), **more)


def overlap(config, params, side=24):
    values = known_shapes.grid(lambda x: field.sdf(config.field, params, jnp.asarray(x)), side)
    found, wanted = values < 0, known_shapes.grid(ball, side) < 0
    return (found & wanted).sum() / (found | wanted).sum()


def test_fit_finds_the_ball(fitted):
    """From a sphere that is larger and elsewhere."""
    state, told = fitted
    begun = fit.begin_jit(CONFIG, jax.random.key(0))
    assert overlap(CONFIG, begun.parameters) < 0.6
    assert overlap(CONFIG, state.parameters) > 0.85
    assert [done for done, _ in told] == [30, 60, 90]
    assert told[0][1] > told[2][1] > 0
    assert int(state.step) == 90
    assert float(field.inv_s(state.parameters)) > float(field.inv_s(begun.parameters))
    fresh = occupancy.initial(CONFIG.field, state.parameters, 16)
    # No older than four updates; the settings here move fast.
    near = np.abs(fresh) < 0.1
    assert np.abs(fresh - state.occupancy)[near].max() < 0.1


def test_same_seed_same_bits_and_another_seed_others(seen, fitted):
    again = run(seen)
    jax.tree.map(np.testing.assert_array_equal, again, fitted[0])
    other = run(seen, seed=1)
    assert float(jnp.abs(other.parameters.table - again.parameters.table).max()) > 1e-3


@pytest.mark.slow
def test_chunks_change_nothing(seen, fitted):
    jax.tree.map(np.testing.assert_array_equal, run(seen, chunk=90), fitted[0])


def test_starts_as_a_solid_where_that_is_usable(key):
    steps = (np.arange(32) + 0.5) / 16 - 1.0
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1)
    cut = np.clip(-ball(grid), -0.1, 0.1)
    solid = volume.Volume(
        jnp.asarray(cut, jnp.float32), jnp.full(3, -1.0), jnp.asarray(1 / 16, jnp.float32)
    )
    begun = fit.begin_jit(CONFIG, key, solid)
    assert overlap(CONFIG, begun.parameters) > 0.93
    nothing = solid._replace(distance=jnp.full_like(solid.distance, -1.0))
    plain = fit.begin_jit(CONFIG, key)
    unusable = fit.begin_jit(CONFIG, key, nothing)
    np.testing.assert_allclose(unusable.occupancy, plain.occupancy, atol=1e-6)


def test_levels_all_open_inside_the_run():
    """The release's never do: four of ten at first, another every 1,000 of 3,000 steps."""
    for config in (fit.V3D, fit.PREVIEW, CONFIG):
        levels, last = config.field.grid.levels, round(config.open_by * config.steps)
        assert config.open_first < levels
        count = [int(fit.open_levels(config, jnp.asarray(s))) for s in range(0, config.steps)]
        assert count[0] == config.open_first
        assert set(np.diff(count)) == {0, 1}
        assert count[last] == levels > count[last - 2]


def test_rates_hold_and_fall_to_a_tenth(fitted):
    state, _ = fitted
    for step, part in ((0, 1.0), (499, 1.0), (1750, 0.1**0.5), (3000, 0.1)):
        rates = fit._rates(fit.V3D, state._replace(step=jnp.asarray(step)))
        assert float(rates.table) == pytest.approx(1e-3 * part, rel=1e-3)
        assert float(rates.color[2].bias) == pytest.approx(1e-2 * part, rel=1e-3)


def test_preset_has_the_weights_of_the_release():
    loss = fit.V3D.loss
    weights = (loss.color, loss.mask, loss.eikonal, loss.smooth, loss.sparsity, loss.normal)
    assert weights == (0.5, 1.0, 0.2, 1.0, 0.5, 0.0)
    assert (fit.V3D.steps, loss.points, loss.nudge) == (3000, 2048, 0.01)
    assert fit.V3D.rays * fit.V3D.render.samples == 262_144


@pytest.mark.slow
def test_normals_and_late_patches_join_in(seen):
    """And frames without masks, on white: in one program that differs in all of it."""
    loss = replace(CONFIG.loss, normal=0.1, lpips=1.0, patch=8, patch_from=0.5)
    config = replace(CONFIG, steps=20, loss=loss, background="white")
    normals = jnp.broadcast_to(jnp.asarray([0.0, 0.0, 1.0]), seen.images.shape)
    whole = seen._replace(normals=normals)

    def distance(scale, a, b):
        assert a.shape == b.shape == (1, 8, 8, 3)
        return scale * jnp.mean(jnp.abs(a - b), axis=(1, 2, 3)) + 100.0 * (scale > 0)

    told = []
    run(whole, config, perceptual=distance, params=jnp.ones(()), chunk=10,
        progress=lambda *one: told.append(one[1]))  # fmt: skip
    assert told[0] < 50.0 < told[1]
    run(seen._replace(alpha=None), replace(config, loss=CONFIG.loss), chunk=20)


def test_bad_frames_and_empty_fields_are_one_line(seen, monkeypatch):
    frames = seen.images.astype(jnp.float32) / 255.0
    begun = fit.begin_jit(CONFIG, jax.random.key(0))
    first, last = begun.parameters.geometry
    outside = (first, last._replace(bias=last.bias + 9.0))
    empty = begun._replace(parameters=begun.parameters._replace(geometry=outside))
    # What is nowhere near takes no samples, and no step of the fit brings it back.
    monkeypatch.setattr(fit, "begin_jit", lambda *_: empty)
    for bad, said in (
        (seen._replace(images=frames.at[0, 3, 3].set(jnp.nan)), "not numbers"),
        (seen._replace(alpha=jnp.zeros_like(seen.alpha)), "masks are empty"),
        (seen, "no surface"),
    ):
        with pytest.raises(errors.UserError, match=said) as caught:
            run(bad)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_stops_the_fit(seen):
    wild = replace(CONFIG, rates=replace(CONFIG.rates, geometry=1e38))
    with pytest.raises(errors.UserError, match="not a number after 30 steps"):
        run(seen, wild)
