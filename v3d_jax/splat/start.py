"""Gaussians to start a fit from: round ones on points, as large as the gaps between them.

Axes: p point. World units.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from v3d_jax.splat import gaussians as splats
from v3d_jax.splat.gaussians import Gaussians

_PAIRS = 1 << 25  # distances held at a time
_LEAST = 1e-7  # mean squared distance, as the reference 3DGS


def from_points(
    positions: Float[Array, "p 3"],
    colors: Float[Array, "p 3"],
    *,
    degree: int = 0,
    opacity: float = 0.5,
    scale: float = 1.0,
) -> Gaussians:
    """A round Gaussian for every point, of deviation `scale` times the distance to its neighbours.

    `degree` is that of the colours' spherical harmonics. The reference 3DGS's initialisation, whose
    opacity is 0.1; V3D's is 0.5.
    """
    count = positions.shape[0]
    deviation = scale * neighbour_distance(positions)
    return Gaussians(
        positions,
        jnp.broadcast_to(jnp.asarray([1.0, 0.0, 0.0, 0.0]), (count, 4)),
        jnp.broadcast_to(jnp.log(deviation)[:, None], (count, 3)),
        jnp.full(count, math.log(opacity / (1.0 - opacity))),
        splats.sh_from_color(colors, degree),
    )


def neighbour_distance(positions: Float[Array, "p 3"], neighbours: int = 3) -> Float[Array, "p"]:
    """Root of the mean squared distance to the nearest others; at least 3e-4.

    All pairs, some rows at a time, so that memory is bounded whatever the number of points. Fewer
    points than `neighbours` + 1 raise ValueError.
    """
    count = positions.shape[0]
    if count <= neighbours:
        raise ValueError(f"{count} points have no {neighbours} neighbours each")
    columns = [positions[:, axis] for axis in range(3)]

    def nearest(index: Array) -> Array:
        squared = sum(jnp.square(column - column[index]) for column in columns)
        squared = squared.at[index].set(jnp.inf)
        total = jnp.zeros(())
        # Few enough that a minimum for each beats sorting.
        for _ in range(neighbours):
            first = jnp.argmin(squared)
            total = total + squared[first]
            squared = squared.at[first].set(jnp.inf)
        return total / neighbours

    rows = max(1, min(count, _PAIRS // count))
    mean = lax.map(nearest, jnp.arange(count), batch_size=rows)
    return jnp.sqrt(jnp.maximum(mean, _LEAST))
