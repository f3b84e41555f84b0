"""Mesh files as `surface.Mesh`: GLB, glTF, OBJ and PLY through trimesh, G3D, catalogue entries.

World frame of every result: z up, front along x, inside the unit sphere (see `parts.assemble`).
"""

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from v3d_jax.data import catalogue, g3d, images, parts
from v3d_jax.mesh import surface

UnreadableMesh = parts.UnreadableMesh
SUFFIXES = (".glb", ".gltf", ".obj", ".ply", ".g3d")


def load(path: Path | str, texture_size: int = 256) -> surface.Mesh:
    """Reads a mesh file with its materials and textures; raises `UnreadableMesh`."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UnreadableMesh(str(path), f"not one of {', '.join(SUFFIXES)}")

    def read(name: str) -> bytes:
        return (path.parent / name).read_bytes()

    try:
        if suffix == ".g3d":
            pieces = g3d.read(path)
        else:
            pieces = _through_trimesh(path.read_bytes(), suffix[1:], read)
    except UnreadableMesh as error:
        raise UnreadableMesh(str(path), error.reason) from error
    except Exception as error:  # a parser may fail on a damaged file in any way at all
        raise UnreadableMesh(str(path), _reason(error)) from error
    return parts.assemble(str(path), pieces, texture_size)


def load_entry(entry: catalogue.Entry, texture_size: int = 256) -> surface.Mesh:
    """Reads one object of a catalogue, turned as the catalogue says; raises `UnreadableMesh`."""
    folder = os.path.dirname(entry.model)
    suffix = Path(entry.model).suffix.lower()[1:]
    try:
        with zipfile.ZipFile(entry.archive) as archive:

            def read(name: str) -> bytes:
                return archive.read(os.path.normpath(f"{folder}/{name}"))

            pieces = _through_trimesh(archive.read(entry.model), suffix, read)
    except UnreadableMesh as error:
        raise UnreadableMesh(entry.identity, error.reason) from error
    except Exception as error:  # as in `load`
        raise UnreadableMesh(entry.identity, _reason(error)) from error
    matrix = catalogue.rotation(entry)
    return parts.assemble(
        entry.identity, [parts.transform(piece, matrix) for piece in pieces], texture_size
    )


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} is missing"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class _Files:
    """What trimesh asks for beside the mesh: materials, buffers, textures.

    trimesh goes on without a file that it cannot get; here the name is kept in `missing`.
    """

    def __init__(self, read: Callable[[str], bytes]):
        self._read, self.missing = read, []

    def get(self, name: str) -> bytes:
        name = name.strip().replace("\\", "/").removeprefix("./")
        try:
            data = self._read(name)
            if Path(name).suffix.lower() not in (".mtl", ".bin"):
                images.read(data)
        except (OSError, KeyError, ValueError) as error:
            self.missing.append(name)
            raise OSError(f"{name} cannot be read") from error
        return data

    __getitem__ = get


def _through_trimesh(data: bytes, kind: str, read: Callable[[str], bytes]) -> list[parts.Part]:
    import trimesh

    files = _Files(read)
    scene = trimesh.load_scene(
        io.BytesIO(data), file_type=kind, resolver=files, process=False, skip_texture=False
    )
    if files.missing:
        raise UnreadableMesh("", f"{files.missing[0]} is missing or damaged")
    found = []
    linear = kind in ("glb", "gltf")
    for node in scene.graph.nodes_geometry:
        matrix, name = scene.graph[node]
        geometry = scene.geometry[name]
        if isinstance(geometry, trimesh.Trimesh):
            found.append(parts.transform(_part(geometry, linear), matrix))
    return found


def _part(geometry, linear: bool) -> parts.Part:
    """One trimesh geometry; `linear` says that colours (not textures) are linear light."""
    faces = np.asarray(geometry.faces)
    # trimesh computes normals on demand: only those that the file gave are in its cache.
    given = "vertex_normals" in geometry._cache
    color, texture, cutoff, uv = _look(geometry, linear)
    if texture is None:
        colors = _vertex_colors(geometry, faces, linear)
        if colors is not None and (colors == colors[0]).all():
            color = color * (colors[0] / np.float32(255.0))
        elif colors is not None:
            texture, uv = parts.face_colors(colors)
            cutoff = parts.cutoff(texture)
    elif uv is not None:
        uv = uv[faces]
    return parts.Part(
        vertices=np.asarray(geometry.vertices),
        faces=faces,
        normals=np.asarray(geometry.vertex_normals)[faces] if given else None,
        uv=uv if texture is not None else None,
        color=color,
        texture=texture if uv is not None else None,
        cutoff=cutoff,
    )


def _look(geometry, linear: bool):
    """Base colour [4], texture, alpha cutoff and vertex uv of a geometry's material."""
    visual = geometry.visual
    material = getattr(visual, "material", None)
    white = np.ones(4, np.float32)
    if material is None:
        return white, None, 0.0, None
    uv = getattr(visual, "uv", None)
    uv = np.asarray(uv) if uv is not None and len(uv) == len(geometry.vertices) else None
    if hasattr(material, "baseColorFactor"):
        return *_pbr(material, white if linear else None), uv
    image = getattr(material, "image", None)
    options = getattr(material, "kwargs", None) or {}
    texture = None
    color = np.asarray([*options.get("kd", np.ones(3)), _opacity(options)], np.float32)
    if image is not None and uv is not None:
        # The texture takes the place of Kd, as in Sweet Home 3D and most viewers: exporters
        # leave any value beside a map_Kd.
        texture = np.asarray(image.convert("RGBA"))
        color = np.asarray([1.0, 1.0, 1.0, color[3]], np.float32)
    return color, texture, parts.cutoff(texture), uv


def _opacity(options: dict) -> float:
    """MTL's `d`, or 1 - `Tr`; 1 without either."""
    for key, sign in (("d", 1.0), ("tr", -1.0)):
        if key in options:
            value = float(np.ravel(options[key])[-1])
            return float(np.clip(value if sign > 0 else 1.0 - value, 0.0, 1.0))
    return 1.0


def _pbr(material, white: np.ndarray | None):
    """glTF's base colour, texture and alpha mode (glTF 2.0, section 3.9)."""
    factor = material.baseColorFactor
    color = np.ones(4, np.float32) if factor is None else np.float32(factor) / 255.0
    if white is not None:
        # The factor is linear light. Multiplying sRGB values by its sRGB equivalent is the
        # product in linear light, but for sRGB's short linear toe.
        color = np.append(_to_srgb(color[:3]), color[3]).astype(np.float32)
    image = material.baseColorTexture
    texture = None if image is None else np.array(image.convert("RGBA"))
    mode = material.alphaMode or "OPAQUE"
    if mode == "OPAQUE":
        color[3] = 1.0
        if texture is not None:
            texture[..., 3] = 255
        return color, texture, 0.0
    if mode == "MASK":
        cutoff = material.alphaCutoff
        return color, texture, parts.CUTOFF if cutoff is None else float(cutoff)
    return color, texture, parts.cutoff(texture)


def _vertex_colors(geometry, faces: np.ndarray, linear: bool) -> np.ndarray | None:
    """Colours of the faces uint8 [f,4], means over the corners; None if the file has none."""
    visual = geometry.visual
    attributes = getattr(visual, "vertex_attributes", None)
    if attributes is not None and "color" in attributes:
        values = np.asarray(attributes["color"])
    elif getattr(visual, "kind", None) == "face":
        return np.asarray(visual.face_colors)
    elif getattr(visual, "kind", None) == "vertex":
        values = np.asarray(visual.vertex_colors)
    else:
        return None
    if np.issubdtype(values.dtype, np.integer):
        values = values / np.iinfo(values.dtype).max
    if values.shape[-1] == 3:
        values = np.concatenate([values, np.ones_like(values[:, :1])], axis=-1)
    mean = values[faces].mean(axis=1)
    if linear:
        mean = np.concatenate([_to_srgb(mean[:, :3]), mean[:, 3:]], axis=-1)
    return np.rint(255.0 * np.clip(mean, 0.0, 1.0)).astype(np.uint8)


def _to_srgb(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1's transfer function for values in [0, 1]."""
    toe = 12.92 * linear
    return np.where(linear <= 0.0031308, toe, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)
