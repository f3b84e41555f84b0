from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.ops import camera
from v3d_jax.ops.rays import Rays
from v3d_jax.sdf import field, occupancy, render
from v3d_jax.sdf.field import FieldConfig
from v3d_jax.sdf.hashgrid import GridConfig
from v3d_jax.sdf.render import RenderConfig

GRID = GridConfig(levels=1, base=4)
PLANE = FieldConfig(grid=GRID, width=1, outputs=2, color_width=4)
SETTINGS = RenderConfig(samples=32, coarse=64, occupancy=32)
RAYS = 64
draw = jax.jit(render.render, static_argnums=(0, 1))
march = jax.jit(render.march, static_argnums=(0, 1))
filled = jax.jit(occupancy.initial, static_argnums=(0, 2))
refresh = jax.jit(occupancy.refresh, static_argnums=0)
pixel_rays = jax.jit(render.pixel_rays)
opacity = jax.jit(render.opacity)


def plane(normal, height, inv_s):
    """The field n . x - height: the only unit is far in softplus's linear part."""
    params = field.initial(PLANE, jax.random.key(0))
    kernel = jnp.zeros((5, 1)).at[:3, 0].set(jnp.asarray(normal, jnp.float32))
    first = field.Layer(kernel, jnp.full(1, 5.0), jnp.linalg.norm(kernel, axis=0))
    last = field.Layer(jnp.ones((1, 2)), jnp.full(2, -5.0 - height), jnp.ones(2))
    return params._replace(geometry=(first, last), sharpness=jnp.log(inv_s) / 10.0)


def rays_onto(normal, seed=0):
    """Rays from outside the box to points near its centre, at most 60 degrees off the normal."""
    rng = np.random.default_rng(seed)
    normal = np.asarray(normal) / np.linalg.norm(normal)
    away = rng.normal(size=(8 * RAYS, 3))
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    away = away[away @ normal > 0.5][:RAYS]
    through = rng.uniform(-0.2, 0.2, size=(RAYS, 3))
    origins = through + 3.0 * away
    return Rays(jnp.asarray(origins, jnp.float32), jnp.asarray(-away, jnp.float32))


@pytest.mark.parametrize("inv_s", [50.0, 200.0, 1000.0])
def test_depth_of_a_plane_is_right_within_half_a_step(inv_s):
    normal, height = np.float32([0.6, 0.0, 0.8]), 0.1
    params, rays = plane(normal, height, inv_s), rays_onto(normal)
    cells = filled(PLANE, params, SETTINGS.occupancy)
    truth = (height - rays.origins @ normal) / (rays.directions @ normal)
    for offset in (0.0, 0.5, 0.97):
        found = draw(PLANE, SETTINGS, params, cells, rays, jnp.full(RAYS, offset))
        width = np.asarray(found.samples.width)
        assert found.samples.valid.all()
        depth = np.asarray(found.depth / found.opacity)
        # What is seen is smeared over 1 / inv_s; its mean is not.
        assert (np.abs(depth - truth) <= 0.5 * width + 2e-3).all()
        assert float(found.opacity.max()) <= 1.0 + 1e-6
        assert float(found.opacity.min()) > 0.99
        facing = np.asarray(field.unit(found.normal)) @ normal
        assert facing.min() > 0.999


def test_steps_shorten_with_the_band():
    normal = np.float32([0.0, 0.0, 1.0])
    rays = rays_onto(normal)
    widths = []
    for inv_s in (5.0, 50.0, 500.0):
        params = plane(normal, 0.0, inv_s)
        cells = filled(PLANE, params, SETTINGS.occupancy)
        samples = march(PLANE, SETTINGS, cells, jnp.asarray(inv_s), rays, jnp.full(RAYS, 0.5))
        heights = rays.origins[:, None] + samples.distance[..., None] * rays.directions[:, None]
        assert np.abs(heights[..., 2]).max() < 7.0 / inv_s + 0.13
        assert (np.diff(samples.distance, axis=1) > 0).all()
        widths.append(float(samples.width.mean()))
    assert widths[0] > 3 * widths[1] > 6 * widths[2]


def test_samples_divide_what_is_occupied():
    """Two slabs of cells: steps in a slab are the width, the one over the gap is longer."""
    side = 16
    cells = jnp.ones((side, side, side)).at[:, :, 3:5].set(0.0).at[:, :, 10:13].set(0.0)
    rays = Rays(jnp.asarray([[0.1, 0.1, -2.0]]), jnp.asarray([[0.0, 0.0, 1.0]]))
    settings = RenderConfig(samples=40, coarse=256)
    samples = march(PLANE, settings, cells, jnp.asarray(1e3), rays, jnp.full(1, 0.25))
    z = np.asarray(samples.distance[0]) - 2.0
    layer = np.floor((z + 1.0) * side / 2.0)
    assert set(layer) == {3, 4, 10, 11, 12}
    assert (np.bincount(layer.astype(int))[[3, 4, 10, 11, 12]] == 8).all()
    steps = np.diff(z)
    inside = np.ones(39, bool)
    inside[15] = False
    np.testing.assert_allclose(steps[inside], float(samples.width[0]), rtol=1e-4)
    assert steps[15] > 5 * 2.0 / side


def test_rays_that_meet_nothing_are_black_and_finite():
    params = plane(np.float32([0.0, 0.0, 1.0]), 0.0, 100.0)
    empty = jnp.full((32, 32, 32), 9.0)
    full = filled(PLANE, params, 32)
    inside = rays_onto(np.float32([0.0, 0.0, 1.0]))
    beside = inside._replace(origins=inside.origins + jnp.asarray([[50.0, 0.0, 0.0]]))
    behind = inside._replace(directions=-inside.directions)

    def loss(params, cells, rays):
        found = render.render(PLANE, SETTINGS, params, cells, rays, jnp.zeros(RAYS))
        return found.color.sum() + found.opacity.sum() + found.depth.sum(), found

    differentiate = jax.jit(jax.value_and_grad(loss, has_aux=True))
    for cells, rays in ((empty, inside), (full, beside), (full, behind)):
        (_, found), gradient = differentiate(params, cells, rays)
        assert not found.samples.valid.any()
        assert not np.asarray(found.opacity).any()
        assert not np.asarray(found.color).any()
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_compositing_is_that_of_a_loop_in_float64():
    rng = np.random.default_rng(0)
    alpha = rng.uniform(size=(50, 40)) ** 3
    alpha[:10] = rng.uniform(size=(10, 40)) * 1e-3
    alpha[10, 5], alpha[11, :] = 1.0, 0.0
    alpha = alpha.astype(np.float32)
    wanted = np.zeros((50, 40))
    for ray in range(50):
        passed = 1.0
        for step in range(40):
            wanted[ray, step] = alpha[ray, step] * passed
            passed *= 1.0 - np.float64(alpha[ray, step])
    found = np.asarray(jax.jit(render.composite)(jnp.asarray(alpha)))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.abs(wanted.sum(axis=1) - 1).min() < 1e-3
    assert found.sum(axis=1).max() <= 1.0 + 1e-6


def test_opacity_is_that_of_the_paper():
    """NeuS eq. 13, from distances that a sample's ends would have along a straight surface."""
    sdf = np.linspace(-0.2, 0.2, 9)[None].astype(np.float32)
    slope = np.full((1, 9), -0.7, np.float32)
    found = opacity(jnp.asarray(sdf), jnp.asarray(slope), jnp.full(1, 0.1), jnp.asarray(30.0), 1.0)
    ends = [1.0 / (1.0 + np.exp(-30.0 * (sdf + sign * 0.035))) for sign in (1, -1)]
    np.testing.assert_allclose(found, (ends[0] - ends[1]) / ends[0], atol=2e-4)
    away = opacity(jnp.asarray(sdf), jnp.asarray(-slope), jnp.full(1, 0.1), jnp.asarray(30.0), 1.0)
    # Behind, where the quotient's 1e-5 is all there is, nothing is left to hide.
    assert np.abs(np.asarray(away)[sdf > -0.15]).max() < 1e-2
    early = opacity(jnp.asarray(sdf), jnp.asarray(-slope), jnp.full(1, 0.1), jnp.asarray(30.0), 0.0)
    assert (np.asarray(early)[sdf < 0.1] > np.asarray(away)[sdf < 0.1]).all()


def test_rays_meet_the_points_that_cameras_project():
    cameras = camera.orbit(5, width=40, height=30, elevation=20.0)
    rng = np.random.default_rng(0)
    points = jnp.asarray(rng.uniform(-0.5, 0.5, size=(20, 3)), jnp.float32)
    pixels, _ = camera.project(cameras, points)
    view = jnp.repeat(jnp.arange(5, dtype=jnp.int32), 20)
    rays = pixel_rays(cameras, view, pixels.reshape(-1, 2))
    np.testing.assert_allclose(np.linalg.norm(rays.directions, axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(rays.origins, camera.position(cameras)[view], atol=1e-5)
    offset = jnp.tile(points, (5, 1)) - rays.origins
    miss = np.linalg.norm(np.cross(offset, rays.directions), axis=1)
    assert miss.max() < 1e-5
    assert float((offset * rays.directions).sum(axis=1).min()) > 1.0


def test_occupancy_is_refreshed_a_part_at_a_time():
    config = replace(PLANE, radius=2.0)
    params = plane(np.float32([0.0, 1.0, 0.0]), 0.2, 50.0)
    whole = filled(config, params, 8)
    heights = (np.arange(8) + 0.5) / 4.0 - 1.0
    wanted = np.broadcast_to((heights - 0.2)[None, :, None], (8, 8, 8))
    np.testing.assert_allclose(whole, wanted, atol=1e-5)
    part = refresh(config, params, jnp.zeros((8, 8, 8)), jnp.asarray(6), 1)
    assert set(np.flatnonzero(np.asarray(part)) % 4) == {2}
    two = refresh(config, params, part, jnp.asarray(7), 2)
    assert set(np.flatnonzero(np.asarray(two)) % 4) == {0, 2, 3}
    assert bool(occupancy.crosses(whole))
    assert not bool(occupancy.crosses(jnp.abs(whole)))
    assert not bool(occupancy.crosses(jnp.full((4, 4, 4), jnp.nan)))
