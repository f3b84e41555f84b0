"""Noise levels at which a sampler evaluates the denoiser.

`sigma` is the standard deviation of the noise on unit-variance latents. A schedule of n steps is
n + 1 levels, decreasing, the last one 0.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Ten steps optimised for Stable Video Diffusion (Align Your Steps, arXiv 2404.14507); the last of
# the eleven levels is where a sampler lands.
_ALIGN_YOUR_STEPS = (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)


@dataclass(frozen=True)
class EDMSchedule:
    """The discretisation of EDM (arXiv 2206.00364, equation 5); the defaults are V3D's."""

    sigma_min: float = 0.002
    sigma_max: float = 700.0
    rho: float = 7.0

    def sigmas(self, n: int) -> Float[Array, "{n}+1"]:
        """n levels from sigma_max to sigma_min, equally spaced in sigma^(1/rho), then 0."""
        first, last = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        levels = np.linspace(first, last, n) ** self.rho
        return jnp.asarray(np.append(levels, 0.0), jnp.float32)


def align_your_steps(n: int = 10) -> Float[Array, "{n}+1"]:
    """The levels of Align Your Steps for SVD, whose sigma_max 700 is V3D's too.

    Other counts than 10 interpolate the list log-linearly, as its authors do. The last level
    becomes 0, so that the sample is free of noise and n steps cost n evaluations.
    """
    known = np.log(np.asarray(_ALIGN_YOUR_STEPS))
    levels = np.exp(np.interp(np.linspace(0, 1, n + 1), np.linspace(0, 1, len(known)), known))
    return jnp.asarray(np.append(levels[:-1], 0.0), jnp.float32)
