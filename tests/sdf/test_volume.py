import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from v3d_jax.sdf import volume
from v3d_jax.sdf.field import FieldConfig
from v3d_jax.sdf.volume import Volume

SIDE, CORNER = 24, np.float32([-0.7, -0.5, -0.6])
VOXEL = 0.05


def ball(radius=0.4, cut=0.06):
    """Distances to a ball, right only near its surface, as those of a carved hull."""
    steps = (np.arange(SIDE) + 0.5) * VOXEL
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1) + CORNER
    distance = np.clip(radius - np.linalg.norm(grid, axis=-1), -cut, cut)
    return Volume(jnp.asarray(distance, jnp.float32), jnp.asarray(CORNER), jnp.asarray(VOXEL))


def test_distance_to_seeds_is_exact():
    seeds = np.random.default_rng(0).uniform(size=(9, 9, 9)) < 0.01
    wanted = ndimage.distance_transform_edt(~seeds)
    np.testing.assert_allclose(volume._distance_to(jnp.asarray(seeds)), wanted, rtol=1e-6)


def test_distances_are_known_everywhere_and_sharp_at_the_surface():
    solid = ball()
    found = volume.signed_distance(solid)
    rng = np.random.default_rng(1)
    points = rng.uniform(-1.0, 1.0, size=(4000, 3)).astype(np.float32)
    sampled = np.asarray(volume.sample(solid, found, jnp.asarray(points)))
    wanted = np.linalg.norm(points, axis=1) - 0.4
    near = np.abs(wanted) < VOXEL
    assert np.abs(sampled - wanted)[near].max() < 0.25 * VOXEL
    inside_grid = (np.abs(points - CORNER - 0.5 * SIDE * VOXEL) < 0.5 * SIDE * VOXEL).all(axis=1)
    assert np.abs(sampled - wanted)[inside_grid].max() < 1.2 * VOXEL
    # Beyond the grid it is a length that goes on growing.
    far = np.asarray(volume.sample(solid, found, jnp.asarray([[0.9, 0.0, 0.0], [1.9, 0.0, 0.0]])))
    assert far[1] - far[0] == pytest.approx(1.0, abs=1e-5)


def test_volumes_that_say_nothing_are_not_usable():
    config = FieldConfig()
    solid = ball()
    assert bool(volume.usable(config, solid))
    assert not bool(volume.usable(config, solid._replace(distance=-jnp.ones((SIDE,) * 3))))
    assert not bool(volume.usable(config, solid._replace(distance=jnp.ones((SIDE,) * 3))))
    assert not bool(volume.usable(config, solid._replace(corner=solid.corner + 0.7)))
    assert bool(jax.jit(volume.usable, static_argnums=0)(FieldConfig(radius=2.0), solid))
