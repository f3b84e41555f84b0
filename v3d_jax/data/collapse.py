"""Merging vertices of a textured mesh so that surfaces and what is painted on them stay.

A collapse is found on positions alone, by quadric error (Garland and Heckbert 1997, package
`fast_simplification` if it is installed) or by clustering on a grid (Rossignac and Borrel 1993).
What is left of every face keeps its material and normals; texture coordinates follow the corners.
"""

import importlib.util

import numpy as np

from v3d_jax.data import parts
from v3d_jax.mesh import surface

# How far outside a face, in its barycentric coordinates, texture is continued.
_REACH = 1.0
# Quadric collapse is given up when it leaves more than this many times the faces asked for.
_STALLED = 1.02
# ... or when it changes more than this share of the area.
_EATEN = 0.03
# Largest difference of texture coordinates along an edge that is no seam.
_SEAM = 1e-4
# Attempts at the number of faces asked for.
_ROUNDS = 4


def collapsed(mesh: surface.Mesh, faces: int) -> tuple[surface.Mesh, str]:
    """Quadric collapse, or clustering where that is missing, stalls or eats the surface.

    The mesh with about at most `faces` faces, and "quadric" or "cluster".
    """
    _, first, weld = np.unique(mesh.vertices, axis=0, return_index=True, return_inverse=True)
    weld = weld.reshape(-1)
    points, welded = mesh.vertices[first], weld[mesh.faces]
    if importlib.util.find_spec("fast_simplification"):
        seams = seam_edges(mesh, welded)
        moved, target = quadric_collapse(points, welded, mesh.material, faces, seams)
        result = apply(mesh, moved, target[weld])
        if len(result.faces) <= _STALLED * faces and area_change(mesh, result) <= _EATEN:
            return result, "quadric"
    moved, target = cluster_collapse(points, welded, mesh.material, faces)
    return apply(mesh, moved, target[weld]), "cluster"


def area_change(old: surface.Mesh, new: surface.Mesh) -> float:
    """Change of area, summed over materials, as a share of the old mesh's area.

    A material that is lost altogether counts as infinite.
    """

    def areas(mesh: surface.Mesh) -> np.ndarray:
        corners = mesh.vertices[mesh.faces].astype(np.float64)
        cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        size = 0.5 * np.linalg.norm(cross, axis=-1)
        return np.bincount(mesh.material, size, len(mesh.base_color))

    before, after = areas(old), areas(new)
    if ((after == 0) & (before > 0)).any():
        return np.inf
    return float(np.abs(after - before).sum() / before.sum())


def seam_edges(mesh: surface.Mesh, welded: np.ndarray) -> np.ndarray:
    """Edges [e,2] of `welded` faces [f,3] at which looks or surface end.

    Where material or texture coordinates change from one face to the next, where there is no next
    face, and where there are several.
    """
    corner = np.stack([[0, 1], [1, 2], [2, 0]])
    ends = welded[:, corner]
    flip = ends[..., :1] > ends[..., 1:]
    textured = (mesh.texture[mesh.material] >= 0)[:, None, None, None]
    uv = np.where(textured, mesh.uv[:, corner], 0.0)
    uv = np.where(flip[..., None], uv[:, :, ::-1], uv).reshape(-1, 4)
    ends = np.where(flip, ends[..., ::-1], ends).reshape(-1, 2)
    edges, own, count = np.unique(ends, axis=0, return_inverse=True, return_counts=True)
    own = own.reshape(-1)
    look = np.concatenate([np.repeat(mesh.material, 3)[:, None], uv], axis=1)
    some = np.zeros((len(edges), 5))
    some[own] = look
    differs = np.abs(look - some[own]).max(axis=1) > _SEAM
    seam = count != 2
    seam[own[differs]] = True
    return edges[seam]


def quadric_collapse(
    points: np.ndarray, faces: np.ndarray, material: np.ndarray, count: int, seams: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """New points [w,3] and for each old point its new one [v], by edge collapse.

    Every edge of `seams` [e,2] carries a fin, a triangle square to the surface: its plane holds
    the edge in line (Garland and Heckbert 1997, section 6, boundary constraints), and its free
    corner makes the package treat the edge as a border, which merges with borders only.
    """
    import fast_simplification

    points, faces = np.asarray(points, np.float64), np.asarray(faces)
    tips, fins = _fins(points, faces, seams)
    everything = np.concatenate([points, tips]).astype(np.float32)
    triangles = np.concatenate([faces, fins]).astype(np.int32)
    goal = count
    for _ in range(_ROUNDS):  # fins count as faces for the package, but not for us
        _, _, collapses = fast_simplification.simplify(
            everything, triangles, target_count=goal, return_collapses=True
        )
        moved, _, target = fast_simplification.replay_simplification(
            everything, triangles, collapses
        )
        target = np.asarray(target)[: len(points)]
        left = int(np.count_nonzero(kept(target[faces], material)))
        if left >= 0.97 * count:
            break
        goal = min(goal + count - left, len(triangles) - 1)
    return np.asarray(moved, np.float32), target


def _fins(
    points: np.ndarray, faces: np.ndarray, seams: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Tips [e,3] over the middles of seam edges along the mean normal there, and fins [e,3]."""
    corners = points[faces]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    at = np.stack(
        [
            np.bincount(faces.reshape(-1), normal.repeat(3, axis=0)[:, k], len(points))
            for k in range(3)
        ],
        axis=-1,
    )
    up = parts.unit(at[seams].sum(axis=1))
    a, b = points[seams[:, 0]], points[seams[:, 1]]
    length = np.linalg.norm(b - a, axis=-1, keepdims=True)
    tips = 0.5 * (a + b) + length * up
    number = len(points) + np.arange(len(seams))
    return tips, np.concatenate([seams, number[:, None]], axis=1)


def cluster_collapse(
    points: np.ndarray,
    faces: np.ndarray,
    material: np.ndarray,
    count: int,
    group: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """New points [w,3] and for each old point its new one [v]: the means of a grid's cells.

    The grid is the finest of at most 1024 cells a side that leaves no more than `count` faces.
    Points of different `group` [v] stay apart.
    """
    low, span = points.min(axis=0), np.ptp(points, axis=0).max()
    group = np.zeros(len(points), np.int64) if group is None else group.astype(np.int64)
    coarse, fine, best = 0, 1025, np.unique(group, return_inverse=True)[1]
    while fine - coarse > 1:
        side = (coarse + fine) // 2
        cell = np.minimum((points - low) / span * side, side - 1).astype(np.int64)
        cell = cell @ [side * side, side, 1] + group * side**3
        _, target = np.unique(cell, return_inverse=True)
        if np.count_nonzero(kept(target[faces], material)) <= count:
            coarse, best = side, target
        else:
            fine = side
    number = np.bincount(best)[:, None]
    mean = np.stack([np.bincount(best, points[:, k]) for k in range(3)], axis=-1) / number
    return mean.astype(np.float32), best


def apply(mesh: surface.Mesh, moved: np.ndarray, target: np.ndarray) -> surface.Mesh:
    """The mesh whose vertex i went to `moved[target[i]]`; faces without area are dropped."""
    faces = target[mesh.faces].astype(np.int32)
    keep = kept(faces, mesh.material)
    used, flat = np.unique(faces[keep], return_inverse=True)
    return mesh._replace(
        vertices=moved[used],
        faces=flat.reshape(-1, 3).astype(np.int32),
        normals=mesh.normals[keep],
        uv=merged_uv(mesh, moved, faces)[keep],
        material=mesh.material[keep],
    )


def merged_uv(mesh: surface.Mesh, moved: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Texture coordinates [f,3,2] for corners that went to `moved[faces]`.

    Corners that went to one place along edges of faces, so on one side of every seam, get one
    value: that of the nearest of them, continued linearly to the place.
    """
    wedge = np.concatenate(
        [
            mesh.vertices[mesh.faces].reshape(-1, 3),
            mesh.uv.reshape(-1, 2),
            mesh.material.repeat(3)[:, None],
        ],
        axis=1,
    )
    _, wedge = np.unique(wedge, axis=0, return_inverse=True)
    wedge = wedge.reshape(-1, 3)
    links = [wedge[faces[:, a] == faces[:, b]][:, [a, b]] for a, b in ((0, 1), (1, 2), (2, 0))]
    side = components(int(wedge.max()) + 1, np.concatenate(links))[wedge].reshape(-1)
    old, new = mesh.vertices[mesh.faces], moved[faces]
    values = continued(old, mesh.uv, new).reshape(-1, 2)
    distance = np.linalg.norm(new - old, axis=-1).reshape(-1)
    order = np.lexsort((distance, side))
    first = order[np.unique(side[order], return_index=True)[1]]
    return values[first][np.unique(side, return_inverse=True)[1].reshape(-1)].reshape(-1, 3, 2)


def components(number: int, links: np.ndarray) -> np.ndarray:
    """Labels [number]: equal for what a chain of `links` [l,2] connects."""
    label = np.arange(number)
    while True:  # both ends take the smaller label, then that label's own
        low = label[links].min(axis=1)
        new = label.copy()
        for end in range(2):
            np.minimum.at(new, label[links[:, end]], low)
            np.minimum.at(new, links[:, end], low)
        new = new[new]
        if (new == label).all():
            return label
        label = new


def continued(old: np.ndarray, values: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Values [f,3,c] at the corners `old` [f,3,3] of triangles, continued linearly to `new`."""
    edges = (old[:, 1:] - old[:, :1]).astype(np.float64)
    gram = edges @ np.swapaxes(edges, 1, 2)
    size = gram[:, 0, 0] * gram[:, 1, 1]
    sound = np.linalg.det(gram) > 1e-3 * size
    gram = np.where(sound[:, None, None], gram, np.eye(2))
    offset = (new - old[:, :1]).astype(np.float64)
    weights = np.swapaxes(np.linalg.solve(gram, edges @ np.swapaxes(offset, 1, 2)), 1, 2)
    weights = np.clip(weights, -_REACH, 1.0 + _REACH)
    slopes = (values[:, 1:] - values[:, :1]).astype(np.float64)
    moved = values[:, :1] + weights @ slopes
    return np.where(sound[:, None, None], moved, values).astype(np.float32)


def subset(mesh: surface.Mesh, keep: np.ndarray) -> surface.Mesh:
    """The mesh with only the faces `keep` [f] and the vertices they use."""
    used, flat = np.unique(mesh.faces[keep], return_inverse=True)
    return mesh._replace(
        vertices=mesh.vertices[used],
        faces=flat.reshape(-1, 3).astype(np.int32),
        normals=mesh.normals[keep],
        uv=mesh.uv[keep],
        material=mesh.material[keep],
    )


def join(a: surface.Mesh, b: surface.Mesh) -> surface.Mesh:
    """Two meshes with the same materials as one."""
    return a._replace(
        vertices=np.concatenate([a.vertices, b.vertices]),
        faces=np.concatenate([a.faces, b.faces + len(a.vertices)]).astype(np.int32),
        normals=np.concatenate([a.normals, b.normals]),
        uv=np.concatenate([a.uv, b.uv]),
        material=np.concatenate([a.material, b.material]),
    )


def kept(faces: np.ndarray, material: np.ndarray) -> np.ndarray:
    """Which faces have three different corners and are the first of their corners and material.

    Faces that look the other way are others.
    """
    whole = (faces != np.roll(faces, 1, axis=1)).all(axis=1)
    start = faces.argmin(axis=1)[:, None]
    turned = np.take_along_axis(faces, (start + np.arange(3)) % 3, axis=1)
    rows = np.concatenate([turned, material[:, None]], axis=1)
    first = np.zeros(len(faces), bool)
    first[np.unique(rows, axis=0, return_index=True)[1]] = True
    return whole & first
