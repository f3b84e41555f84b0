"""Mean and deviation of what several feature maps hold at points that some of their views see.

Axes: `b` clip, `v` view, `i j` a view's feature map, `*m` points, `c` channel. Every point takes
four corners of every map, and between them and two moments only their features are kept, in the
type of the maps: written as sums over an array of views, every step writes v x m x c numbers for
the next to read. The gradient adds to a cell of a map what thousands of points have for it
(`corner_sums`), in float32: in 16 bits most of them would be lost against the sum of the first.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from v3d_jax.ops import corner_sums, rays

# Deviations below it have the slope of one of that size, times how much smaller they are.
FLAT = 1e-3

Maps = Float[Array, "b v i j c"]
Pixels = Float[Array, "b v *m 2"]
Seen = Bool[Array, "b v *m"]
Points = Float[Array, "b *m c"]


class Moments(NamedTuple):
    """In float32; the mean is 0 where no view sees a point, the deviation where fewer than two."""

    mean: Points
    deviation: Points  # unbiased


def moments(maps: Maps, wide: Maps, pixels: Pixels, seen: Seen) -> Moments:
    """Moments over the views that see a point, of features between the cells of their maps.

    `pixels` are (x, y) in cells, centres at half-integers; beyond the outermost centres their
    features hold. Features are read from `maps`, of any type, and their gradient flows to `wide`,
    which has the same values in float32. What views hold of points that they do not see may be
    anything, NaN included.
    """
    return _moments(jax.lax.stop_gradient(maps), wide, pixels, seen)


@jax.custom_vjp
def _moments(maps: Maps, wide: Maps, pixels: Pixels, seen: Seen) -> Moments:
    del wide
    return _combine(_look_up(maps, pixels, seen), seen)


def _save(maps: Maps, wide: Maps, pixels: Pixels, seen: Seen):
    del wide
    values = _look_up(maps, pixels, seen)
    return _combine(values, seen), (maps, pixels, seen, values)


def _pull_back(saved: tuple[Maps, Pixels, Seen, list[Points]], slopes: Moments):
    maps, pixels, seen, values = saved
    b, _, height, width, channels = maps.shape
    # Kept in the type of the maps, as what is looked up.
    d_values = jax.lax.optimization_barrier(_spread(slopes, values, seen, maps.dtype))
    d_maps, d_pixels = [], []
    for view, d_value in enumerate(d_values):
        places, shares = pixels[:, view].reshape(b, -1, 2), d_value.reshape(b, -1, channels)
        there = seen[:, view].reshape(b, -1)
        d_maps.append(corner_sums.add((height, width), places, shares, there))
        d_value = d_value.astype(jnp.float32)
        cells, _ = rays.corners((height, width), pixels[:, view])
        table = maps[:, view].reshape(b, height * width, channels)
        there = seen[:, view, ..., None]
        d_weights = [
            jnp.sum(d_value * jnp.where(there, _take(table, cell), 0.0), axis=-1) for cell in cells
        ]
        slope = functools.partial(_weights, (height, width))
        d_pixels.append(jax.vjp(slope, pixels[:, view])[1](d_weights)[0])
    return None, jnp.stack(d_maps, axis=1), jnp.stack(d_pixels, axis=1), None


_moments.defvjp(_save, _pull_back)


def _look_up(maps: Maps, pixels: Pixels, seen: Seen) -> list[Points]:
    """Every view's features at the points in the type of its map, 0 where it does not see them.

    Behind a barrier the compiler writes them so, once: else in float32, or it looks up anew for
    each number that is made of them.
    """
    b, views, height, width, channels = maps.shape
    found = []
    for view in range(views):
        cells, weights = rays.corners((height, width), pixels[:, view])
        table = maps[:, view].reshape(b, height * width, channels)
        value = sum(
            weight[..., None] * _take(table, cell)
            for cell, weight in zip(cells, weights, strict=True)
        )
        found.append(jnp.where(seen[:, view, ..., None], value, 0.0).astype(maps.dtype))
    return jax.lax.optimization_barrier(found)


def _combine(values: list[Points], seen: Seen) -> Moments:
    count = _count(seen)
    values = [value.astype(jnp.float32) for value in values]
    mean = sum(values) / jnp.maximum(count, 1.0)
    squares = [
        jnp.where(seen[:, view, ..., None], jnp.square(value - mean), 0.0)
        for view, value in enumerate(values)
    ]
    return Moments(mean, jnp.sqrt(sum(squares) / jnp.maximum(count - 1.0, 1.0)))


def _spread(slopes: Moments, values: list[Points], seen: Seen, dtype: Any) -> list[Points]:
    """The slopes of every view's features, from those of their moments."""
    mean, deviation = _combine(values, seen)
    count = _count(seen)
    to_all = slopes.mean / jnp.maximum(count, 1.0)
    # Where views differ by rounding alone the root's slope is as large as anywhere, and its sign is
    # that of the rounding: other devices would learn something else.
    scale = jnp.maximum(count - 1.0, 1.0) * jnp.maximum(deviation, FLAT)
    to_far = slopes.deviation / scale
    return [
        jnp.where(seen[:, view, ..., None], to_all + to_far * (value - mean), 0.0).astype(dtype)
        for view, value in enumerate(values)
    ]


def _count(seen: Seen) -> Float[Array, "b *m 1"]:
    return sum(seen[:, view, ..., None].astype(jnp.float32) for view in range(seen.shape[1]))


def _weights(size: tuple[int, int], pixels: Float[Array, "b *m 2"]) -> list[Float[Array, "b *m"]]:
    return rays.corners(size, pixels)[1]


@jax.vmap
def _take(table: Float[Array, "n c"], cells: Array) -> Float[Array, "*m c"]:
    return table.at[cells].get(mode="promise_in_bounds").astype(jnp.float32)
