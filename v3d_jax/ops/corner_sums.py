"""What points have for the four cells around them, added up: the transpose of bilinear look-ups.

Axes: `n` map, `m` point, `h w` cells, `c` channel. Sums are float32. Every cell gets what thousands
of points have for it: as a scatter, that is as many additions to few addresses, which may have to
wait for each other (docs/kernels.md has what was measured). The points' weights for the cells are a
matrix, and a product of matrices adds up as well; most of it is 0, so points near each other should
be neighbours, as the samples of a ray are.

`fused` is a Pallas (Triton) kernel that multiplies only rows of cells which some of the points at
hand reach, and keeps the weights in registers; `products` multiplies all, from memory; `scatter`,
which leaves out points that are not seen, is for devices without matrix units and for float32.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from v3d_jax.ops import rays, target

Places = Float[Array, "n m 2"]
Values = Float[Array, "n m c"]
Seen = Bool[Array, "n m"]
Sums = Float[Array, "n h w c"]

# Of one program: cells, channels, and the points that it goes through, so many at a time.
_ROWS, _COLUMNS, _CHANNELS = 8, 32, 32
_POINTS, _STEP = 4096, 64


def add(size: tuple[int, int], pixels: Places, values: Values, seen: Seen) -> Sums:
    """Sums for the cells of maps of `size` (height, width), in float32.

    `pixels` are (x, y) in cells, centres at half-integers; beyond the outermost centres the nearest
    cells get all. Values of points that are not `seen` must be 0. The implementation is chosen by
    shape and platform (`v3d_jax.ops.target`) at trace time; in matrix units weights have the
    precision of `values`.
    """
    platform = target.platform()
    devices = math.prod(target.free_axes().values())
    if can_fuse(values, platform, devices):
        return fused(size, pixels, values, seen)
    if platform == "cpu" or (platform in target.GPUS and values.dtype == jnp.float32):
        return scatter(size, pixels, values, seen)
    return products(size, pixels, values)


def can_fuse(values: Any, platform: str, devices: int) -> bool:
    """Whether the kernel takes such values, which `devices` may share: XLA does not divide it."""
    fits = values.shape[-1] % _CHANNELS == 0 and values.dtype in (jnp.bfloat16, jnp.float16)
    return platform in target.GPUS and devices == 1 and fits and target.has_triton()


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
    across, down = (
        _weight(place[..., None], jnp.arange(length, dtype=jnp.float32)[None, None])
        for place, length in zip(rays.between_centres(size, pixels), size[::-1], strict=True)
    )
    weights = (down[..., :, None] * across[..., None, :]).astype(values.dtype)
    return jnp.einsum(
        "nmhw,nmc->nhwc", weights, values, preferred_element_type=jnp.float32, precision="highest"
    )


def fused(
    size: tuple[int, int], pixels: Places, values: Values, seen: Seen, interpret: bool = False
) -> Sums:
    """By the kernel; `interpret` runs it on any device, slowly."""
    from jax.experimental import pallas as pl

    n, m, c = values.shape
    rows, columns, groups = -(-size[0] // _ROWS), -(-size[1] // _COLUMNS), c // _CHANNELS
    border = ((0, 0), (0, -m % _POINTS))
    x, y, seen = (jnp.pad(each, border) for each in (*rays.between_centres(size, pixels), seen))
    values = jnp.pad(values, (*border, (0, 0)))
    parts = x.shape[1] // _POINTS
    # Between which places the points of a step are; of a step without any, between none.
    reach = [
        end(jnp.where(seen, place, none).reshape(n, -1, _STEP), axis=-1)
        for place in (x, y)
        for end, none in ((jnp.min, jnp.inf), (jnp.max, -jnp.inf))
    ]

    def tile(k: Any) -> tuple[Any, Any, Any]:
        return k // (columns * groups), k // groups % columns, k % groups

    points, bounds = (
        pl.BlockSpec((None, length), lambda i, j, k: (i, j))
        for length in (_POINTS, _POINTS // _STEP)
    )
    channels = pl.BlockSpec((None, _POINTS, _CHANNELS), lambda i, j, k: (i, j, k % groups))
    cells = pl.BlockSpec((None, None, _ROWS, _COLUMNS, _CHANNELS), lambda i, j, k: (j, i, *tile(k)))
    settings: dict[str, Any] = {"interpret": True}
    if not interpret:
        from jax.experimental.pallas import triton

        settings = {"compiler_params": triton.CompilerParams(num_warps=4, num_stages=1)}
    found = pl.pallas_call(
        functools.partial(_kernel, columns=columns, groups=groups),
        grid=(n, parts, rows * columns * groups),
        in_specs=[*[bounds] * 4, points, points, channels],
        out_specs=cells,
        out_shape=jax.ShapeDtypeStruct(
            (parts, n, rows * _ROWS, columns * _COLUMNS, c), jnp.float32
        ),
        **settings,
    )(*reach, x, y, values)
    return jnp.sum(found, axis=0)[:, : size[0], : size[1]]


def _kernel(
    left_ref: Any, right_ref: Any, top_ref: Any, bottom_ref: Any, x_ref: Any, y_ref: Any,
    values_ref: Any, out_ref: Any, *, columns: int, groups: int,
) -> None:  # fmt: skip
    """A tile of cells: the points' shares for a row of them are a product of matrices.

    Samples of a ray lie on a line: most steps have points in few rows, and for most tiles none.
    """
    from jax.experimental import pallas as pl

    tile = pl.program_id(2)
    top = (tile // (columns * groups) * _ROWS).astype(jnp.float32)
    left = (tile // groups % columns * _COLUMNS).astype(jnp.float32)
    column = left + jnp.arange(_COLUMNS).astype(jnp.float32)

    def step(i: Any, sums: list[Array]) -> list[Array]:
        highest, lowest = top_ref[i] - 1.0, bottom_ref[i] + 1.0
        across_tile = (left_ref[i] - 1.0 < left + _COLUMNS - 1) & (right_ref[i] + 1.0 > left)
        some = pl.ds(i * _STEP, _STEP)

        def shares(sums: list[Array]) -> list[Array]:
            x, y, values = x_ref[some], y_ref[some], values_ref[some, :]
            across = _weight(x[None, :], column[:, None])

            def one_row(row: int, total: Array) -> Array:
                weights = (across * _weight(y, top + row)[None, :]).astype(values.dtype)
                return total + jax.lax.dot(weights, values, preferred_element_type=jnp.float32)

            return [
                jax.lax.cond(
                    (highest < top + row) & (top + row < lowest),
                    functools.partial(one_row, row),
                    lambda total: total,
                    total,
                )
                for row, total in enumerate(sums)
            ]

        near = across_tile & (highest < top + _ROWS - 1) & (lowest > top)
        return jax.lax.cond(near, shares, lambda sums: sums, sums)

    nothing = jnp.zeros((_COLUMNS, _CHANNELS), jnp.float32)
    sums = jax.lax.fori_loop(0, _POINTS // _STEP, step, [nothing] * _ROWS)
    for row, total in enumerate(sums):
        out_ref[row] = total


def _weight(place: Array, centre: Array) -> Array:
    """1 at a centre, falling to 0 at the next."""
    return jnp.maximum(1.0 - jnp.abs(place - centre), 0.0)
