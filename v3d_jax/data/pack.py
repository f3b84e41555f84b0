"""A packed object collection: many textured meshes in one small file, read with numpy and Pillow.

The file is a zip: `index.json` (names, splits, attribution, counts), `objects/N` (one mesh,
LZMA-compressed) and `textures/N.webp` (each distinct texture once). Geometry is quantised:
positions to 2^-13 of the unit sphere's radius, normals to octahedral bytes, texture coordinates
to a sixteenth of a texel where they span few repeats.
"""

import json
import lzma
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from v3d_jax import errors
from v3d_jax.data import images
from v3d_jax.mesh import surface

FORMAT = "v3d-objects"
VERSION = 1
SPLITS = ("train", "heldout")
POSITION_STEP = 2.0**-13
WEBP_QUALITY = 80

_TEXEL_PARTS = 16
_UV_LEVELS = 65535


class Item(NamedTuple):
    """One object of a collection; `info` is what goes into the index with it (JSON values)."""

    name: str
    split: str
    mesh: surface.Mesh
    info: dict


def save(path: Path | str, items: Iterable[Item], about: dict | None = None) -> None:
    """Writes a collection, aside first and then under its name.

    `about` is any JSON to keep with it. Raises ValueError for a repeated name or another split.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.part")
    try:
        with zipfile.ZipFile(aside, "w") as archive:
            rows = _write(archive, items)
            table = {"format": FORMAT, "version": VERSION, "about": about or {}, "objects": rows}
            archive.writestr("index.json", json.dumps(table), zipfile.ZIP_DEFLATED)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _write(archive: zipfile.ZipFile, items: Iterable[Item]) -> list[dict]:
    """Writes objects and textures; the rows of the index."""
    names, rows = set(), []
    textures: dict[bytes, int] = {}
    for number, item in enumerate(items):
        if item.name in names or item.split not in SPLITS:
            raise ValueError(f"{item.name}: repeated, or split {item.split} unknown")
        names.add(item.name)
        used = []
        for pixels in item.mesh.atlas:
            key = pixels.tobytes()
            if key not in textures:
                data = images.encode(pixels, WEBP_QUALITY)
                archive.writestr(f"textures/{len(textures)}.webp", data)
            used.append(textures.setdefault(key, len(textures)))
        blob, counts = encode(item.mesh)
        archive.writestr(f"objects/{number}", blob, zipfile.ZIP_LZMA)
        row = {"name": item.name, "split": item.split, "textures": used, **counts}
        rows.append({**row, "info": item.info})
    return rows


class Collection:
    """A collection opened once, whose objects are read one by one, by any number of threads."""

    def __init__(self, path: Path | str):
        """Reads the index; raises `UserError` if this is no such file."""
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
            table = json.loads(self._archive.read("index.json"))
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise errors.UserError(f"{path} is not a packed object collection ({error})") from error
        if table.get("format") != FORMAT or table.get("version") != VERSION:
            raise errors.UserError(f"{path} is not a packed object collection of version {VERSION}")
        self.about: dict = table["about"]
        self.rows: list[dict] = table["objects"]

    def read(self, number: int) -> Item:
        """The object of row `number`; raises `UserError` if it is damaged."""
        row = self.rows[number]
        size = row["texture_size"]
        atlas = np.zeros((len(row["textures"]), size, size, 4), np.uint8)
        try:
            for place, texture in enumerate(row["textures"]):
                atlas[place] = images.read(self._archive.read(f"textures/{texture}.webp"))
            mesh = decode(self._archive.read(f"objects/{number}"), row, atlas)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile, lzma.LZMAError) as error:
            raise errors.UserError(f"{self.path} is damaged ({error}); fetch it again") from error
        return Item(row["name"], row["split"], mesh, row["info"])


def encode(mesh: surface.Mesh) -> tuple[bytes, dict]:
    """One mesh without its textures as bytes, and the counts that `decode` needs.

    A wedge is a distinct (vertex, normal, uv) of a corner, numbered by first use; so an index is
    stored as its distance below the next new number, 0 for a new one, which compresses well.
    """
    position = np.rint((mesh.vertices + 1.0) / POSITION_STEP)
    position = np.clip(position, 0, _UV_LEVELS).astype(np.int64)[mesh.faces].reshape(-1, 3)
    normal = octahedral(mesh.normals.reshape(-1, 3)).astype(np.int64)
    uv, low, step = _quantised_uv(mesh)
    wedges, corners = _by_first_use(np.concatenate([position, normal, uv], axis=1))
    points, owner = _by_first_use(wedges[:, :3])
    planes = [
        _planes(_fresh(corners), 4),
        _planes(_fresh(owner), 4),
        _planes(_delta(points), 2),
        _planes(_delta(wedges[:, 3:5]), 1),
        _planes(_delta(wedges[:, 5:7]), 2),
        _planes(_delta(mesh.material[:, None].astype(np.int64)), 2),
        _planes(np.rint(255.0 * mesh.base_color).astype(np.int64), 1),
        _planes(mesh.texture[:, None].astype(np.int64) + 1, 2),
        _planes(np.rint(255.0 * mesh.alpha_cutoff)[:, None].astype(np.int64), 1),
    ]
    counts = {
        "vertices": len(points),
        "wedges": len(wedges),
        "faces": len(mesh.faces),
        "materials": len(mesh.base_color),
        "texture_size": mesh.atlas.shape[-2],
        "uv_low": [float(x) for x in low],
        "uv_step": float(step),
    }
    return b"".join(planes), counts


def decode(data: bytes, counts: dict, atlas: np.ndarray) -> surface.Mesh:
    """The mesh of `encode`, with its textures; raises ValueError if lengths do not agree."""
    offset = 0

    def take(rows: int, columns: int, width: int) -> np.ndarray:
        nonlocal offset
        size = rows * columns * width
        part = np.frombuffer(data, np.uint8, size, offset).reshape(width, columns, rows)
        offset += size
        weights = (1 << 8 * np.arange(width)).reshape(-1, 1, 1)
        return (part.astype(np.int64) * weights).sum(axis=0).T

    faces, wedges = counts["faces"], counts["wedges"]
    corners = _unfresh(take(3 * faces, 1, 4)[:, 0])
    owner = _unfresh(take(wedges, 1, 4)[:, 0])
    points = _undelta(take(counts["vertices"], 3, 2), 16)
    normal = _undelta(take(wedges, 2, 1), 8)
    uv = _undelta(take(wedges, 2, 2), 16)
    material = _undelta(take(faces, 1, 2), 16)[:, 0]
    color = take(counts["materials"], 4, 1) / 255.0
    texture = take(counts["materials"], 1, 2)[:, 0] - 1
    cutoff = take(counts["materials"], 1, 1)[:, 0] / 255.0
    if offset != len(data):
        raise ValueError("an object has bytes left over")
    uv = np.asarray(counts["uv_low"]) + counts["uv_step"] * uv
    return surface.Mesh(
        vertices=(points * POSITION_STEP - 1.0).astype(np.float32),
        faces=owner[corners].reshape(-1, 3).astype(np.int32),
        normals=from_octahedral(normal)[corners].reshape(-1, 3, 3).astype(np.float32),
        uv=uv[corners].reshape(-1, 3, 2).astype(np.float32),
        material=material.astype(np.int32),
        base_color=color.astype(np.float32),
        texture=texture.astype(np.int32),
        alpha_cutoff=cutoff.astype(np.float32),
        atlas=atlas,
    )


def octahedral(normals: np.ndarray) -> np.ndarray:
    """Unit vectors [n,3] as two bytes [n,2] (Cigolini et al. 2014, octahedral map)."""
    flat = normals / np.abs(normals).sum(axis=-1, keepdims=True)
    x, y = flat[:, 0], flat[:, 1]
    sign = np.where(flat[:, :2] >= 0, 1.0, -1.0)
    folded = sign * (1.0 - np.abs(np.stack([y, x], axis=-1)))
    flat = np.where(flat[:, 2:] < 0, folded, flat[:, :2])
    return (np.rint(127.0 * flat) + 127).astype(np.uint8)


def from_octahedral(code: np.ndarray) -> np.ndarray:
    """Unit vectors [n,3] of `octahedral`'s bytes."""
    flat = np.asarray(code, np.float64) / 127.0 - 1.0
    height = 1.0 - np.abs(flat).sum(axis=-1, keepdims=True)
    fold = np.maximum(-height, 0.0)
    flat = flat + np.where(flat >= 0, -fold, fold)
    vectors = np.concatenate([flat, height], axis=-1)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _quantised_uv(mesh: surface.Mesh) -> tuple[np.ndarray, np.ndarray, float]:
    """Integer uv [3f,2], their origin and step; whole repeats are taken off every face."""
    textured = mesh.texture[mesh.material] >= 0
    uv = np.where(textured[:, None, None], mesh.uv, 0.0).astype(np.float64)
    uv = uv - np.floor(uv.mean(axis=1, keepdims=True))
    low = uv.min(axis=(0, 1))
    step = max(np.ptp(uv, axis=(0, 1)).max() / _UV_LEVELS, 1 / mesh.atlas.shape[-2] / _TEXEL_PARTS)
    low = np.floor(low / step) * step
    return np.rint((uv - low) / step).clip(0, _UV_LEVELS).astype(np.int64).reshape(-1, 2), low, step


def _by_first_use(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows in order of first appearance, and the number of each row's own."""
    _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rows[first[order]], rank[inverse.reshape(-1)]


def _fresh(numbers: np.ndarray) -> np.ndarray:
    seen = np.concatenate([[0], np.maximum.accumulate(numbers)[:-1] + 1])
    return (seen - numbers)[:, None]


def _unfresh(code: np.ndarray) -> np.ndarray:
    new = code == 0
    return np.cumsum(new) - new - code


def _delta(values: np.ndarray) -> np.ndarray:
    return np.diff(values, axis=0, prepend=np.zeros_like(values[:1]))


def _undelta(code: np.ndarray, bits: int) -> np.ndarray:
    return np.cumsum(code, axis=0) & ((1 << bits) - 1)


def _planes(values: np.ndarray, width: int) -> bytes:
    """The low `width` bytes of integers [n,c], a plane a byte and column."""
    parts = [(values.T >> 8 * k & 255).astype(np.uint8) for k in range(width)]
    return np.stack(parts).tobytes()
