"""Picture to Gaussians as one compiled program, with the smallest generator."""

import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_generator

from v3d_jax import pipeline
from v3d_jax.diffusion.sampler import SamplingConfig
from v3d_jax.splat import carve, fit, recipe
from v3d_jax.splat.objective import LossConfig

CONFIG = fit.FitConfig(count=150, steps=25, loss=LossConfig(dssim=0.2, lpips=0.0, opacity=0.01))
SETTINGS = pipeline.Settings(
    tiny_generator.CONFIG,
    SamplingConfig(steps=2, sampler="dpmpp_2m", guidance_min=1.0, guidance_max=2.0),
    splats=recipe.SplatConfig(CONFIG, carve.CarveConfig(resolution=16, coarse=16), 1 << 11),
)


@pytest.fixture(scope="module")
def whole():
    return jax.jit(pipeline.image_to_splats, static_argnums=0)


@pytest.fixture(scope="module")
def picture():
    return jax.random.uniform(jax.random.key(7), (16, 16, 3))


@pytest.mark.slow
def test_picture_to_gaussians_is_one_program(whole, picture, key):
    params = tiny_generator.params()
    lowered = whole.lower(SETTINGS, params, picture, key).as_text()
    assert lowered.count("func.func public") == 1
    assert "callback" not in lowered
    made = [whole(SETTINGS, params, picture, jax.random.key(seed)) for seed in (0, 0, 1)]
    assert whole._cache_size() == 1
    for first, again, other in zip(*(jax.tree.leaves(one.gaussians) for one in made), strict=True):
        assert np.isfinite(first).all()
        np.testing.assert_array_equal(first, again)
        if first.ndim > 1:
            assert np.abs(np.asarray(first) - np.asarray(other)).max() > 0
    one = made[0]
    assert one.gaussians.means.shape == (150, 3)
    assert float(one.losses[-5:].mean()) < float(one.losses[:5].mean())
    assert 0 < int(one.slots) <= SETTINGS.splats.slots
    orbit = jax.jit(pipeline.image_to_orbit, static_argnums=0)
    np.testing.assert_allclose(one.frames, orbit(SETTINGS, params, picture, key), atol=1e-4)


def test_published_recipe_traces_with_lpips(picture, key):
    """Shapes only: the published size of the fit on the smallest generator's frames."""
    from v3d_jax.nn import lpips

    def conv(size, given, made):
        kernel = jax.ShapeDtypeStruct((size, size, given, made), np.float32)
        return lpips.Conv(kernel, jax.ShapeDtypeStruct((made,), np.float32))

    widths = (3, 64, 64, 128, 128, *3 * (256,), *6 * (512,))
    vgg = lpips.LPIPSParams(
        tuple(conv(3, *pair) for pair in itertools.pairwise(widths)),
        tuple(jax.ShapeDtypeStruct((c,), np.float32) for c in (64, 128, 256, 512, 512)),
    )
    settings = replace(SETTINGS, splats=recipe.SplatConfig(fit.V3D))
    params = jax.eval_shape(tiny_generator.params)
    made = jax.eval_shape(
        lambda *given: pipeline.image_to_splats(settings, *given), params, picture, key, vgg
    )
    assert made.gaussians.means.shape == (100_000, 3)
    assert made.losses.shape == (4000,)
