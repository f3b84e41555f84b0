"""Features of points on grids of several resolutions, with derivatives, from a single gather.

A level is a cubic grid of feature rows over [0, 1]^3, interpolated trilinearly. `encode` returns
the features and their Jacobian from the same eight rows, so losses on an SDF's gradient see the
Jacobian as an ordinary output, and nothing differentiates the lookup twice: the table's gradient
is one scatter of w g_features + dw g_jacobian.

Levels are dense (a row a vertex, no collisions) up to a size, beyond it hashed as in instant-ngp
(arXiv 2201.05989 eq. 4). The form "planes" keeps three planes a level instead (xy, yz, zx; their
bilinear features add up) and interpolates by matrix products, for TPUs, where gathers of narrow
rows are slow: no gather and no scatter, but another, smaller space of functions.

Axes: n point, l level, f feature; 2 2 2 the corners of a cell along x y z.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key

_PRIMES = np.array([1, 2654435761, 805459861], np.uint32)
_HIGHEST = lax.Precision.HIGHEST
_INITIAL = 1e-4  # features start within this of 0
_PLANES = ((0, 1), (1, 2), (2, 0))


@dataclass(frozen=True)
class GridConfig:
    """Sizes of a grid; the defaults are the six of V3D's ten levels that its 3,000 steps train."""

    form: Literal["grid", "planes"] = "grid"
    levels: int = 6
    features: int = 2  # a level
    base: int = 32  # vertices along a side of the first level
    growth: float = 1.3195079107728942  # from one level to the next
    dense: int = 1 << 21  # vertices up to which a level is dense
    hashed: int = 1 << 19  # rows of a hashed level, a power of two
    chunk: int = 4096  # points that matrix products of planes take at a time

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Vertices along a side of every level."""
        return tuple(round(self.base * self.growth**level) for level in range(self.levels))

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of the table that every level takes."""
        if self.form == "planes":
            return tuple(3 * side**2 for side in self.resolutions)
        return tuple(side**3 if side**3 <= self.dense else self.hashed for side in self.resolutions)


def initial(config: GridConfig, key: Key[Array, ""]) -> Float[Array, "rows f"]:
    """A table of features near 0, as instant-ngp starts it."""
    shape = (sum(config.rows), config.features)
    return jax.random.uniform(key, shape, minval=-_INITIAL, maxval=_INITIAL)


def encode(
    config: GridConfig, table: Float[Array, "rows f"], points: Float[Array, "n 3"]
) -> tuple[Float[Array, "n l f"], Float[Array, "n l f 3"]]:
    """Features of points in [0, 1]^3 and their derivatives by the points' coordinates.

    Points outside count as the nearest inside, with the Jacobian of that one's cell. Differentiable
    by the table only: points are constants.
    """
    points = lax.stop_gradient(points)
    if config.form == "planes":
        return _encode_planes(config, table, points)
    return _encode_grid(config, table, points)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _encode_grid(config: GridConfig, table: Array, points: Array) -> tuple[Array, Array]:
    return _forward(config, table, points)[0]


def _forward(config: GridConfig, table: Array, points: Array) -> tuple[Any, Any]:
    rows, within = _locate(config, points)
    corners = table.at[rows].get(mode="promise_in_bounds")
    return _interpolate(config, within, corners), (table, points)


def _backward(config: GridConfig, kept: tuple[Array, Array], given: Any) -> tuple[Array, Array]:
    table, points = kept
    rows, within = _locate(config, points)
    corners = jax.ShapeDtypeStruct((*rows.shape, config.features), table.dtype)
    spread = functools.partial(_interpolate, config, within)
    (gradient,) = jax.linear_transpose(spread, corners)(given)
    total = jnp.zeros_like(table).at[rows].add(gradient, mode="promise_in_bounds")
    return total, jnp.zeros_like(points)


_encode_grid.defvjp(_forward, _backward)


def _locate(
    config: GridConfig, points: Float[Array, "n 3"]
) -> tuple[Int[Array, "n l 2 2 2"], Float[Array, "n l 3"]]:
    """Rows of the corners of every point's cells, and its position inside them, 0 to 1."""
    side = np.asarray(config.resolutions, np.int32)
    offset = np.cumsum([0, *config.rows[:-1]]).astype(np.int32)
    scaled = jnp.clip(points, 0.0, 1.0)[:, None] * jnp.asarray(side - 1, jnp.float32)[None, :, None]
    cell = jnp.clip(jnp.floor(scaled).astype(jnp.int32), 0, (side - 2)[None, :, None])
    # [n, l, 2] along each axis; then one row for each of the corners.
    ends = [jnp.stack([cell[..., axis], cell[..., axis] + 1], axis=-1) for axis in range(3)]
    stride = side[None, :, None]
    dense = _outer(jnp.add, ends[0] * stride**2, ends[1] * stride, ends[2])
    isdense = np.asarray(config.rows) == side.astype(np.int64) ** 3
    if isdense.all():
        rows = dense
    else:
        terms = [end.astype(jnp.uint32) * prime for end, prime in zip(ends, _PRIMES, strict=True)]
        hashed = _outer(jnp.bitwise_xor, *terms) & np.uint32(config.hashed - 1)
        rows = jnp.where(isdense[None, :, None, None, None], dense, hashed.astype(jnp.int32))
    return rows + offset[None, :, None, None, None], scaled - cell


def _outer(combine: Any, x: Array, y: Array, z: Array) -> Array:
    """Combines the values of two ends along three axes for all eight corners."""
    x, y, z = x[..., :, None, None], y[..., None, :, None], z[..., None, None, :]
    return combine(combine(x, y), z)


def _interpolate(
    config: GridConfig, within: Float[Array, "n l 3"], corners: Float[Array, "n l 2 2 2 f"]
) -> tuple[Float[Array, "n l f"], Float[Array, "n l f 3"]]:
    """Trilinear interpolation and its derivatives, linear in `corners`: an axis at a time."""
    scale = jnp.asarray(config.resolutions, jnp.float32)[None, :, None] - 1.0
    x, y, z = (within[..., axis][..., None] for axis in range(3))

    def along(values: Array, part: Array) -> tuple[Array, Array]:
        """Value and difference along the last of the corners' axes."""
        low, high = values[..., 0, :], values[..., 1, :]
        rise = high - low
        part = part.reshape(*part.shape[:2], *(1,) * (rise.ndim - 2))
        return low + part * rise, rise

    plane, by_z = along(corners, z)
    line, by_y = along(plane, y)
    value, by_x = along(line, x)
    by_y = along(by_y, x)[0]
    by_z = along(along(by_z, y)[0], x)[0]
    return value, jnp.stack([by_x * scale, by_y * scale, by_z * scale], axis=-1)


def _encode_planes(config: GridConfig, table: Array, points: Array) -> tuple[Array, Array]:
    """Some points at a time: the products' intermediate has a row of vertices for every point."""
    count = points.shape[0]
    chunk = min(config.chunk, count)
    chunks = -(-count // chunk)
    padded = jnp.pad(jnp.clip(points, 0.0, 1.0), ((0, chunks * chunk - count), (0, 0)))
    # Kept for the backward pass would be all of them.
    part = jax.checkpoint(functools.partial(_plane_products, config, table))
    value, jacobian = lax.map(part, padded.reshape(chunks, chunk, 3))
    return (
        value.reshape(-1, *value.shape[2:])[:count],
        jacobian.reshape(-1, *jacobian.shape[2:])[:count],
    )


def _plane_products(
    config: GridConfig, table: Float[Array, "rows f"], points: Float[Array, "n 3"]
) -> tuple[Float[Array, "n l f"], Float[Array, "n l f 3"]]:
    values, jacobians, start = [], [], 0
    for side in config.resolutions:
        planes = table[start : start + 3 * side**2].reshape(3, side, side, config.features)
        start += 3 * side**2
        hats = [_hats(points[:, axis], side) for axis in range(3)]
        value, slopes = jnp.zeros(()), [jnp.zeros(())] * 3
        for plane, (a, b) in zip(planes, _PLANES, strict=True):
            (at_a, by_a), (at_b, by_b) = hats[a], hats[b]
            row = jnp.einsum("ni,ijf->njf", at_a, plane, precision=_HIGHEST)
            rise = jnp.einsum("ni,ijf->njf", by_a, plane, precision=_HIGHEST)
            value = value + jnp.sum(at_b[..., None] * row, axis=1)
            slopes[a] = slopes[a] + jnp.sum(at_b[..., None] * rise, axis=1)
            slopes[b] = slopes[b] + jnp.sum(by_b[..., None] * row, axis=1)
        values.append(value)
        jacobians.append(jnp.stack(slopes, axis=-1))
    return jnp.stack(values, axis=1), jnp.stack(jacobians, axis=1)


def _hats(coordinate: Float[Array, "n"], side: int) -> tuple[Array, Array]:
    """Weights of a level's vertices along an axis, and their derivatives: [n, side], banded."""
    scaled = coordinate[:, None] * (side - 1.0)
    vertex = jnp.arange(side)[None]
    cell = jnp.clip(jnp.floor(scaled), 0, side - 2).astype(jnp.int32)
    weights = jnp.maximum(0.0, 1.0 - jnp.abs(scaled - vertex))
    slope = (vertex == cell + 1).astype(jnp.float32) - (vertex == cell).astype(jnp.float32)
    return weights, slope * (side - 1.0)
