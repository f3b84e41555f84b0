"""Where the rays of samples meet their faces: depth and perspective-correct weights.

Axes: i view, f face. What is read of a face lies in one flat row of numbers: one place in memory.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from v3d_jax.mesh.rasterize import RasterConfig
from v3d_jax.mesh.surface import Mesh
from v3d_jax.ops import camera as cameras
from v3d_jax.ops.camera import Camera

_HIGHEST = lax.Precision.HIGHEST


class Faces(NamedTuple):
    """What shading reads of a face, one flat row of _ROW numbers each: one place in memory."""

    rows: Float[Array, "n"]
    texture: Int32[Array, "f"]  # -1: none


class Hit(NamedTuple):
    """Where rays meet their faces, one array a component."""

    weights: tuple[Array, Array, Array]  # perspective-correct barycentrics
    depth: Array
    det: Array  # -ray . (e1 x e2): positive on the side from which corners run counter-clockwise


# First column of each part of a row of Faces.
_CORNER, _SIDE1, _SIDE2, NORMALS, UV, COLOR, ALPHA, _CUTOFF, TEXELS, _ROW = (
    *(0, 3, 6, 9, 18, 24, 27, 28, 29),
    30,
)


def face_rows(mesh: Mesh) -> Faces:
    """Per face: corner and sides, corner normals on the side of the winding, uv, material.

    Turning each corner normal to the side from which the corners run counter-clockwise lets the
    sample know by the sign of one determinant whether to turn the normal towards the viewer,
    however the file's normals or its winding point.
    """
    corners = mesh.vertices[mesh.faces]
    one, two = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    side = jnp.sum(mesh.normals * jnp.cross(one, two)[:, None], axis=-1, keepdims=True)
    normals = jnp.where(side < 0, -mesh.normals, mesh.normals)
    turn = mesh.uv[:, 1:] - mesh.uv[:, :1]
    area = jnp.abs(turn[:, 0, 0] * turn[:, 1, 1] - turn[:, 0, 1] * turn[:, 1, 0])
    cutoff = mesh.alpha_cutoff[mesh.material][:, None]
    parts = [
        *(corners[:, 0], one, two, normals.reshape(-1, 9), mesh.uv.reshape(-1, 6)),
        *(mesh.base_color[mesh.material], cutoff, area[:, None] * mesh.atlas.shape[1] ** 2),
    ]
    return Faces(jnp.concatenate(parts, axis=1).reshape(-1), mesh.texture[mesh.material])


def read(faces: Faces, face: Array, first: int, count: int) -> list[Array]:
    """`count` numbers of each face from column `first` on, one array each."""
    place = face * _ROW + first
    return [faces.rows.at[place + k].get(mode="promise_in_bounds") for k in range(count)]


def intersect(
    faces: Faces,
    camera: Camera,
    config: RasterConfig,
    view: Array,
    face: Array,
    column: Array,
    row: Array,
) -> Hit:
    """Ray and triangle after Moeller and Trumbore (1997): depth and perspective-correct weights.

    Rays have camera z = 1, so that the distance along them is depth. Weights are clamped to the
    triangle: a sample that the z-buffer gave to a sliver may round outside it here.
    """
    turn = jnp.einsum(
        "iab,iac->ibc",
        camera.world_to_camera[:, :3, :3],
        jnp.linalg.inv(camera.intrinsics),
        precision=_HIGHEST,
    )[view]
    x = (column.astype(jnp.float32) + 0.5) / config.supersample
    y = (row.astype(jnp.float32) + 0.5) / config.supersample
    ray = [turn[..., k, 0] * x + turn[..., k, 1] * y + turn[..., k, 2] for k in range(3)]
    origin = cameras.position(camera)[view]
    corner, one, two = (read(faces, face, k, 3) for k in (_CORNER, _SIDE1, _SIDE2))
    offset = [origin[..., k] - corner[k] for k in range(3)]
    p, q = _cross(ray, two), _cross(offset, one)
    det = dot(one, p)
    safe = jnp.where(det == 0, 1.0, det)
    first = jnp.clip(dot(offset, p) / safe, 0.0, 1.0)
    second = jnp.clip(dot(ray, q) / safe, 0.0, 1.0 - first)
    return Hit((1.0 - first - second, first, second), dot(two, q) / safe, det)


def _cross(a: list[Array], b: list[Array]) -> list[Array]:
    return [a[k - 2] * b[k - 1] - a[k - 1] * b[k - 2] for k in range(3)]


def dot(a: list[Array], b: list[Array]) -> Array:
    """Dot product of vectors given as three arrays each."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def interpolate(hit: Hit, corners: list[Array], width: int) -> list[Array]:
    """Values at the hit from three corners of `width` components each."""
    return [sum(hit.weights[m] * corners[m * width + k] for m in range(3)) for k in range(width)]
