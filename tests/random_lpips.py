"""LPIPS of random weights: the real networks' shapes where their file is not installed."""

import jax.numpy as jnp
import numpy as np

from v3d_jax.nn import lpips


def vgg(rng):
    """A VGG16, which takes pictures of 16 pixels."""
    convs, inputs = [], 3
    for width in (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512):
        kernel = rng.standard_normal((3, 3, inputs, width)) / np.sqrt(9 * inputs)
        convs.append(lpips.Conv(jnp.asarray(kernel, jnp.float32), jnp.zeros(width)))
        inputs = width
    taps = (64, 128, 256, 512, 512)
    return lpips.LPIPSParams(tuple(convs), tuple(jnp.ones(width) for width in taps))
