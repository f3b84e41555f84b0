"""A field that starts as a given solid: regression of its distance on random points.

A few seconds, whatever the networks and grids; features that are open at the fit's first step learn
the solid, the others stay as they are.

Axes: n point.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Key

from v3d_jax.sdf import field, volume
from v3d_jax.sdf.field import Field, FieldConfig, Level
from v3d_jax.sdf.volume import Volume


@dataclass(frozen=True)
class StartConfig:
    """How a field is made to start as a solid."""

    steps: int = 200
    points: int = 8192  # a step
    rate: float = 5e-3  # of Adam at first; falls to 0 as half a cosine
    near: float = 0.02  # half sides of the box: errors count inversely to the distance plus this


def shape_as(
    config: FieldConfig,
    told: StartConfig,
    params: Field,
    solid: Volume,
    key: Key[Array, ""],
    level: Level = None,
) -> Field:
    """Parameters near the given ones whose distance is that to the solid."""
    distances, radius = volume.signed_distance(solid), config.radius
    adam = optax.scale_by_adam()

    def loss(params: Field, points: Array, wanted: Array) -> Array:
        error = jnp.abs(field.sdf(config, params, points, level) - wanted)
        return jnp.mean(error / (jnp.abs(wanted) + told.near * radius))

    def one(carry: tuple[Field, Any], step: Array) -> tuple[tuple[Field, Any], None]:
        params, moments = carry
        chosen = jax.random.fold_in(key, step)
        points = jax.random.uniform(chosen, (told.points, 3), minval=-radius, maxval=radius)
        wanted = volume.sample(solid, distances, points)
        update, moments = adam.update(jax.grad(loss)(params, points, wanted), moments)
        rate = told.rate * 0.5 * (1.0 + jnp.cos(math.pi * step / told.steps))
        return (jax.tree.map(lambda p, u: p - rate * u, params, update), moments), None

    return lax.scan(one, (params, adam.init(params)), jnp.arange(told.steps))[0][0]
