"""Pieces of a mesh as files hold them, and their assembly into one `surface.Mesh`.

Files have y up and their front along z (glTF's rule, which OBJ exports and both catalogues follow);
the world has z up and camera 0 of the orbit on x. So file (x, y, z) becomes world (z, x, y).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from v3d_jax.data import images
from v3d_jax.mesh import surface

# Edges sharper than this keep their crease when a file has no normals (degrees).
CREASE_ANGLE = 45.0
CUTOFF = 0.5
# Distance that back-to-back faces of different looks are moved, each (unit radii).
SHEET = 5e-4

# World axes out of file axes.
_TURN = np.asarray([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
# Corner pairs compared at a time when creases are looked for.
_PAIRS = 1 << 21


class UnreadableMesh(Exception):  # noqa: N818 (reads as what it says)
    """A mesh that cannot be read whole: `name` says which, `reason` why, each in one line."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, " ".join(reason.split())

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Part(NamedTuple):
    """Triangles of one material, in file axes: v vertices, f faces.

    `normals` [f,3,3] and `uv` [f,3,2] are per corner, v upwards, None where the file has none.
    `color` is RGBA in [0, 1], sRGB, and multiplies `texture` (uint8 [h,w,4], row 0 on top, or
    None). `cutoff` is `surface.Mesh.alpha_cutoff`.
    """

    vertices: np.ndarray
    faces: np.ndarray
    normals: np.ndarray | None
    uv: np.ndarray | None
    color: np.ndarray
    texture: np.ndarray | None
    cutoff: float


def cutoff(texture: np.ndarray | None) -> float:
    """`CUTOFF` for a texture [h,w,4] that is cut out (leaves), 0 for glass or an opaque one.

    Cut out means that of the texels which are not opaque most are almost wholly transparent.
    """
    if texture is None:
        return 0.0
    holes = np.count_nonzero(texture[..., 3] < 32)
    partial = np.count_nonzero(texture[..., 3] < 250) - holes
    return CUTOFF if holes > partial else 0.0


def face_colors(colors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A texture [s,s,4] with one texel a face, and the uv [f,3,2] of the texels' centres.

    `colors` is uint8 [f,4].
    """
    side = max(1, int(np.ceil(np.sqrt(len(colors)))))
    side = next((s for s in surface.TEXTURE_SIZES if s >= side), side)
    texture = np.full((side * side, 4), 255, np.uint8)
    texture[: len(colors)] = colors
    row, column = np.divmod(np.arange(len(colors)), side)
    uv = np.stack([(column + 0.5) / side, 1.0 - (row + 0.5) / side], axis=-1)
    uv = np.repeat(uv[:, None].astype(np.float32), 3, axis=1)
    return texture.reshape(side, side, 4), uv


def transform(part: Part, matrix: np.ndarray) -> Part:
    """Applies an affine [4,4] or linear [3,3] map; a mirroring map turns the faces over."""
    linear, offset = matrix[:3, :3], matrix[:3, 3] if matrix.shape == (4, 4) else 0.0
    vertices = np.asarray(part.vertices, np.float64) @ linear.T + offset
    part = part._replace(vertices=vertices)
    if part.normals is not None:
        # The cofactor matrix: the inverse transpose up to a scale, and defined for any map.
        x, y, z = linear
        cofactor = np.stack([np.cross(y, z), np.cross(z, x), np.cross(x, y)])
        sign = -1.0 if np.linalg.det(linear) < 0 else 1.0
        part = part._replace(normals=unit(sign * (part.normals @ cofactor.T)))
    if np.linalg.det(linear) < 0:
        flip = [None if x is None else x[:, ::-1] for x in (part.faces, part.normals, part.uv)]
        part = part._replace(faces=flip[0], normals=flip[1], uv=flip[2])
    return part


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors divided by their lengths; (0, 0, 1) in place of a zero vector."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.where(length > 0, vectors / np.where(length > 0, length, 1.0), [0.0, 0.0, 1.0])


def creased_normals(
    vertices: np.ndarray, faces: np.ndarray, angle: float = CREASE_ANGLE
) -> np.ndarray:
    """Corner normals [f,3,3]: area-weighted mean over the faces around a point.

    Only faces whose normals differ by at most `angle` degrees from the corner's own face count.
    Points are compared by position, so seams of a texture do not show.
    """
    corners = np.asarray(vertices, np.float64)[faces]
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normal = unit(cross)
    _, point = np.unique(corners.reshape(-1, 3), axis=0, return_inverse=True)
    order = np.argsort(point, kind="stable")
    face, point = order // 3, point[order]
    count = np.bincount(point)
    start = np.cumsum(count) - count
    total = np.empty((len(order), 3))
    for degree in np.unique(count):
        first = start[count == degree]
        for block in np.array_split(first, 1 + len(first) * int(degree) ** 2 // _PAIRS):
            rows = block[:, None] + np.arange(degree)
            own = normal[face[rows]]
            for part in np.array_split(np.arange(degree), 1 + int(degree) ** 2 // _PAIRS):
                near = own[:, part] @ np.swapaxes(own, 1, 2) >= np.cos(np.deg2rad(angle)) - 1e-9
                total[rows[:, part]] = near @ cross[face[rows]]
    smooth = np.empty_like(total)
    smooth[order] = total
    smooth = smooth.reshape(-1, 3, 3)
    bad = np.linalg.norm(smooth, axis=-1, keepdims=True) == 0
    return unit(np.where(bad, normal[:, None], smooth)).astype(np.float32)


def assemble(name: str, pieces: Sequence[Part], texture_size: int = 256) -> surface.Mesh:
    """Joins parts into a world-frame mesh inside the unit sphere.

    The bounding box's centre goes to the origin and the farthest vertex to distance 1: an orbit of
    radius 2 with a 60 degree field of view just sees it all. Faces without area and vertices
    without a face are dropped; faces back to back are `separated`; equal materials and textures
    are stored once; textures become squares of at most `texture_size`. Raises `UnreadableMesh`.
    """
    pieces = [_checked(name, piece) for piece in pieces]
    pieces = [piece for piece in pieces if len(piece.faces)]
    if not pieces:
        raise UnreadableMesh(name, "no triangles")
    offsets = np.cumsum([0, *(len(piece.vertices) for piece in pieces[:-1])])
    vertices = np.concatenate([piece.vertices for piece in pieces])
    faces = np.concatenate([p.faces + o for p, o in zip(pieces, offsets, strict=True)])
    used, flat = np.unique(faces, return_inverse=True)
    vertices, faces = centred(vertices[used] @ _TURN.T), flat.reshape(-1, 3).astype(np.int32)
    normals = np.concatenate([_normals(piece) for piece in pieces])
    uv = np.concatenate([np.zeros((len(p.faces), 3, 2)) if p.uv is None else p.uv for p in pieces])
    material, base_color, texture, cutoffs, atlas = _materials(pieces, texture_size)
    mesh = surface.Mesh(
        vertices=vertices,
        faces=faces,
        normals=(normals @ _TURN.T).astype(np.float32),
        uv=uv.astype(np.float32),
        material=material,
        base_color=base_color,
        texture=texture,
        alpha_cutoff=cutoffs,
        atlas=atlas,
    )
    return separated(mesh)


def separated(mesh: surface.Mesh) -> surface.Mesh:
    """Sorts out faces that lie on each other back to back, as two-sided sheets are modelled.

    Of faces with the same corners that look the same, the first stays. Those that differ and face
    both ways are moved by `SHEET` along their normals, so that each shows on its own side though
    nothing is culled.
    """
    first, apart = _back_to_back(mesh)
    faces, vertices = np.array(mesh.faces), mesh.vertices
    if apart.any():
        up = creased_normals(vertices, faces[apart])
        lifted = np.rint((vertices[faces[apart]] + SHEET * up).reshape(-1, 3) * 1e6) / 1e6
        lifted, place = np.unique(lifted.astype(np.float32), axis=0, return_inverse=True)
        faces[apart] = len(vertices) + place.reshape(-1, 3)
        vertices = np.concatenate([vertices, lifted])
    used, flat = np.unique(faces[first], return_inverse=True)
    return mesh._replace(
        vertices=centred(vertices[used]),
        faces=flat.reshape(-1, 3).astype(np.int32),
        normals=mesh.normals[first],
        uv=mesh.uv[first],
        material=mesh.material[first],
    )


def _back_to_back(mesh: surface.Mesh) -> tuple[np.ndarray, np.ndarray]:
    """Which faces [f] are the first of their corners and look, and which of them to move apart."""
    _, weld = np.unique(mesh.vertices, axis=0, return_inverse=True)
    welded = weld.reshape(-1)[mesh.faces]
    order = np.argsort(welded, axis=1)
    corners = np.take_along_axis(welded, order, axis=1)
    # Even permutations of the sorted corners face one way, odd ones the other.
    even = (order[:, 1] - order[:, 0]) % 3 == 1
    uv = np.take_along_axis(mesh.uv, order[..., None], axis=1).reshape(-1, 6)
    uv = np.where((mesh.texture[mesh.material] >= 0)[:, None], np.rint(uv * 1e4), 0.0)
    look = np.concatenate([corners, mesh.material[:, None], uv], axis=1)
    first = np.zeros(len(corners), bool)
    first[np.unique(look, axis=0, return_index=True)[1]] = True
    _, group = np.unique(corners, axis=0, return_inverse=True)
    group = group.reshape(-1)
    one_way = np.bincount(group, first & even) > 0
    other_way = np.bincount(group, first & ~even) > 0
    return first, first & (one_way & other_way)[group]


def centred(points: np.ndarray) -> np.ndarray:
    """Points with their bounding box around the origin and the farthest at distance 1, float32."""
    points = np.asarray(points, np.float64)
    points = points - 0.5 * (points.min(axis=0) + points.max(axis=0))
    return (points / np.linalg.norm(points, axis=-1).max()).astype(np.float32)


def _checked(name: str, part: Part) -> Part:
    """The part without its degenerate faces; raises `UnreadableMesh` for damaged arrays."""
    faces = np.asarray(part.faces)
    if len(faces) and (faces.min() < 0 or faces.max() >= len(part.vertices)):
        raise UnreadableMesh(name, "a face names a vertex that does not exist")
    for what, array in (("vertex", part.vertices), ("texture coordinate", part.uv)):
        if array is not None and not np.isfinite(array).all():
            raise UnreadableMesh(name, f"a {what} is not finite")
    corners = np.asarray(part.vertices, np.float64)[faces]
    area = np.linalg.norm(
        np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=-1
    )
    keep = area > 0
    if part.color[3] <= 0:
        keep[:] = False
    slices = [None if x is None else x[keep] for x in (faces, part.normals, part.uv)]
    return part._replace(faces=slices[0], normals=slices[1], uv=slices[2])


def _normals(part: Part) -> np.ndarray:
    """The file's normals where they are usable, otherwise normals by crease angle."""
    if part.normals is None:
        return creased_normals(part.vertices, part.faces)
    usable = np.isfinite(part.normals).all(axis=-1, keepdims=True)
    usable &= np.linalg.norm(part.normals, axis=-1, keepdims=True) > 1e-6
    if usable.all():
        return unit(part.normals)
    own = creased_normals(part.vertices, part.faces)
    return np.where(usable, unit(np.where(usable, part.normals, 1.0)), own)


def _materials(pieces: Sequence[Part], limit: int) -> tuple[np.ndarray, ...]:
    """material [f], base_color [m,4], texture [m], alpha_cutoff [m] and atlas [n,s,s,4]."""
    longest = max((max(p.texture.shape[:2]) for p in pieces if p.texture is not None), default=1)
    sizes = [s for s in surface.TEXTURE_SIZES if s <= limit]
    size = next((s for s in sizes if s >= longest), sizes[-1])
    rows: dict[tuple, int] = {}
    images_of: dict[bytes, int] = {}
    atlas, owner = [], []
    for piece in pieces:
        row = -1
        if piece.texture is not None:
            square = images.square(piece.texture, size)
            row = images_of.setdefault(square.tobytes(), len(atlas))
            if row == len(atlas):
                atlas.append(square)
        color = tuple(float(x) for x in np.clip(piece.color, 0.0, 1.0))
        key = (color, row, float(piece.cutoff))
        owner.append(rows.setdefault(key, len(rows)))
    material = np.repeat(np.asarray(owner, np.int32), [len(piece.faces) for piece in pieces])
    color, texture, cutoffs = zip(*rows, strict=True)
    return (
        material,
        np.asarray(color, np.float32),
        np.asarray(texture, np.int32),
        np.asarray(cutoffs, np.float32),
        np.stack(atlas) if atlas else np.zeros((0, size, size, 4), np.uint8),
    )
