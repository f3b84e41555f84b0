"""What points have for the four cells around them, added up: the transpose of bilinear look-ups.

Axes: `n` map, `m` point, `h w` cells, `c` channel. Sums are float32. Every cell gets what thousands
of points have for it. `scatter` adds them one by one, without those of points that are not seen.
The points' weights for the cells are a matrix, most of it 0, and a product of matrices adds up as
well: `products`, for TPUs, where scatters of rows are slow.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from v3d_jax.ops import rays, target

Places = Float[Array, "n m 2"]
Values = Float[Array, "n m c"]
Seen = Bool[Array, "n m"]
Sums = Float[Array, "n h w c"]


def add(size: tuple[int, int], pixels: Places, values: Values, seen: Seen) -> Sums:
    """Sums for the cells of maps of `size` (height, width), in float32.

    `pixels` are (x, y) in cells, centres at half-integers; beyond the outermost centres the nearest
    cells get all. Values of points that are not `seen` must be 0. The implementation is chosen by
    platform (`v3d_jax.ops.target`) at trace time; in products weights have the precision of
    `values`.
    """
    if target.platform() == "tpu":
        return products(size, pixels, values)
    return scatter(size, pixels, values, seen)


def scatter(size: tuple[int, int], pixels: Places, values: Values, seen: Seen) -> Sums:
    """One addition a corner of a point that is seen."""
    cells, weights = rays.corners(size, pixels)
    # Nothing is added beyond the last cell: all that is not seen may lie at one place, and would
    # wait there to add zeros.
    index = jnp.concatenate([jnp.where(seen, cell, math.prod(size)) for cell in cells], axis=1)
    shares = [weight[..., None] * values.astype(jnp.float32) for weight in weights]

    def one_map(index: Array, shares: Array) -> Array:
        nothing = jnp.zeros((math.prod(size), shares.shape[-1]), jnp.float32)
        return nothing.at[index].add(shares, mode="drop")

    return jax.vmap(one_map)(index, jnp.concatenate(shares, axis=1)).reshape(
        values.shape[0], *size, values.shape[-1]
    )


def products(size: tuple[int, int], pixels: Places, values: Values) -> Sums:
    """The weights of all cells, most of them 0, times the values."""

    def along(place: Array, length: int) -> Array:
        """1 at a cell's centre, falling to 0 at the next."""
        centres = jnp.arange(length, dtype=jnp.float32)[None, None]
        return jnp.maximum(1.0 - jnp.abs(place[..., None] - centres), 0.0)

    places = rays.between_centres(size, pixels)
    across, down = along(places[0], size[1]), along(places[1], size[0])
    weights = (down[..., :, None] * across[..., None, :]).astype(values.dtype)
    return jnp.einsum(
        "nmhw,nmc->nhwc", weights, values, preferred_element_type=jnp.float32, precision="highest"
    )
