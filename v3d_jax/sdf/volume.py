"""A solid given as distances on a grid, such as a carved hull, as a field's beginning.

Axes: n voxels a side, indexed x y z; p point. World units.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from v3d_jax.sdf.field import FieldConfig

_NEAR = 1.5  # voxels from the surface within which a volume's own distances are kept


class Volume(NamedTuple):
    """Distances to a solid's surface, positive inside (as `splat.carve.Hull`'s); outside negative.

    Voxel (i, j, k) is centred at corner + voxel (i + 1/2, ...). Only values within two voxels of
    the surface need to be distances; of the others the sign counts.
    """

    distance: Float[Array, "n n n"]
    corner: Float[Array, "3"]
    voxel: Float[Array, ""]  # edge length


def signed_distance(volume: Volume) -> Float[Array, "n n n"]:
    """Euclidean distances to the solid everywhere, negative inside."""
    inside = volume.distance >= 0.0
    # Between centres; the surface is half a voxel before the nearest one beyond it.
    far = (_distance_to(inside) - _distance_to(~inside)) * volume.voxel
    far = far - 0.5 * volume.voxel * jnp.sign(far)
    near = jnp.abs(far) < _NEAR * volume.voxel
    return jnp.where(near, -volume.distance, far)


def sample(
    volume: Volume, distances: Float[Array, "n n n"], points: Float[Array, "p 3"]
) -> Float[Array, "p"]:
    """`distances` between voxels' centres; beyond the grid its border's plus the way there."""
    side = distances.shape[0]
    place = (points - volume.corner[None]) / volume.voxel - 0.5
    held = jnp.clip(place, 0.0, side - 1.0)
    cell = jnp.clip(jnp.floor(held).astype(jnp.int32), 0, side - 2)
    part = held - cell
    total = jnp.zeros(points.shape[0])
    for corner in range(8):
        bits = [corner >> axis & 1 for axis in range(3)]
        index = [cell[:, axis] + bit for axis, bit in enumerate(bits)]
        weight = jnp.ones(points.shape[0])
        for axis, bit in enumerate(bits):
            weight = weight * (part[:, axis] if bit else 1.0 - part[:, axis])
        total = total + weight * distances[index[0], index[1], index[2]]
    beyond = jnp.sqrt(jnp.sum(jnp.square(place - held), axis=1))
    return total + beyond * volume.voxel


def usable(config: FieldConfig, volume: Volume) -> Bool[Array, ""]:
    """Whether the volume holds something, and ends inside the field's box."""
    inside = volume.distance >= 0.0
    side = volume.distance.shape[0]
    steps = (jnp.arange(side) + 0.5) * volume.voxel
    fits = jnp.asarray(True)
    for axis in range(3):
        there = inside.any(axis=tuple({0, 1, 2} - {axis}))
        place = jnp.abs(volume.corner[axis] + steps)
        fits = fits & (jnp.where(there, place, 0.0).max() < config.radius)
    return inside.any() & ~inside.all() & fits


def _distance_to(seeds: Bool[Array, "n n n"]) -> Float[Array, "n n n"]:
    """Distance in voxels to the nearest seed: the least over an axis at a time (exact)."""
    side = seeds.shape[0]
    far = 3.0 * side**2
    squares = jnp.where(seeds, 0.0, far)
    for axis in range(3):
        padding = [(0, 0)] * 3
        padding[axis] = (side, side)
        padded = jnp.pad(squares, padding, constant_values=far)

        def nearer(step: Array, best: Array, axis: int = axis, padded: Array = padded) -> Array:
            moved = lax.dynamic_slice_in_dim(padded, step, side, axis=axis)
            return jnp.minimum(best, moved + jnp.square((step - side).astype(jnp.float32)))

        squares = lax.fori_loop(0, 2 * side + 1, nearer, squares)
    return jnp.sqrt(squares)
