"""The surface's stage: an object of any size and place, seen from the side of its users."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax import errors, splatting, surfacing
from v3d_jax.ops import camera
from v3d_jax.sdf import field, fit
from v3d_jax.sdf.field import FieldConfig
from v3d_jax.sdf.hashgrid import GridConfig
from v3d_jax.sdf.losses import LossConfig
from v3d_jax.sdf.render import RenderConfig
from v3d_jax.sdf.start import StartConfig

SIZE, SCALE = 128, 5.0
CENTRE = np.float32([3.0, -2.0, 1.0])
RADIUS = 0.5 * SCALE
CONFIG = fit.FitConfig(
    steps=40,
    rays=128,
    open_first=1,
    field=FieldConfig(grid=GridConfig(levels=2, base=8, growth=2.0), width=32, color_width=16),
    render=RenderConfig(samples=16, coarse=48, occupancy=64),
    loss=LossConfig(points=128),
    start=StartConfig(steps=100, points=1024),
)


def cameras():
    lenses = camera.orbit(6, width=SIZE, height=SIZE, elevation=20.0, radius=2.0 * SCALE)
    move = jnp.einsum("vij,j->vi", lenses.world_to_camera[:, :3, :3], jnp.asarray(CENTRE))
    pose = lenses.world_to_camera.at[:, :3, 3].add(-move)
    return lenses._replace(world_to_camera=pose)


def frames():
    """A grey-blue ball on white."""
    lenses = cameras()
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    rays = np.stack([x - SIZE / 2, y - SIZE / 2, np.full_like(x, lenses.intrinsics[0, 0, 0])], -1)
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    # From every camera the ball is straight ahead.
    off_axis = 2.0 * SCALE * np.sqrt(1.0 - rays[..., 2] ** 2)
    image = np.where(off_axis[..., None] < RADIUS, [90, 120, 200], 255).astype(np.uint8)
    return splatting.Frames(np.tile(image[None], (6, 1, 1, 1)), None, lenses)


def test_cameras_see_the_same_in_the_boxs_units():
    place = surfacing.Place(jnp.asarray(CENTRE), jnp.asarray(SCALE))
    points = np.random.default_rng(0).uniform(-1, 1, size=(9, 3)).astype(np.float32)
    there, depth = camera.project(cameras(), jnp.asarray(points * SCALE + CENTRE))
    here, scaled = camera.project(surfacing._into(place, cameras()), jnp.asarray(points))
    np.testing.assert_allclose(here, there, atol=1e-3)
    np.testing.assert_allclose(scaled, depth / SCALE, rtol=1e-4)
    np.testing.assert_allclose(place.corner, CENTRE - SCALE)
    assert float(place.side) == 2.0 * SCALE


def test_settings_of_the_command_line():
    assert surfacing.configure(surfacing.SurfaceArgs()) == fit.PREVIEW
    args = surfacing.SurfaceArgs(surface="v3d", surface_steps=7)
    assert surfacing.configure(args) == replace(fit.V3D, steps=7)
    with pytest.raises(errors.UserError, match="--surface-steps 0"):
        surfacing.check(surfacing.SurfaceArgs(surface_steps=0))


@pytest.mark.slow
def test_a_ball_of_any_size_and_place(monkeypatch, capsys):
    monkeypatch.setitem(surfacing._PRESETS, "preview", CONFIG)
    seconds = {}
    found = surfacing.reconstruct(
        surfacing.SurfaceArgs(surface="preview"), frames(), jax.random.key(0), seconds
    )
    assert set(seconds) == set(surfacing.STAGES)
    assert found.report["carved"]
    assert found.report["fit"]["background"] == "white"
    assert np.abs(np.asarray(found.place.centre) - CENTRE).max() < 0.2 * RADIUS
    assert RADIUS < found.report["half_side"] < 1.6 * RADIUS

    evaluate = jax.jit(lambda function, points: function(points))
    ways = np.random.default_rng(0).normal(size=(200, 3))
    ways /= np.linalg.norm(ways, axis=1, keepdims=True)
    on = jnp.asarray(CENTRE + RADIUS * ways, jnp.float32)
    assert np.abs(evaluate(found.sdf, on)).mean() < 0.1 * RADIUS
    inner = jnp.asarray(CENTRE + 0.5 * RADIUS * ways, jnp.float32)
    assert np.abs(evaluate(found.sdf, inner) + 0.5 * RADIUS).mean() < 0.15 * RADIUS
    programs = evaluate._cache_size()
    other = found._replace(params=field.initial(found.config, jax.random.key(5)))
    evaluate(other.sdf, on)
    assert evaluate._cache_size() == programs
    assert capsys.readouterr().err.count("note:") == 0
