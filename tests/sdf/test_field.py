import functools
from dataclasses import replace

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import plain_grid
import pytest

from v3d_jax.sdf import field
from v3d_jax.sdf.field import FieldConfig
from v3d_jax.sdf.hashgrid import GridConfig

CONFIG = FieldConfig(grid=GridConfig(levels=2, base=6, growth=1.6), width=16, color_width=8)
COUNT = 200


def color(config, params, places):
    return field.shade(config, params, field.evaluate(config, params, places))


_jitted = {
    function.__name__: fixtures.jit(function, static_argnums=0)
    for function in (field.sdf, field.evaluate, color)
}


def points(radius=1.0, seed=0):
    places = np.random.default_rng(seed).uniform(-0.95, 0.95, size=(COUNT, 3)) * radius
    return jnp.asarray(places, jnp.float32)


def rough(config, seed=1):
    """Parameters whose features and network all count; not the sphere of the start."""
    params = field.initial(config, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [
        leaf + 0.2 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy)


def plain(config, params, point):
    """The geometry network of one point, written as its definition."""
    first, last = params.geometry
    place = point / config.radius
    features = plain_grid.encode(config.grid, params.table, 0.5 * (place[None] + 1.0))
    hidden = jnp.concatenate([place, features.reshape(-1)])
    for layer in (first, last):
        kernel = layer.gain[None] * layer.kernel / jnp.linalg.norm(layer.kernel, axis=0)[None]
        hidden = jnp.matmul(hidden, kernel, precision="highest") + layer.bias
        if layer is first:
            hidden = jax.nn.softplus(100.0 * hidden) / 100.0
    return hidden


def close(found, wanted, bound):
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < bound


def test_analytic_gradient_is_the_derivative_and_is_learnt_from():
    """Against JAX differentiating the plain definition, once by the point and then by all else."""
    config = replace(CONFIG, radius=2.5)
    params, places = rough(config), points(2.5)

    def by_jax(params):
        sdf, gradient = jax.vmap(jax.value_and_grad(lambda x: plain(config, params, x)[0]))(places)
        return sdf, gradient, jax.vmap(lambda x: plain(config, params, x))(places)

    def loss(evaluate, params):
        sdf, gradient, outputs = evaluate(params)[:3]
        length = jnp.linalg.norm(gradient, axis=-1)
        return jnp.mean((length - 1.0) ** 2 + sdf * gradient[:, 1]) + jnp.mean(outputs**2)

    found = _jitted["evaluate"](config, params, places)
    for one, other in zip(found[:3], fixtures.jit(by_jax)(params), strict=True):
        close(one, other, 1e-5)
    ours = fixtures.jit(jax.grad(lambda p: loss(lambda q: field.evaluate(config, q, places), p)))
    theirs = fixtures.jit(jax.grad(lambda p: loss(by_jax, p)))
    for one, other in zip(*map(jax.tree.leaves, (ours(params), theirs(params))), strict=True):
        if np.abs(other).max() > 0:
            close(one, other, 1e-4)
        else:
            assert not np.asarray(one).any()


@pytest.mark.slow
@pytest.mark.parametrize("normals", ["tetrahedral", "central"])
def test_differences_come_near_the_derivative(normals):
    """The finer the grid that they step over, the nearer; and they are learnt from."""
    errors = []
    for base in (20, 80):
        grid = GridConfig(levels=1, base=base)
        config = replace(CONFIG, grid=grid, normals=normals)
        params = field.initial(config, jax.random.key(0))
        found = _jitted["evaluate"](config, params, points())
        exact = _jitted["evaluate"](replace(config, normals="analytic"), params, points())
        np.testing.assert_array_equal(found.outputs, exact.outputs)
        errors.append(np.linalg.norm(found.gradient - exact.gradient))
    assert errors[1] < 0.6 * errors[0]
    assert errors[1] / np.linalg.norm(exact.gradient) < 0.1
    moved = fixtures.jit(jax.grad(lambda p: field.evaluate(config, p, points()).gradient.sum()))(
        params
    )
    assert float(jnp.abs(moved.table).max()) == 0.0  # features count for nothing yet
    assert float(jnp.abs(moved.geometry[0].kernel).max()) > 0.0


def test_differences_of_a_plane_are_exact():
    """Softplus far from 0 is linear, so is the network, and every difference is the slope."""
    slope = np.float32([0.3, -0.5, 0.8])
    config = replace(CONFIG, width=1, outputs=2, radius=2.0)
    params = field.initial(config, jax.random.key(0))
    kernel = jnp.zeros((7, 1)).at[:3, 0].set(slope)
    first = field.Layer(kernel, jnp.full(1, 5.0), jnp.linalg.norm(kernel, axis=0))
    last = field.Layer(jnp.ones((1, 2)), jnp.full(2, -5.0), jnp.ones(2))
    params = params._replace(geometry=(first, last))
    for normals in ("analytic", "tetrahedral", "central"):
        found = _jitted["evaluate"](replace(config, normals=normals), params, points(2.0))
        np.testing.assert_allclose(found.sdf, points(2.0) @ slope / 2.0, atol=1e-5)
        wanted = np.broadcast_to(slope / 2.0, (COUNT, 3))
        np.testing.assert_allclose(found.gradient, wanted, atol=2e-4)


def test_starts_as_a_sphere_of_half_the_box():
    """On average: sixty-four units make each start a little lopsided."""
    config = FieldConfig(grid=CONFIG.grid, radius=3.0)
    places = points(3.0)

    def begun(key):
        params = field.initial(config, key)
        return field.sdf(config, params, places), field.inv_s(params)

    found, sharpness = fixtures.jit(jax.vmap(begun))(jax.random.split(jax.random.key(3), 50))
    wanted = np.linalg.norm(places / 3.0, axis=1) - 0.5
    assert np.abs(found.mean(axis=0) - wanted).max() < 0.1
    assert np.abs(found - wanted[None]).mean() < 0.15
    np.testing.assert_allclose(sharpness, np.exp(3.0), rtol=1e-5)


def test_closed_levels_count_for_nothing():
    params, places = rough(CONFIG), points()
    cut = params._replace(table=params.table.at[CONFIG.grid.rows[0] :].set(0.0))
    for level, table in ((1, cut), (2, params), (None, params)):
        found = _jitted["evaluate"](CONFIG, params, places, level)
        wanted = _jitted["evaluate"](CONFIG, table, places)
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    cells = [float(field.finest_cell(CONFIG, jnp.asarray(level))) for level in (1, 2)]
    assert cells == pytest.approx([2 / 5, 2 / 9])
    assert float(field.finest_cell(CONFIG, None)) == pytest.approx(2 / 9)


def test_functions_for_extraction():
    """Colours in [0, 1] that follow the normal, not the length of the gradient."""
    params, places = rough(CONFIG), points()
    found = _jitted["evaluate"](CONFIG, params, places)
    np.testing.assert_allclose(_jitted["sdf"](CONFIG, params, places), found.sdf, atol=1e-5)
    found_color = _jitted["color"](CONFIG, params, places)
    assert found_color.shape == (COUNT, 3)
    assert 0.0 <= float(found_color.min()) < float(found_color.max()) <= 1.0
    shade = fixtures.jit(functools.partial(field.shade, CONFIG))
    stretched = shade(params, found._replace(gradient=7.0 * found.gradient))
    np.testing.assert_allclose(stretched, found_color, atol=1e-5)
    turned = shade(params, found._replace(gradient=-found.gradient))
    assert np.abs(turned - found_color).max() > 0.01


def test_unit_is_finite_at_zero():
    value, gradient = jax.value_and_grad(lambda x: field.unit(x).sum())(jnp.zeros((1, 3)))
    assert float(value) == 0.0
    assert np.isfinite(gradient).all()


def test_colors_may_see_the_grid():
    config = replace(CONFIG, color_sees_grid=True)
    params, places = rough(config), points()
    assert params.color[0].kernel.shape[0] == CONFIG.outputs + 3 + 3 + 4
    found = _jitted["evaluate"](config, params, places)
    np.testing.assert_allclose(found.inputs[:, :3], places, atol=1e-6)
    shade = fixtures.jit(functools.partial(field.shade, config))
    moved = shade(params, found._replace(inputs=found.inputs + 1.0))
    assert np.abs(moved - _jitted["color"](config, params, places)).max() > 0.01
    plain = rough(CONFIG)
    same = fixtures.jit(functools.partial(field.shade, CONFIG))
    np.testing.assert_array_equal(
        same(plain, found), same(plain, found._replace(inputs=found.inputs + 1.0))
    )
