"""Posed frames as a fit of a field takes them, and which of their pixels a step looks at.

Axes: v view, h w image, r ray, m all pixels of all views.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Key, UInt8

from v3d_jax.errors import UserError
from v3d_jax.ops import camera

Images = Float[Array, "v h w 3"] | UInt8[Array, "v h w 3"]
Alpha = Float[Array, "v h w"] | UInt8[Array, "v h w"] | Bool[Array, "v h w"]
Background = Literal["white", "black", "random"]

_SHOWN = 0.5  # alpha from which a pixel is object
_MARGIN = 1 / 32  # of the frames' width: how far around the object rays are preferred
_LARGEST = 2**31 - 1


class Targets(NamedTuple):
    """Posed frames; `with_pixels` adds the last two."""

    images: Images  # straight colours; [0, 1] or 8 bits
    alpha: Alpha | None  # None: no masks, every ray is one of the object
    cameras: camera.Camera
    normals: Float[Array, "v h w 3"] | None = None  # estimates in the world's axes, 0: unknown
    pixels: Int32[Array, "m"] | None = None  # places of all pixels, those around the object first
    around: Int32[Array, ""] | None = None  # how many those are


class Seen(NamedTuple):
    """What frames show along some rays."""

    color: Float[Array, "r 3"]
    alpha: Float[Array, "r"]
    normal: Float[Array, "r 3"] | None


def check(targets: Targets) -> None:
    """Raises `UserError` for frames that no field can be fitted to; reads them, so on the host."""
    shape = targets.images.shape
    if np.prod(shape[:3], dtype=np.int64) > _LARGEST:
        raise UserError(f"{shape[0]} frames of {shape[2]} x {shape[1]} pixels: shrink them")
    if shape[0] < 2:
        raise UserError("a surface needs frames from different sides: one shows no depth")
    finite = bool(jnp.isfinite(targets.images).all())
    if targets.alpha is not None:
        finite = finite and bool(jnp.isfinite(targets.alpha).all())
        if finite and not bool((_unit(targets.alpha) >= _SHOWN).any()):
            raise UserError("the frames' masks are empty: there is no object to make a mesh of")
    if not finite:
        raise UserError("the frames hold values that are not numbers: check how they were made")


def with_pixels(targets: Targets) -> Targets:
    """Targets with their pixels in the order that rays are drawn from, once for the whole fit."""
    count = targets.images.shape[0] * targets.images.shape[1] * targets.images.shape[2]
    if targets.alpha is None:
        everything = jnp.arange(count, dtype=jnp.int32)
        return targets._replace(pixels=everything, around=jnp.asarray(count, jnp.int32))
    reach = 2 * round(_MARGIN * targets.images.shape[2]) + 1

    def grown(alpha: Array) -> Array:
        shown = (_unit(alpha) >= _SHOWN).astype(jnp.float32)
        for window in ((reach, 1), (1, reach)):
            shown = lax.reduce_window(shown, -jnp.inf, lax.max, window, (1, 1), "SAME")
        return shown > 0

    near = lax.map(grown, targets.alpha).reshape(-1)
    # Each pixel's place: after those of its kind before it, those around the object in front.
    among = jnp.cumsum(near.astype(jnp.int32))
    index = jnp.arange(count, dtype=jnp.int32)
    place = jnp.where(near, among - 1, among[-1] + index - among)
    pixels = jnp.zeros(count, jnp.int32).at[place].set(index, unique_indices=True)
    return targets._replace(pixels=pixels, around=among[-1])


def draw(
    key: Key[Array, ""], targets: Targets, count: int, share: float
) -> tuple[Int32[Array, "r"], Float[Array, "r 2"]]:
    """Views and pixel centres (x, y) of random rays, a `share` of them around the object."""
    assert targets.pixels is not None
    assert targets.around is not None
    near_key, far_key = jax.random.split(key)
    near = round(share * count)
    total = len(targets.pixels)
    around = jnp.where(targets.around > 0, targets.around, total)
    places = [
        jax.random.randint(near_key, (near,), 0, around),
        jax.random.randint(far_key, (count - near,), 0, total),
    ]
    return _centres(targets, targets.pixels[jnp.concatenate(places)])


def draw_patch(
    key: Key[Array, ""], targets: Targets, side: int
) -> tuple[Int32[Array, "r"], Float[Array, "r 2"]]:
    """Views and pixel centres of a square around a random pixel of the object, row by row."""
    height, width = targets.images.shape[1:3]
    view, middle = draw(key, targets, 1, 1.0)
    column = jnp.clip(middle[0, 0] - 0.5 * side, 0.0, width - side) // 1.0
    row = jnp.clip(middle[0, 1] - 0.5 * side, 0.0, height - side) // 1.0
    y, x = jnp.meshgrid(jnp.arange(side) + row, jnp.arange(side) + column, indexing="ij")
    pixels = jnp.stack([x, y], axis=-1).reshape(-1, 2) + 0.5
    return jnp.broadcast_to(view, (side * side,)), pixels


def look(
    targets: Targets,
    view: Int32[Array, "r"],
    pixels: Float[Array, "r 2"],
    background: Float[Array, "3"],
) -> Seen:
    """What frames show at pixel centres, composited on a background."""
    row, column = pixels[:, 1].astype(jnp.int32), pixels[:, 0].astype(jnp.int32)
    color = _unit(targets.images[view, row, column])
    normal = None if targets.normals is None else targets.normals[view, row, column]
    if targets.alpha is None:
        return Seen(color, jnp.ones(len(view)), normal)
    alpha = _unit(targets.alpha[view, row, column])
    color = color * alpha[:, None] + (1.0 - alpha)[:, None] * background[None]
    return Seen(color, alpha, normal)


def _centres(
    targets: Targets, pixels: Int32[Array, "r"]
) -> tuple[Int32[Array, "r"], Float[Array, "r 2"]]:
    height, width = targets.images.shape[1:3]
    place = pixels % (height * width)
    x, y = place % width, place // width
    return pixels // (height * width), jnp.stack([x, y], axis=-1) + 0.5


def _unit(values: Array) -> Array:
    """8-bit values to [0, 1], booleans to 0 and 1; float32."""
    scale = 255.0 if values.dtype == jnp.uint8 else 1.0
    return values.astype(jnp.float32) / scale
