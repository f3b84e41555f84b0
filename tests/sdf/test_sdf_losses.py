import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.sdf import losses

RNG = np.random.default_rng(0)
COUNT = 50


def vectors():
    return jnp.asarray(RNG.normal(size=(COUNT, 3)), jnp.float32)


def test_color_and_eikonal_are_means_of_what_counts():
    found, wanted = vectors(), vectors()
    counts = jnp.asarray(RNG.uniform(size=COUNT) < 0.4)
    error = np.square(np.asarray(found - wanted)).sum(axis=1)[np.asarray(counts)].mean()
    assert float(losses.color(found, wanted, counts)) == pytest.approx(error, rel=1e-5)
    length = np.linalg.norm(found, axis=1)[np.asarray(counts)]
    wanted_length = np.square(length - 1).mean()
    assert float(losses.eikonal(found, counts)) == pytest.approx(wanted_length, rel=1e-5)
    nothing = jnp.zeros(COUNT, bool)
    assert float(losses.color(found, wanted, nothing)) == 0.0
    slope = jax.grad(lambda g: losses.eikonal(g, ~nothing))(jnp.zeros((COUNT, 3)))
    assert np.isfinite(slope).all()


def test_mask_is_the_cross_entropy_and_never_infinite():
    alpha = jnp.asarray([0.0, 1.0, 0.25, 1.0, 0.0])
    opacity = jnp.asarray([0.2, 0.9, 0.25, 0.0, 1.0])
    a, o = np.asarray(alpha, np.float64), np.clip(np.asarray(opacity, np.float64), 1e-3, 1 - 1e-3)
    wanted = -(a * np.log(o) + (1 - a) * np.log(1 - o)).mean()
    assert float(losses.mask(opacity, alpha)) == pytest.approx(wanted, rel=1e-5)


def test_smoothness_and_sparsity():
    a, b = vectors(), vectors()
    wanted = np.abs(np.asarray(a - b)).mean()
    assert float(losses.smoothness(a, b)) == pytest.approx(wanted, rel=1e-5)
    sdf = jnp.asarray([0.0, 0.01, -0.01, 5.0])
    wanted = (1.0 + 2.0 * np.exp(-1.0)) / 4.0
    assert float(losses.sparsity(sdf, 1.0)) == pytest.approx(wanted, rel=1e-5)
    # The same object in a box of another size.
    assert float(losses.sparsity(3.0 * sdf, 3.0)) == pytest.approx(wanted, rel=1e-5)


def test_normals_count_where_they_are_known_and_seen_from_the_front():
    directions = jnp.asarray([[0.0, 0.0, 1.0]] * 4)
    front = jnp.asarray([0.0, 0.0, -1.0])
    side = jnp.asarray([1.0, 0.0, 0.0])
    wanted = jnp.stack([front, front, -front, jnp.zeros(3)])
    counts = jnp.asarray([True, True, True, True])
    found = jnp.stack([2.0 * front, side, side, side])
    # Of four rays, weights e, e, e and 1, only the second is wrong and counts.
    value = losses.normal(found, wanted, directions, counts)
    assert float(value) == pytest.approx(np.e / (3 * np.e + 1), rel=1e-5)
    none = losses.normal(found, wanted, directions, ~counts)
    assert float(none) == 0.0
