"""Denoiser and guidance around the UNet, against a stored output of the published code."""

import fixtures
import jax.numpy as jnp
import pytest
from flax import nnx

from v3d_jax.diffusion import guidance


@pytest.mark.golden
def test_guided_denoiser_equals_the_published_one():
    graphdef, params = fixtures.filled_unet()
    condition = guidance.Condition(
        context=jnp.asarray(fixtures.draw(6, (1, 1, 16))),
        latent=fixtures.channels_last(fixtures.draw(7, (1, 4, 8, 8)), clips=1)[:, 0],
        vector=jnp.repeat(jnp.asarray(fixtures.draw(8, (1, 1, 24))), 3, axis=1),
    )
    scale = guidance.frame_scale("linear", 1.5, 3.0, 3)

    @fixtures.jit
    def denoise(params, x, sigma):
        network = nnx.merge(graphdef, params)
        return guidance.guided_denoiser(network, condition, scale)(x, sigma)

    x = fixtures.channels_last(10 * fixtures.draw(5, (3, 4, 8, 8)), clips=1)
    fixtures.assert_summary(
        denoise(params, x, jnp.asarray(7.5)),
        fixtures.Summary(
            0.348955,
            1.112631,
            0.880005,
            (0.1203, 0.34987, 0.00982, 0.52114),
            (3.62645, 1.6797, 0.81421),
        ),
    )
