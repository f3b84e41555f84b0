import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.diffusion import precondition


@pytest.mark.golden
@pytest.mark.parametrize(
    ("sigma", "published"),
    [
        (700.0, (2.04081e-6, -0.99999898, 0.00142857, 1.637770)),
        (0.002, (0.999996, -0.001999996, 0.999998, -1.553652)),
    ],
)
def test_scalings_equal_the_published_ones(sigma, published):
    np.testing.assert_allclose(precondition.scalings(jnp.asarray(sigma)), published, rtol=2e-6)


def test_scalings_keep_unit_variance():
    sigma = jnp.geomspace(1e-3, 1e3, 50)
    c_skip, c_out, c_in, _ = precondition.scalings(sigma)
    # EDM, appendix B.6: unit variance into the network, and unit variance of the target it fits.
    np.testing.assert_allclose(c_in**2 * (sigma**2 + 1), 1, rtol=1e-5)
    np.testing.assert_allclose((1 - c_skip) ** 2 + c_skip**2 * sigma**2, c_out**2, rtol=1e-4)


def test_network_sees_scaled_input_and_noise_label_of_its_frame(key):
    sigma = jnp.asarray([[0.5, 2.0, 80.0]])
    x = jax.random.normal(key, (1, 3, 2, 2, 4))
    seen = []

    def network(x_in, c_noise):
        seen.append((x_in, c_noise))
        return jnp.ones_like(x_in, jnp.bfloat16)

    denoised = precondition.denoise(network, x, sigma)
    (x_in, c_noise), s = seen[0], np.asarray(sigma)[..., None, None, None]
    np.testing.assert_allclose(x_in, x / np.sqrt(s**2 + 1), rtol=1e-5)
    np.testing.assert_allclose(c_noise, np.log(sigma) / 4, rtol=1e-6)
    np.testing.assert_allclose(denoised, (x - s * np.sqrt(s**2 + 1)) / (s**2 + 1), rtol=1e-5)
    assert denoised.dtype == jnp.float32
