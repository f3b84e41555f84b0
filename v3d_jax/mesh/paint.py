"""Colours of places on a surface out of the views that see them best.

Axes: v view, h w image, s places (texels or vertices). A view counts with the fourth power of the
cosine between its ray and the normal there, unless something stands before the place, or the
picture is not all surface around it: at an outline frames mix in their background.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, UInt8

from v3d_jax.mesh.operator import GRAZING, Sight
from v3d_jax.mesh.rasterize import RasterConfig
from v3d_jax.ops import camera as cameras
from v3d_jax.ops.camera import Camera

_POWER = 4
_LEAST = GRAZING**_POWER


@partial(jax.jit, static_argnums=6)
def project(
    sight: Sight,
    points: Float[Array, "s 3"],
    normals: Float[Array, "s 3"],
    lenses: Camera,
    images: Float[Array, "v h w 3"] | UInt8[Array, "v h w 3"],
    inside: Bool[Array, "v h w"],
    config: RasterConfig,
) -> tuple[Float[Array, "s 3"], Bool[Array, "s"]]:
    """Weighted means of the views' colours, and which places any of them sees.

    `inside` says where a frame shows the object.
    """

    def add(total: Array, view: Array) -> tuple[Array, None]:
        lens = jax.tree.map(lambda leaf: leaf[view], lenses)
        pixel, depth = cameras.project(lens, points)
        weight = _cosine(points, normals, lens) ** _POWER
        weight = weight * _unhidden(pixel, depth, weight, sight.inverse_depth[view], lens, config)
        whole = _eroded(inside[view] & _covered(sight.face[view], config))
        scale = 255.0 if images.dtype == jnp.uint8 else 1.0
        color = images[view].astype(jnp.float32) / scale
        planes = jnp.concatenate([color, whole[..., None].astype(jnp.float32)], axis=-1)
        found = _bilinear(planes, pixel)
        weight = jnp.where(found[:, 3] > 0.999, weight, 0.0)
        color = jnp.concatenate([found[:, :3], jnp.ones_like(weight)[:, None]], axis=-1)
        return total + weight[:, None] * color, None

    empty = jnp.zeros((len(points), 4))
    total = lax.scan(add, empty, jnp.arange(len(images)))[0]
    return total[:, :3] / jnp.maximum(total[:, 3:], 1e-12), total[:, 3] > _LEAST


def _cosine(points: Array, normals: Array, lens: Camera) -> Float[Array, "s"]:
    ray = cameras.position(lens)[None] - points
    cosine = jnp.sum(ray * normals, axis=1) / jnp.maximum(jnp.linalg.norm(ray, axis=1), 1e-9)
    return jnp.where(cosine > GRAZING, cosine, 0.0)


def _unhidden(
    pixel: Array,
    depth: Array,
    weight: Array,
    inverse_depth: Float[Array, "hs ws"],
    lens: Camera,
    config: RasterConfig,
) -> Bool[Array, "s"]:
    """Whether nothing is nearer than the surface may be within a sample, by its slope."""
    height, width = inverse_depth.shape
    place = jnp.nan_to_num(pixel) * config.supersample
    column = jnp.clip(jnp.floor(place[:, 0]), 0, width - 1).astype(jnp.int32)
    row = jnp.clip(jnp.floor(place[:, 1]), 0, height - 1).astype(jnp.int32)
    sample = depth / (lens.intrinsics[0, 0] * config.supersample)
    cosine = jnp.maximum(weight, _LEAST) ** (1.0 / _POWER)
    slack = sample * (1.0 + 1.0 / cosine)
    return (depth > config.near) & ((depth - slack) * inverse_depth[row, column] < 1.0)


def _covered(face: Array, config: RasterConfig) -> Bool[Array, "h w"]:
    size = config.supersample
    return (face >= 0).reshape(config.height, size, config.width, size).all(axis=(1, 3))


def _eroded(mask: Bool[Array, "h w"]) -> Bool[Array, "h w"]:
    return ~lax.reduce_window(~mask, False, lax.bitwise_or, (3, 3), (1, 1), "SAME")


def _bilinear(planes: Float[Array, "h w c"], pixel: Float[Array, "s 2"]) -> Float[Array, "s c"]:
    """Between pixel centres; 0 beyond the border."""
    height, width = planes.shape[:2]
    x, y = (jnp.nan_to_num(pixel[:, k]) - 0.5 for k in range(2))
    left, top = jnp.floor(x), jnp.floor(y)
    total = jnp.zeros((len(pixel), planes.shape[2]))
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        weight = (1.0 - jnp.abs(x - left - dx)) * (1.0 - jnp.abs(y - top - dy))
        column, row = left + dx, top + dy
        there = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        column = jnp.clip(column, 0, width - 1).astype(jnp.int32)
        row = jnp.clip(row, 0, height - 1).astype(jnp.int32)
        total = total + jnp.where(there, weight, 0.0)[:, None] * planes[row, column]
    return total
