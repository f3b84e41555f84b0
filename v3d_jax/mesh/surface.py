"""Textured triangle meshes as arrays, and the padding that gives several of them one shape.

v vertices, f faces, m materials, n textures of s x s texels. World units (data.objects scales a
mesh into the unit sphere), z up. Colours are sRGB as displayed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from v3d_jax.ops import binning

TEXTURE_SIZES = (64, 128, 256)


class Mesh(NamedTuple):
    """One mesh, or a stack of padded meshes with one leading axis; numpy or jax arrays.

    A face whose three indices are equal is padding (and draws nothing, as any face without
    area). Texture row 0 is the top of the image, which is v = 1. A texel's alpha below
    `alpha_cutoff` is a hole (foliage); a cutoff of 0 means no holes: the texel's alpha then
    multiplies `base_color`'s alpha, which is see-through material (glass). Opaque material has
    alpha 1 in `base_color` and 255 in the texture.
    """

    vertices: Float[Array, "*b v 3"]
    faces: Int[Array, "*b f 3"]
    normals: Float[Array, "*b f 3 3"]  # per corner, unit, outward where that is known
    uv: Float[Array, "*b f 3 2"]  # per corner, v up, wraps around
    material: Int[Array, "*b f"]
    base_color: Float[Array, "*b m 4"]  # RGBA in [0, 1], multiplies the texture
    texture: Int[Array, "*b m"]  # row of `atlas`, -1 for none
    alpha_cutoff: Float[Array, "*b m"]  # in [0, 1]
    atlas: UInt8[Array, "*b n s s 4"]  # RGBA; s is one of TEXTURE_SIZES; n may be 0


def flat_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Unit face normals for every corner [f,3,3]; (0, 0, 1) for a face without area."""
    a, b, c = (np.asarray(vertices, np.float64)[faces[:, k]] for k in range(3))
    normal = np.cross(b - a, c - a)
    length = np.linalg.norm(normal, axis=-1, keepdims=True)
    normal = np.where(length > 0, normal / np.where(length > 0, length, 1.0), [0.0, 0.0, 1.0])
    return np.repeat(normal[:, None].astype(np.float32), 3, axis=1)


def from_geometry(
    vertices: np.ndarray,
    faces: np.ndarray,
    *,
    color: Sequence[float] = (0.7, 0.7, 0.7, 1.0),
    normals: np.ndarray | None = None,
) -> Mesh:
    """An untextured mesh of one material, flat-shaded unless corner normals are given."""
    faces = np.asarray(faces, np.int32).reshape(-1, 3)
    vertices = np.asarray(vertices, np.float32).reshape(-1, 3)
    return Mesh(
        vertices=vertices,
        faces=faces,
        normals=flat_normals(vertices, faces) if normals is None else np.float32(normals),
        uv=np.zeros((len(faces), 3, 2), np.float32),
        material=np.zeros(len(faces), np.int32),
        base_color=np.asarray([color], np.float32),
        texture=np.full(1, -1, np.int32),
        alpha_cutoff=np.zeros(1, np.float32),
        atlas=np.zeros((0, TEXTURE_SIZES[0], TEXTURE_SIZES[0], 4), np.uint8),
    )


def merged(meshes: Sequence[Mesh]) -> Mesh:
    """Several meshes where they are, as one; textures grow to the largest by repeating texels."""
    size = max([m.atlas.shape[-2] for m in meshes if len(m.atlas)], default=TEXTURE_SIZES[0])
    meshes = [grown(mesh, size) for mesh in meshes]
    corners, materials, textures = (
        np.cumsum([0, *(len(field) for field in fields)])
        for fields in (
            [m.vertices for m in meshes],
            [m.base_color for m in meshes],
            [m.atlas for m in meshes],
        )
    )
    rows = list(zip(meshes, corners, materials, textures, strict=False))
    return Mesh(
        vertices=np.concatenate([m.vertices for m in meshes]),
        faces=np.concatenate([m.faces + v for m, v, _, _ in rows]).astype(np.int32),
        normals=np.concatenate([m.normals for m in meshes]).astype(np.float32),
        uv=np.concatenate([m.uv for m in meshes]),
        material=np.concatenate([m.material + k for m, _, k, _ in rows]).astype(np.int32),
        base_color=np.concatenate([m.base_color for m in meshes]),
        texture=np.concatenate(
            [np.where(m.texture < 0, -1, m.texture + t) for m, _, _, t in rows]
        ).astype(np.int32),
        alpha_cutoff=np.concatenate([m.alpha_cutoff for m in meshes]),
        atlas=np.concatenate([m.atlas for m in meshes]),
    )


def grown(mesh: Mesh, size: int) -> Mesh:
    """The mesh with textures of `size` texels a side, by repeating texels."""
    scale = max(1, size // mesh.atlas.shape[-2])
    if not len(mesh.atlas):
        return mesh._replace(atlas=np.zeros((0, size, size, 4), np.uint8))
    return mesh._replace(atlas=mesh.atlas.repeat(scale, axis=1).repeat(scale, axis=2))


def has_alpha(mesh: Mesh) -> bool:
    """Whether any used material has holes or is see-through: it then needs the alpha test.

    Reads the arrays, so it runs outside compiled code; for a stack, whether any mesh does.
    """
    if np.ndim(mesh.vertices) > 2:
        arrays = (np.asarray(x) for x in mesh)
        return any(has_alpha(Mesh(*one)) for one in zip(*arrays, strict=True))
    base, texture, atlas = (np.asarray(x) for x in (mesh.base_color, mesh.texture, mesh.atlas))
    lowest = np.append(atlas[..., 3].min(axis=(1, 2)), 255)[texture]
    return bool(((base[:, 3] < 1.0) | (lowest < 255))[np.unique(mesh.material)].any())


def pad(mesh: Mesh, *, vertices: int, faces: int, materials: int, textures: int, size: int) -> Mesh:
    """The same mesh in larger arrays: nothing that is drawn changes.

    Padding faces name vertex 0 three times. Textures grow to `size` by repeating texels.

    Raises ValueError when an array is larger than the size asked for, or `size` is no multiple
    of the present texture size.
    """
    mesh = Mesh(*(np.asarray(x) for x in mesh))
    scale, rest = divmod(size, mesh.atlas.shape[-2])
    if rest or scale < 1:
        raise ValueError(f"textures of {mesh.atlas.shape[-2]} texels cannot grow to {size}")
    atlas = mesh.atlas.repeat(scale, axis=1).repeat(scale, axis=2)
    normals = np.broadcast_to(np.float32([0.0, 0.0, 1.0]), (faces, 3, 3))
    return Mesh(
        vertices=_extend(mesh.vertices, vertices, 0),
        faces=_extend(mesh.faces, faces, 0),
        normals=np.concatenate([mesh.normals, normals[len(mesh.normals) :]]),
        uv=_extend(mesh.uv, faces, 0),
        material=_extend(mesh.material, faces, 0),
        base_color=_extend(mesh.base_color, materials, 1),
        texture=_extend(mesh.texture, materials, -1),
        alpha_cutoff=_extend(mesh.alpha_cutoff, materials, 0),
        atlas=_extend(atlas, textures, 255),
    )


def stack(meshes: Sequence[Mesh]) -> Mesh:
    """Several meshes as one stack with a leading axis, padded to common bucketed sizes."""
    sizes = {
        "vertices": binning.next_size(max(len(m.vertices) for m in meshes)),
        "faces": binning.next_size(max(len(m.faces) for m in meshes)),
        "materials": binning.next_size(max(len(m.base_color) for m in meshes)),
        "textures": max(len(m.atlas) for m in meshes),
        "size": max(m.atlas.shape[-2] for m in meshes),
    }
    return Mesh(*(np.stack(x) for x in zip(*(pad(m, **sizes) for m in meshes), strict=True)))


def bucketed(mesh: Mesh) -> Mesh:
    """The mesh padded to common sizes, so that few sizes of meshes make few programs."""
    return Mesh(*(array[0] for array in stack([mesh])))


def _extend(array: np.ndarray, length: int, value: int) -> np.ndarray:
    if len(array) > length:
        raise ValueError(f"{len(array)} rows do not fit in {length}")
    extra = np.full((length - len(array), *array.shape[1:]), value, array.dtype)
    return np.concatenate([array, extra])
