"""EDM's wrapping of a raw network F into a denoiser D, for data of unit variance.

D(x; sigma) = c_skip x + c_out F(c_in x; c_noise). The scalings are v-prediction's with EDM's
c_noise, which is what SVD and V3D were trained with.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

Network = Callable[[Float[Array, "b t h w c"], Float[Array, "b t"]], Float[Array, "b t h w c"]]


class Scalings(NamedTuple):
    """The four coefficients at one noise level, or at an array of them."""

    c_skip: Float[Array, "*s"]
    c_out: Float[Array, "*s"]
    c_in: Float[Array, "*s"]
    c_noise: Float[Array, "*s"]


def scalings(sigma: Float[Array, "*s"]) -> Scalings:
    """Coefficients of EDM (arXiv 2206.00364, table 1) with sigma_data 1 and v-prediction's signs.

    `sigma` must be positive: c_noise is ln(sigma) / 4.
    """
    variance = sigma**2 + 1.0
    c_in = 1.0 / jnp.sqrt(variance)
    return Scalings(1.0 / variance, -sigma * c_in, c_in, 0.25 * jnp.log(sigma))


def denoise(
    network: Network,
    x: Float[Array, "b t h w c"],
    sigma: Float[Array, ""] | Float[Array, "b t"],
) -> Float[Array, "b t h w c"]:
    """The denoised latents D(x; sigma) in float32, for one noise level or one a frame.

    `network(c_in x, c_noise)` returns F; its conditioning is closed over. EDM, equation 7.
    """
    sigma = jnp.broadcast_to(sigma, x.shape[:2]).astype(jnp.float32)
    c_skip, c_out, c_in, c_noise = scalings(sigma)
    x = x.astype(jnp.float32)
    raw = network(x * _per_pixel(c_in), c_noise).astype(jnp.float32)
    return _per_pixel(c_skip) * x + _per_pixel(c_out) * raw


def _per_pixel(values: Float[Array, "b t"]) -> Float[Array, "b t 1 1 1"]:
    return values[..., None, None, None]
