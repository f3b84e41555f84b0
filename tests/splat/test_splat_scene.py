from dataclasses import replace

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import room_views

from v3d_jax.data import walls
from v3d_jax.ops import camera, metrics
from v3d_jax.splat import densify, fit, path, rasterize, recipe, scene, start, sweep

COUNT, STEPS = 500, 80
RASTER = rasterize.RasterConfig(
    width=room_views.WIDTH, height=room_views.HEIGHT, slots=1 << 15, unroll=False
)
DRAW = fixtures.jit(rasterize.rasterize, static_argnums=2)
SWEEP = fixtures.jit(sweep.points, static_argnums=(3, 4))
ADVANCE = fixtures.jit(fit.advance, static_argnums=(0, 1, 2, 7))
BLACK = jnp.zeros(3)


def inside(chosen):
    """Cameras of some of the room's pictures in the frame of those that are fitted."""
    lenses = room_views.shots().cameras
    place = scene.frame(room_views.part(lenses, ~room_views.HELD))
    return place, scene.cameras_inside(place, room_views.part(lenses, chosen))


@pytest.fixture(scope="module")
def swept():
    images = jnp.asarray(room_views.shots().images[~room_views.HELD])
    return SWEEP(jax.random.key(0), images, inside(~room_views.HELD)[1], COUNT, sweep.SweepConfig())


def psnr(gaussians, lenses, truth):
    """Means over views, of renders on black."""
    drawn = DRAW(gaussians, lenses, RASTER, BLACK)
    assert not bool(drawn.overflow(RASTER))
    return float(metrics.psnr(jnp.clip(drawn.color, 0.0, 1.0), jnp.asarray(truth)).mean())


def test_frame_changes_numbers_and_no_picture():
    lenses = room_views.shots().cameras
    place = scene.frame(lenses)
    rng = np.random.default_rng(0)
    points = jnp.asarray(np.asarray([3.0, 0.0, 0.0]) + rng.normal(size=(20, 3)), jnp.float32)
    moved = scene.cameras_inside(place, lenses)
    seen, depth = camera.project(lenses, points)
    again, near = camera.project(moved, scene.points_inside(place, points))
    np.testing.assert_allclose(again, seen, atol=2e-3)
    np.testing.assert_allclose(near * place.size, depth, atol=1e-5)
    assert float(fit.extent(moved)) == pytest.approx(1.0, abs=1e-5)
    begun = start.from_points(scene.points_inside(place, points), jnp.full((20, 3), 0.5))
    back = scene.gaussians_outside(place, begun)
    np.testing.assert_allclose(back.means, points, atol=1e-5)
    np.testing.assert_allclose(back.scales, place.size * begun.scales, rtol=1e-5)


def test_unit_undoes_the_contraction_across_the_ray():
    """Within the factor of 2 - 1 / r that the contraction has far away."""

    def contracted(x):
        length = jnp.linalg.norm(x)
        return jnp.where(length <= 1.0, x, (2.0 - 1.0 / length) * x / length)

    for distance in (0.3, 1.0, 2.0, 10.0, 100.0):
        point = jnp.asarray([distance, 0.0, 0.0])
        shrunk = jax.jvp(contracted, (point,), (jnp.asarray([0.0, 1.0, 0.0]),))[1][1]
        expected = 1.0 if distance <= 1.0 else 2.0 - 1.0 / distance
        found = float(shrunk * scene.unit(point[None])[0])
        assert found == pytest.approx(expected, rel=1e-4)


def test_swept_points_lie_on_the_walls_and_on_the_shell(swept):
    place, _ = inside(~room_views.HELD)
    shell = sweep.SweepConfig().on_shell(COUNT)
    assert shell == COUNT // 20
    world = place.origin[None] + place.size * swept.positions
    of_wall = np.abs(np.asarray(world) / walls.room(0).half).max(axis=1)[:-shell]
    found = np.mean(np.abs(of_wall - 1.0) < 0.15)
    # Blindly in disparity: the same rays with nothing to compare.
    images = jnp.full((12, room_views.HEIGHT, room_views.WIDTH, 3), 0.5)
    lenses = inside(~room_views.HELD)[1]
    blind = SWEEP(jax.random.key(0), images, lenses, COUNT, sweep.SweepConfig()).positions
    world = place.origin[None] + place.size * blind
    of_wall = np.abs(np.asarray(world) / walls.room(0).half).max(axis=1)[:-shell]
    assert found > 0.6
    assert np.mean(np.abs(of_wall - 1.0) < 0.15) < 0.3
    length = np.linalg.norm(swept.positions, axis=1)
    np.testing.assert_allclose(length[-shell:], sweep.SweepConfig().far, atol=1.0)
    assert bool(swept.shared[:-shell].mean() > 0.95)
    assert not bool(swept.shared[-shell:].any())


def test_shell_shows_what_is_far_away():
    """Alone, and unfitted, better than one colour a view of walls sixty extents away."""
    room = walls.room(1)
    far = room._replace(
        half=60.0 * room.half, waves=room.waves / np.asarray([60.0] * 2 + [1.0] * 4)
    )
    far = far._replace(pictures=room.pictures * np.asarray([60.0] * 4 + [1.0] * 3))
    _, lenses = inside(~room_views.HELD)
    images = walls.draw(far, lenses, (room_views.HEIGHT, room_views.WIDTH), supersample=2)
    config = sweep.SweepConfig(shell=1.0)
    found = SWEEP(jax.random.key(0), jnp.asarray(images), lenses, COUNT, config)
    gaussians = start.from_points(found.positions, found.colors, opacity=0.9)
    truth = images[:4]
    some = room_views.part(lenses, np.arange(4))
    mean = np.broadcast_to(truth.mean(axis=(1, 2), keepdims=True), truth.shape)
    plain = float(metrics.psnr(jnp.asarray(mean), jnp.asarray(truth)).mean())
    assert psnr(gaussians, some, truth) > plain + 2.0
    drawn = DRAW(gaussians, some, RASTER, BLACK)
    assert float((drawn.alpha > 0.5).mean()) > 0.98


def test_fit_of_a_room_shows_it_from_unseen_places(swept):
    """Far beyond the nearest picture, one colour, and the start."""
    images, lenses = room_views.shots()
    held = room_views.HELD
    truth = images[held].astype(np.float32) / 255.0
    centres = np.asarray(camera.position(lenses))
    gap = np.linalg.norm(centres[held][:, None] - centres[~held][None], axis=2)
    nearest = images[~held][gap.argmin(axis=1)].astype(np.float32) / 255.0
    plain = np.broadcast_to(images[~held].mean(axis=(0, 1, 2)) / 255.0, truth.shape)
    known = [
        float(metrics.psnr(jnp.asarray(guess, jnp.float32), jnp.asarray(truth)).mean())
        for guess in (nearest, plain)
    ]
    begun = start.from_points(swept.positions, swept.colors, scale=recipe.SCENE_MINI.scale)
    unseen = inside(held)[1]
    known.append(psnr(begun, unseen, truth))
    config = replace(
        recipe.SCENE_MINI,
        count=COUNT,
        steps=STEPS,
        densify=replace(recipe.SCENE.densify, every=20, start=20, stop=60),
    )
    targets = fit.Targets(jnp.asarray(images[~held]), None, inside(~held)[1])
    first = fit.begin(begun, len(targets.images))
    key = jax.random.key(1)
    # Steps take as long as their capacity is large, and one view needs little.
    small = replace(RASTER, slots=1 << 12)
    state, losses = ADVANCE(config, small, None, None, targets, first, key, STEPS)
    assert int(state.slots) <= small.slots
    assert bool(jnp.isfinite(losses).all())
    found = psnr(state.parameters.gaussians, unseen, truth)
    assert found > 20.5
    assert found > max(known) + 4.0
    shell = sweep.SweepConfig().on_shell(COUNT)
    length = jnp.linalg.norm(state.parameters.gaussians.means[-shell:], axis=1)
    assert float(jnp.median(length)) > 0.8 * sweep.SweepConfig().far


def test_steps_grow_with_the_range():
    rng = np.random.default_rng(0)
    points = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    points = points.at[:4].multiply(0.1)
    begun = start.from_points(points, jnp.full((8, 3), 0.5))
    far = begun._replace(means=begun.means.at[4:].multiply(50.0))
    size = scene.unit(far.means)
    assert bool((size[:4] == 1.0).all())
    assert bool((size[4:] > 10.0).all())
    config = replace(recipe.SCENE_MINI, steps=101)
    rates = fit._rates(config, fit.begin(far, 2), jnp.asarray(1.0)).gaussians
    plain = fit._rates(replace(config, contract=False), fit.begin(far, 2), jnp.asarray(1.0))
    np.testing.assert_allclose(rates.means[:, 0], plain.gaussians.means * size, rtol=1e-6)
    np.testing.assert_array_equal(rates.rotations, plain.gaussians.rotations)
    # What is as large for the cameras wanders as far for them.
    key = jax.random.key(0)
    same = begun._replace(log_scales=begun.log_scales + jnp.log(size)[:, None])
    near_step = densify.exploration(key, begun, jnp.ones(8))
    step = densify.exploration(key, same, 1.0 / size)
    np.testing.assert_allclose(step, near_step * size[:, None], rtol=1e-4)


def test_gaussians_at_and_behind_a_camera_are_not_seen_and_have_finite_gradients():
    lens = room_views.batch(jnp.eye(4)[None])
    near = RASTER.near
    depth = [-2.0, -1e-6, 0.0, 1e-30, near, 1.001 * near, 2.0]
    means = jnp.stack([jnp.zeros(7), jnp.zeros(7), jnp.asarray(depth)], axis=1)
    points = jnp.concatenate([means, means + jnp.asarray([[1e-3, 0.0, 0.0]])])
    shape = start.from_points(points, jnp.full((14, 3), 0.8))
    begun = shape._replace(log_scales=jnp.full((14, 3), jnp.log(0.05)))

    @fixtures.jit
    def both(gaussians):
        def total(gaussians):
            return rasterize.rasterize(gaussians, lens, RASTER).color.sum()

        return jax.value_and_grad(total)(gaussians)

    value, gradient = both(begun)
    assert float(value) > 0.0
    hidden = jnp.asarray([0, 1, 2, 3, 4, 7, 8, 9, 10, 11])
    for leaf in jax.tree.leaves(gradient):
        assert bool(jnp.isfinite(leaf).all())
        assert not bool(leaf[hidden].any())
    assert bool((gradient.opacity_logits[jnp.asarray([6, 13])] != 0.0).all())


def test_path_runs_along_the_cameras():
    lenses = room_views.shots().cameras
    found = path.along(lenses, 31)
    rotation = np.asarray(found.world_to_camera[:, :3, :3])
    np.testing.assert_allclose(
        rotation @ rotation.swapaxes(1, 2), np.tile(np.eye(3), (31, 1, 1)), atol=1e-5
    )
    np.testing.assert_allclose(np.linalg.det(rotation), 1.0, atol=1e-5)
    places, given = (np.asarray(camera.position(x)) for x in (found, lenses))
    assert (places >= given.min(axis=0) - 1e-5).all()
    assert (places <= given.max(axis=0) + 1e-5).all()
    assert (rotation[:, 2] @ np.asarray([1.0, 0.0, 0.0]) > 0.7).all()
    assert (rotation[:, 1] @ np.asarray([0.0, 0.0, 1.0]) < -0.7).all()
    np.testing.assert_array_equal(found.intrinsics[7], lenses.intrinsics[0])


def test_path_along_a_line_is_that_line():
    poses = jnp.tile(jnp.eye(4), (9, 1, 1)).at[:, 0, 3].set(-jnp.arange(9.0))
    found = path.along(room_views.batch(poses), 9)
    np.testing.assert_allclose(found.world_to_camera[:, :3, :3], poses[:, :3, :3], atol=1e-6)
    place = np.asarray(camera.position(found))
    np.testing.assert_allclose(place[2:7, 0], np.arange(2.0, 7.0), atol=0.1)
    np.testing.assert_allclose(place[:, 1:], 0.0, atol=1e-6)


def test_path_between_opposite_cameras_is_finite():
    back = jnp.diag(jnp.asarray([-1.0, 1.0, -1.0, 1.0]))
    poses = jnp.stack([jnp.eye(4), back, jnp.eye(4).at[0, 3].set(1.0), back])
    found = path.along(room_views.batch(poses), 12).world_to_camera
    assert bool(jnp.isfinite(found).all())
    np.testing.assert_allclose(np.linalg.det(np.asarray(found[:, :3, :3])), 1.0, atol=1e-5)
