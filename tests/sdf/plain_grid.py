"""Grid features the obvious way, a level and a corner at a time, for JAX to differentiate."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

PRIMES = (1, 2654435761, 805459861)


def encode(config, table, points):
    """Features [n, l, f] of points in [0, 1]^3."""
    found, start = [], 0
    for side, rows in zip(config.resolutions, config.rows, strict=True):
        level = table[start : start + rows]
        start += rows
        if config.form == "planes":
            found.append(planes(level, side, points))
        else:
            found.append(trilinear(config, level, side, points))
    return jnp.stack(found, axis=1)


def trilinear(config, level, side, points):
    place = points * (side - 1)
    cell = jnp.floor(place).astype(jnp.int32)
    total = 0.0
    for corner in itertools.product((0, 1), repeat=3):
        at = [cell[:, axis] + corner[axis] for axis in range(3)]
        if len(level) == side**3:
            row = (at[0] * side + at[1]) * side + at[2]
        else:
            mixed = np.uint32(0)
            for value, prime in zip(at, PRIMES, strict=True):
                mixed = mixed ^ (value.astype(jnp.uint32) * np.uint32(prime))
            row = mixed % np.uint32(config.hashed)
        part = place - cell
        weights = [part[:, k] if corner[k] else 1.0 - part[:, k] for k in range(3)]
        total = total + (weights[0] * weights[1] * weights[2])[:, None] * level[row]
    return total


def planes(level, side, points):
    total = 0.0
    for plane, (a, b) in zip(
        level.reshape(3, side * side, -1), ((0, 1), (1, 2), (2, 0)), strict=True
    ):
        place = points * (side - 1)
        cell = jnp.floor(place).astype(jnp.int32)
        part = place - cell
        for i, j in itertools.product((0, 1), repeat=2):
            row = (cell[:, a] + i) * side + cell[:, b] + j
            weight = (part[:, a] if i else 1.0 - part[:, a]) * (
                part[:, b] if j else 1.0 - part[:, b]
            )
            total = total + weight[:, None] * plane[row]
    return total


def jacobian(config, table, points):
    """Derivatives [n, l, f, 3] of the features by the points, by JAX."""

    def one(point):
        return encode(config, table, point[None])[0]

    return jax.vmap(jax.jacfwd(one))(points)
