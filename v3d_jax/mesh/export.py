"""Files of a coloured surface: GLB, and OBJ or PLY on request, through trimesh.

A viewer shall show the colours of the frames, which hold their light already: the GLB's material is
unlit (KHR_materials_unlit), and neither metal nor glossy for viewers that do not know that. glTF
takes a base colour texture for sRGB and vertex colours for linear light, so that the former is
written as it is and the latter is converted, as floats: eight linear bits would show bands in dark
places. The texture ends at its border and does not repeat.

GLB and OBJ have y up and their front, camera 0's side, along z, as `data.objects` reads them; PLY
stays in the world's axes (z up), those of splats.ply and transforms.json.
"""

import io
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from v3d_jax.errors import UserError
from v3d_jax.mesh import topology
from v3d_jax.mesh.topology import Triangles
from v3d_jax.mesh.unwrap import Atlas

SUFFIXES = (".glb", ".obj", ".ply")
_COLOR = "_COLOR"  # trimesh writes floats only under names of one's own
_UNLIT = "KHR_materials_unlit"
# glTF's numbers for bilinear look-ups between mip levels, clamped at the border.
_SAMPLER = {"magFilter": 9729, "minFilter": 9987, "wrapS": 33071, "wrapT": 33071}


class Painted(NamedTuple):
    """A closed surface in the world's axes with its colours, sRGB as displayed."""

    triangles: Triangles
    atlas: Atlas | None  # None: the colours are those of the vertices
    colors: UInt8[np.ndarray, "m 3"]  # or texels, row by row from the top of a square


def save(path: str | os.PathLike, painted: Painted) -> None:
    """Writes a .glb, .obj (with .mtl and .png beside it) or .ply, aside first and then renamed.

    Raises `UserError` for another suffix and where the disk refuses.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: meshes are written as {', '.join(SUFFIXES)}")
    if suffix == ".obj":
        files = obj(painted, path.stem)
    else:
        files = {path.name: glb(painted) if suffix == ".glb" else ply(painted)}
    aside = [(path.with_name(f".{name}.partial-{os.getpid()}"), name) for name in files]
    try:
        for place, name in aside:
            place.write_bytes(files[name])
        for place, name in aside:
            place.replace(path.with_name(name))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        for place, _ in aside:
            place.unlink(missing_ok=True)


def glb(painted: Painted) -> bytes:
    """The surface as binary glTF 2.0; with a texture its vertices are cut along the seams."""
    from trimesh.exchange import gltf

    mesh = _trimesh(painted, linear=True)
    return gltf.export_glb(mesh, include_normals=True, tree_postprocessor=_finish)


def obj(painted: Painted, name: str) -> dict[str, bytes]:
    """The files of a Wavefront OBJ by name; vertex colours follow positions, as MeshLab reads."""
    from trimesh.exchange import obj as writer
    from trimesh.visual.material import SimpleMaterial

    mesh = _trimesh(painted, linear=False)
    if painted.atlas is None:
        return {f"{name}.obj": writer.export_obj(mesh, include_normals=False).encode()}
    # White under the texture, and nothing that shines: the picture as it is.
    white, black = [255, 255, 255, 255], [0, 0, 0, 255]
    picture = mesh.visual.material.baseColorTexture
    mesh.visual.material = SimpleMaterial(
        name=name, image=picture, diffuse=white, ambient=white, specular=black
    )
    text, files = writer.export_obj(
        mesh, include_normals=False, return_texture=True, mtl_name=f"{name}.mtl"
    )
    # The OBJ last: what is there before it does no harm without it.
    return {**{key: _bytes(value) for key, value in files.items()}, f"{name}.obj": text.encode()}


def ply(painted: Painted) -> bytes:
    """The uncut surface with 8-bit vertex colours, in the world's axes."""
    import trimesh

    mesh = trimesh.Trimesh(*painted.triangles, process=False, vertex_colors=vertex_colors(painted))
    return mesh.export(file_type="ply")


def vertex_colors(painted: Painted) -> UInt8[np.ndarray, "v 3"]:
    """Colours of the uncut surface's vertices; a texture is read at the nearest texel."""
    if painted.atlas is None:
        return painted.colors
    side = _side(painted)
    column, row = (painted.atlas.uv * [1, -1] + [0, 1]).T * side
    place = np.clip(row.astype(int), 0, side - 1) * side + np.clip(column.astype(int), 0, side - 1)
    found = np.zeros((len(painted.triangles.vertices), 3), np.uint8)
    found[painted.atlas.source] = painted.colors[place]
    return found


def to_file(vectors: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """World axes (z up, front along x) to those of glTF (y up, front along z)."""
    return vectors[:, [1, 2, 0]]


def to_linear(color: UInt8[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """IEC 61966-2-1's transfer function, from 8 bits to linear light in [0, 1]."""
    value = color.astype(np.float64) / 255.0
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _side(painted: Painted) -> int:
    side = round(len(painted.colors) ** 0.5)
    if side * side != len(painted.colors):
        raise ValueError(f"{len(painted.colors)} texels are no square")
    return side


def _trimesh(painted: Painted, *, linear: bool) -> Any:
    """In file axes; vertex colours in linear light as a float attribute, or as 8-bit sRGB."""
    import trimesh
    from trimesh.visual.material import PBRMaterial

    triangles, atlas = painted.triangles, painted.atlas
    normals = to_file(topology.vertex_normals(triangles))
    vertices, faces = to_file(np.asarray(triangles.vertices, np.float32)), triangles.faces
    material = PBRMaterial(name="baked", metallicFactor=0.0, roughnessFactor=1.0)
    if atlas is None:
        mesh = trimesh.Trimesh(vertices, faces, vertex_normals=normals, process=False)
        if linear:
            mesh.visual = trimesh.visual.TextureVisuals(material=material)
            mesh.vertex_attributes[_COLOR] = to_linear(painted.colors).astype(np.float32)
        else:
            mesh.visual.vertex_colors = painted.colors
        return mesh
    side = _side(painted)
    material.baseColorTexture = Image.fromarray(painted.colors.reshape(side, side, 3))
    mesh = trimesh.Trimesh(
        vertices[atlas.source], atlas.faces, vertex_normals=normals[atlas.source], process=False
    )
    mesh.visual = trimesh.visual.TextureVisuals(uv=atlas.uv, material=material)
    return mesh


def _finish(tree: dict[str, Any]) -> None:
    """What trimesh has no words for: unlit, vertex colours as floats, a clamped texture."""
    tree["asset"]["generator"] = "v3d_jax"
    tree["extensionsUsed"] = [*tree.get("extensionsUsed", []), _UNLIT]
    for material in tree["materials"]:
        material.setdefault("extensions", {})[_UNLIT] = {}
    for mesh in tree["meshes"]:
        for primitive in mesh["primitives"]:
            if (color := primitive["attributes"].pop(_COLOR, None)) is not None:
                primitive["attributes"]["COLOR_0"] = color
    if tree.get("textures"):
        tree["samplers"] = [dict(_SAMPLER)]
        for texture in tree["textures"]:
            texture["sampler"] = 0


def _bytes(content: bytes | str | Image.Image) -> bytes:
    if isinstance(content, Image.Image):
        out = io.BytesIO()
        content.save(out, "PNG")
        return out.getvalue()
    return content.encode() if isinstance(content, str) else content
