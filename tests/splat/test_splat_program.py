"""What the compiled rasterizer may hold: two cheap sorts, no atomics on floats, bounded memory."""

import functools

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest

from v3d_jax.ops.camera import Camera
from v3d_jax.splat import rasterize
from v3d_jax.splat.gaussians import Gaussians


def shapes(views, count, degree):
    """Abstract arguments: Gaussians, cameras, background."""
    number = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    fields = ((count, 3), (count, 4), (count, 3), (count,), (count, (degree + 1) ** 2, 3))
    size = jax.ShapeDtypeStruct((views,), jnp.int32)
    camera = Camera(number((views, 4, 4)), number((views, 3, 3)), size, size)
    return Gaussians(*(number(field) for field in fields)), camera, number((3,))


def step(config, gaussians, camera, background):
    """A gradient step's program: everything that is differentiable."""

    def loss(gaussians, background):
        r = rasterize.rasterize(gaussians, camera, config, background)
        return jnp.sum(r.color**2) + jnp.sum(r.alpha) + jnp.sum(r.depth)

    return jax.grad(loss, argnums=(0, 1))(gaussians, background)


@pytest.mark.parametrize(
    ("unroll", "height", "tile"), [(False, 80, np.uint16), (True, 1 << 16, np.uint32)]
)
def test_sorts_scatters_and_types(unroll, height, tile):
    config = rasterize.RasterConfig(width=96, height=height, slots=1 << 14, unroll=unroll)
    traced = jax.make_jaxpr(functools.partial(step, config))(*shapes(2, 400, 3))
    found = list(jaxprs.equations(traced.jaxpr))
    assert len(found) > 500
    sorts = [e for e in found if e.primitive.name == "sort"]
    assert len(sorts) == 2
    # one unsigned key with one payload: what XLA hands to a GPU's radix sort
    for e, key in zip(sorts, (np.uint32, tile), strict=True):
        assert [v.aval.dtype for v in e.invars] == [key, np.int32]
        assert e.params["num_keys"] == 1
        assert e.invars[0].aval.ndim == 1
    scatters = [e for e in found if e.primitive.name.startswith("scatter")]
    assert len(scatters) >= 5
    for e in scatters:
        unordered = np.issubdtype(e.outvars[0].aval.dtype, np.floating)
        assert not unordered or (e.primitive.name == "scatter" and e.params["unique_indices"])
    for e in found:
        assert e.primitive.name not in ("pure_callback", "io_callback", "debug_callback")
        for v in e.outvars:
            assert getattr(v.aval, "dtype", None) not in (np.float64, np.int64), e
        if e.primitive.name == "dot_general":
            assert e.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


@pytest.mark.slow
def test_memory_of_all_views_of_a_full_fit():
    config = rasterize.RasterConfig(width=512, height=512, slots=1 << 23)
    program = jax.jit(functools.partial(step, config)).lower(*shapes(18, 100_000, 0)).compile()
    # 7.4 GB on a CPU, 2.3 GB on a GPU; one array of slots x pixels would be 2.1 GB more
    assert program.memory_analysis().temp_size_in_bytes < 8e9
