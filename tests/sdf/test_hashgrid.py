import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import plain_grid
import pytest

from v3d_jax.sdf import hashgrid
from v3d_jax.sdf.hashgrid import GridConfig

encode = jax.jit(hashgrid.encode, static_argnums=0)
plain_value = jax.jit(plain_grid.encode, static_argnums=0)
plain_jacobian = jax.jit(plain_grid.jacobian, static_argnums=0)
CONFIGS = {
    "dense": GridConfig(levels=3, base=5, growth=1.5),
    "hashed": GridConfig(levels=2, base=5, growth=1.7, dense=200, hashed=128),
    "planes": GridConfig(form="planes", levels=2, base=5, growth=1.5, chunk=64),
}
COUNT = 300


def points(config, seed=0):
    """Random places at least 1e-4 from the faces of any level's cells."""
    found = np.random.default_rng(seed).uniform(size=(4 * COUNT, 3)).astype(np.float32)
    for side in config.resolutions:
        place = found * (side - 1)
        found = found[(np.abs(place - np.round(place)) > 1e-4 * (side - 1)).all(axis=1)]
    return jnp.asarray(found[:COUNT])


def table(config):
    return jax.random.normal(jax.random.key(1), (sum(config.rows), config.features))


def close(found, wanted, bound=1e-5):
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert error < bound


@pytest.fixture(params=CONFIGS, scope="module")
def config(request):
    return CONFIGS[request.param]


def test_kinds_of_levels():
    assert (
        len(
            {
                side**3 == rows
                for side, rows in zip(
                    CONFIGS["hashed"].resolutions, CONFIGS["hashed"].rows, strict=True
                )
            }
        )
        == 2
    )
    assert GridConfig().resolutions == (32, 42, 56, 74, 97, 128)
    assert sum(GridConfig().rows) == sum(side**3 for side in GridConfig().resolutions)


def test_value_and_jacobian_are_those_of_plain_interpolation(config):
    places, features = points(config), table(config)
    value, jacobian = encode(config, features, places)
    close(value, plain_value(config, features, places))
    close(jacobian, plain_jacobian(config, features, places))


def test_gradient_is_that_of_jax_differentiating_twice(config):
    """A loss of value and Jacobian, such as the eikonal's."""
    places = points(config)

    def loss(encode, features):
        value, jacobian = encode(features)
        length = jnp.sqrt(jnp.sum(jnp.square(jacobian), axis=-1))
        return jnp.mean(jnp.square(length - 1.0)) + jnp.mean(jnp.sin(value) * jacobian[..., 0])

    def ours(features):
        return hashgrid.encode(config, features, places)

    def plain(features):
        return (
            plain_grid.encode(config, features, places),
            plain_grid.jacobian(config, features, places),
        )

    features = table(config)
    found = jax.jit(jax.grad(lambda t: loss(ours, t)))(features)
    wanted = jax.jit(jax.grad(lambda t: loss(plain, t)))(features)
    close(found, wanted)
    assert float(jnp.abs(wanted).max()) > 1e-3


@pytest.mark.parametrize(("name", "lookups"), [("dense", 1), ("hashed", 1), ("planes", 0)])
def test_one_gather_forward_and_one_scatter_back(name, lookups):
    config = CONFIGS[name]

    def loss(features, places):
        value, jacobian = hashgrid.encode(config, features, places)
        return value.sum() + jnp.square(jacobian).sum()

    program = str(jax.make_jaxpr(jax.grad(loss))(table(config), points(config)))
    assert program.count(" gather[") == lookups
    assert program.count(" scatter-add[") == lookups


def test_points_outside_count_as_the_nearest_inside(config):
    features = table(config)
    inside = jnp.asarray([[0.0, 0.3, 1.0], [1.0, 1.0, 0.0]])
    outside = inside + jnp.asarray([[-0.2, 0.0, 3.0], [1.0, 2.0, -1.0]])
    for found, wanted in zip(
        encode(config, features, outside),
        encode(config, features, inside),
        strict=True,
    ):
        np.testing.assert_array_equal(found, wanted)


def test_points_get_no_gradient():
    config = CONFIGS["dense"]
    gradient = jax.grad(lambda x: hashgrid.encode(config, table(config), x)[0].sum())(
        points(config)
    )
    assert not np.asarray(gradient).any()


def test_planes_do_not_depend_on_how_many_points_go_at_a_time():
    config = CONFIGS["planes"]
    places, features = points(config), table(config)
    whole = encode(replace(config, chunk=10_000), features, places)
    for found, wanted in zip(encode(config, features, places), whole, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_hashed_rows_of_a_level_stay_its_own(key):
    config = CONFIGS["hashed"]
    rows, _ = hashgrid._locate(config, jax.random.uniform(key, (500, 3)))
    ends = np.cumsum((0, *config.rows))
    for level, (low, high) in enumerate(itertools.pairwise(ends)):
        assert low <= int(rows[:, level].min()) <= int(rows[:, level].max()) < high
