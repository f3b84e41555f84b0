"""Where a field's surface may be: its distance as last seen at the centres of a grid's cells.

Not a bit or an opacity, whose meaning would change with the field's sharpness: rays compare the
stored distance with the band that is visible at the moment (`render.march`), so one evaluation
serves while the band narrows.

Axes: n cells a side, indexed x y z. World units.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32

from v3d_jax.sdf import field
from v3d_jax.sdf.field import Field, FieldConfig, Level

PARTS = 4  # of a grid: every fourth cell along z


def cell_centres(config: FieldConfig, side: int, cells: Int[Array, "m"]) -> Float[Array, "m 3"]:
    """Centres of cells, by their place in C order."""
    index = jnp.stack([cells // side**2, cells // side % side, cells % side], axis=-1)
    return (2.0 * (index + 0.5) / side - 1.0) * config.radius


def initial(
    config: FieldConfig, params: Field, side: int, level: Level = None
) -> Float[Array, "n n n"]:
    """The distances of all cells; `side` must be a multiple of `PARTS`."""
    return refresh(config, params, jnp.zeros((side, side, side)), 0, PARTS, level)


def refresh(
    config: FieldConfig,
    params: Field,
    values: Float[Array, "n n n"],
    first: Int32[Array, ""] | int,
    count: Int32[Array, ""] | int,
    level: Level = None,
) -> Float[Array, "n n n"]:
    """The grid with `count` of its parts evaluated anew, beginning with part `first`."""
    side = values.shape[0]
    cells = jnp.arange(side**3 // PARTS) * PARTS

    def one(part: Array, values: Array) -> Array:
        part = part % PARTS
        found = field.sdf(config, params, cell_centres(config, side, cells + part), level)
        return lax.dynamic_update_index_in_dim(values, found, part, axis=1)

    flat = values.reshape(-1, PARTS)
    first = jnp.asarray(first, jnp.int32)
    return lax.fori_loop(first, first + count, one, flat).reshape(values.shape)


def crosses(values: Float[Array, "n n n"]) -> Bool[Array, ""]:
    """Whether there is a surface: a cell inside and one outside."""
    return (values.min() < 0) & (values.max() > 0)
