"""MegaGlest's G3D models, version 4: the first frame of every mesh, as parts.

Axes as in the file: y up, front along z, texture origin at the bottom left (OpenGL). The layout is
the one of MegaGlest's `docs/glest_game` description of G3D.
"""

import struct
from pathlib import Path

import numpy as np

from v3d_jax.data import images, parts

VERSION = 4
# Flag bits of a mesh.
TEAM_COLOR = 1
# Bit of the texture set that holds the diffuse texture, always stored first.
DIFFUSE = 1
# Folders of MegaGlest's data whose models belong to no team.
SCENERY = frozenset({"tilesets", "resources"})

_NAME = 64
_HEADER = struct.Struct("<3I8f2I")


class _Reader:
    """Reads a buffer front to back; running off its end is an error, never a short answer."""

    def __init__(self, data: bytes):
        self.data, self.offset = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.offset:
            raise ValueError("the file ends too early")
        self.offset += size
        return self.data[self.offset - size : self.offset]

    def array(self, dtype: str, *shape: int) -> np.ndarray:
        size = np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(self.take(size), dtype).reshape(shape)

    def text(self) -> str:
        return self.take(_NAME).split(b"\0")[0].decode("utf-8")


def read(path: Path, team_color: tuple[float, float, float] = (0.75, 0.1, 0.1)) -> list[parts.Part]:
    """Every mesh of a model with its texture, which is looked for beside the file.

    A unit's mesh flagged for team colour stores in its texture's alpha where the texture (1) and
    where the team's colour (0) shows: it becomes opaque. Any other mesh's alpha is transparency;
    scenery belongs to no team, whatever its flags say, and is known by its folder.
    Raises ValueError, UnicodeDecodeError or OSError for what cannot be read.
    """
    reader = _Reader(path.read_bytes())
    if reader.take(3) != b"G3D":
        raise ValueError("not a G3D file")
    version = reader.take(1)[0]
    if version != VERSION:
        raise ValueError(f"G3D version {version}; only {VERSION} is read")
    count, _ = struct.unpack("<HB", reader.take(3))
    color = None if SCENERY.intersection(path.absolute().parts) else team_color
    return [_mesh(reader, path.parent, color) for _ in range(count)]


def _mesh(reader: _Reader, folder: Path, team_color: tuple[float, ...] | None) -> parts.Part:
    reader.text()
    frames, vertices, indices, *rest = _HEADER.unpack(reader.take(_HEADER.size))
    diffuse, opacity, flags, textures = rest[:3], rest[7], rest[8], rest[9]
    names = [reader.text() for bit in range(32) if textures >> bit & 1]
    position = reader.array("<f4", frames, vertices, 3)[:1].reshape(-1, 3)
    normal = reader.array("<f4", frames, vertices, 3)[:1].reshape(-1, 3)
    uv = reader.array("<f4", vertices, 2) if textures else None
    corners = reader.array("<u4", indices)
    if indices % 3:
        raise ValueError(f"{indices} indices are no triangles")
    if frames < 1 or (indices and corners.max() >= vertices):
        raise ValueError("an index points past the last vertex")
    faces = corners.reshape(-1, 3).astype(np.int32)
    texture = None
    if textures & DIFFUSE:
        texture = images.read((folder / names[0]).read_bytes())
        if flags & TEAM_COLOR and team_color is not None:
            texture = tint(texture, team_color)
    color = (1.0, 1.0, 1.0) if texture is not None else diffuse
    return parts.Part(
        vertices=position,
        faces=faces,
        normals=normal[faces],
        uv=uv[faces] if texture is not None else None,
        color=np.asarray([*color, opacity], np.float32),
        texture=texture,
        cutoff=parts.cutoff(texture),
    )


def tint(texture: np.ndarray, color: tuple[float, float, float]) -> np.ndarray:
    """Puts `color` (0..1) where a uint8 [h, w, 4] texture's alpha is low; opaque afterwards."""
    alpha = texture[..., 3:].astype(np.float32) / 255.0
    mixed = alpha * texture[..., :3] + (1.0 - alpha) * 255.0 * np.asarray(color, np.float32)
    opaque = np.full_like(texture[..., 3:], 255)
    return np.concatenate([np.rint(mixed).astype(np.uint8), opaque], axis=-1)
