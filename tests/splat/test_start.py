import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.splat import gaussians, start


def test_neighbours_are_those_of_a_full_search(monkeypatch):
    points = np.random.default_rng(0).normal(size=(97, 3))
    points[5] = points[6]
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    nearest = np.sort(distance, axis=1)[:, 1:4]
    expected = np.sqrt(np.maximum((nearest**2).mean(axis=1), 1e-7))
    for pairs in (1 << 25, 97 * 10, 1):  # at once, in rows of ten, one by one
        monkeypatch.setattr(start, "_PAIRS", pairs)
        found = start.neighbour_distance(jnp.asarray(points, jnp.float32))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_equal_points_get_a_size(monkeypatch):
    found = start.neighbour_distance(jnp.zeros((5, 3)))
    np.testing.assert_allclose(found, np.sqrt(1e-7), rtol=1e-6)
    with pytest.raises(ValueError, match="3 points"):
        start.neighbour_distance(jnp.zeros((3, 3)))


def test_gaussians_show_their_colors_from_everywhere():
    rng = np.random.default_rng(1)
    positions = jnp.asarray(rng.normal(size=(10, 3)), jnp.float32)
    colors = jnp.asarray(rng.uniform(size=(10, 3)), jnp.float32)
    made = start.from_points(positions, colors, degree=2, opacity=0.1, scale=0.5)
    assert made.sh.shape == (10, 9, 3)
    shown = gaussians.color(made.sh, made.means, jnp.asarray([[3.0, 1.0, 0.0], [0.0, 0.0, 9.0]]))
    np.testing.assert_allclose(shown, jnp.broadcast_to(colors, (2, 10, 3)), atol=1e-6)
    np.testing.assert_allclose(made.opacities, 0.1, rtol=1e-5)
    halves = 0.5 * start.neighbour_distance(positions)
    np.testing.assert_allclose(made.scales, np.tile(halves[:, None], (1, 3)), rtol=1e-5)
