"""What the compiled fit may hold: lookups one by one, nothing from the host, TPUs and GPUs too."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import jaxprs
import pytest

from v3d_jax.ops.camera import Camera
from v3d_jax.sdf import fit
from v3d_jax.sdf.hashgrid import GridConfig
from v3d_jax.sdf.targets import Targets

VIEWS, SIZE = 18, 512
PLANES = replace(fit.V3D, field=replace(fit.V3D.field, grid=GridConfig(form="planes")))


def arguments(config):
    """Abstract: what `advance` takes for V3D's frames."""
    number = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    whole = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    cameras = Camera(number((VIEWS, 4, 4)), number((VIEWS, 3, 3)), whole((VIEWS,)), whole((VIEWS,)))
    seen = Targets(
        jax.ShapeDtypeStruct((VIEWS, SIZE, SIZE, 3), jnp.uint8),
        jax.ShapeDtypeStruct((VIEWS, SIZE, SIZE), jnp.bool_),
        cameras,
        pixels=whole((VIEWS * SIZE * SIZE,)),
        around=whole(()),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    return seen, jax.eval_shape(functools.partial(fit.begin, config), key), key


def traced(config):
    def step(seen, state, key):
        return fit.advance(config, None, None, seen, state, key, 2)

    return jax.jit(step).trace(*arguments(config))


@pytest.mark.parametrize("config", [fit.V3D, PLANES], ids=["grid", "planes"])
def test_table_is_read_and_written_once_a_batch(config):
    """Rays' samples and random points; cells of the occupancy grid are read only."""
    table = (sum(config.field.grid.rows), config.field.grid.features)
    found = list(jaxprs.equations(traced(config).jaxpr.jaxpr))
    touched = [
        equation.primitive.name
        for equation in found
        if equation.primitive.name in ("gather", "scatter-add")
        and equation.invars[0].aval.shape == table
    ]
    lookups = 0 if config is PLANES else 1
    assert touched.count("gather") == 3 * lookups
    assert touched.count("scatter-add") == 2 * lookups
    assert not any("callback" in equation.primitive.name for equation in found)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(platform):
    lowered = traced(PLANES if platform == "tpu" else fit.V3D).lower(lowering_platforms=(platform,))
    assert "callback" not in lowered.as_text()
