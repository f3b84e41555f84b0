"""Fewer triangles for a textured mesh: vertices are merged, faces keep their own texture.

A collapse of vertices is found on positions alone, by quadric error (Garland and Heckbert 1997,
package `fast_simplification` if it is installed) or by clustering on a grid (Rossignac and Borrel
1993). What is left of every face then keeps its material and normals, and its texture
coordinates are continued linearly to where its corners went.
"""

import importlib.util

import numpy as np

from v3d_jax.data import images, parts
from v3d_jax.mesh import surface

# How far outside a face, in its barycentric coordinates, texture is continued.
_REACH = 1.0
# Faces of the largest piece that counts as a leaf.
_LEAF = 64
# Quadric collapse is given up when it leaves more than this many times the faces asked for.
_STALLED = 1.02


def simplify(mesh: surface.Mesh, faces: int) -> tuple[surface.Mesh, str]:
    """The mesh with about at most `faces` faces, again in the unit sphere, and the steps taken.

    Small loose pieces (leaves) and the rest lose the same share of their faces. The steps are
    "none", or of "prune", "quadric" and "cluster" those that were needed.
    """
    steps, allowed = [], faces
    if len(mesh.faces) <= faces:
        return mesh, "none"
    loose, piece = loose_pieces(mesh)
    if loose.any():
        share = faces / len(mesh.faces)
        leaves = prune(
            *_thinned(subset(mesh, loose), piece[loose], share**0.5),
            round(share * int(np.count_nonzero(loose))),
        )
        mesh = join(subset(mesh, ~loose), leaves)
        steps.append("prune")
        loose = np.arange(len(mesh.faces)) >= len(mesh.faces) - len(leaves.faces)
        allowed = faces - len(leaves.faces)
    solid = subset(mesh, ~loose)
    if len(solid.faces) > allowed:
        solid, step = _collapsed(solid, allowed)
        steps.append(step)
    mesh = join(solid, subset(mesh, loose))
    return mesh._replace(vertices=parts.centred(mesh.vertices)), " ".join(steps)


def _collapsed(mesh: surface.Mesh, faces: int) -> tuple[surface.Mesh, str]:
    """Quadric collapse, or clustering where that is missing, stalls or loses a material."""
    _, first, weld = np.unique(mesh.vertices, axis=0, return_index=True, return_inverse=True)
    weld = weld.reshape(-1)
    points, welded = mesh.vertices[first], weld[mesh.faces]
    if importlib.util.find_spec("fast_simplification"):
        moved, target = quadric_collapse(points, welded, faces)
        result = apply(mesh, moved, target[weld])
        lost = np.setdiff1d(mesh.material, result.material)
        if len(result.faces) <= _STALLED * faces and not len(lost):
            return result, "quadric"
    moved, target = cluster_collapse(points, welded, faces)
    return apply(mesh, moved, target[weld]), "cluster"


def loose_pieces(mesh: surface.Mesh) -> tuple[np.ndarray, np.ndarray]:
    """Which faces [f] belong to a connected piece of at most `_LEAF` faces, and to which [f].

    All False unless such pieces make up at least a quarter of the faces.
    """
    _, weld = np.unique(mesh.vertices, axis=0, return_inverse=True)
    corners = weld.reshape(-1)[mesh.faces]
    label = np.arange(corners.max() + 1)
    while True:  # every vertex takes the smallest label around it, then that label's own
        low = label[corners].min(axis=1)
        new = label.copy()
        for k in range(3):
            np.minimum.at(new, corners[:, k], low)
        new = new[new]
        if (new == label).all():
            break
        label = new
    _, piece = np.unique(label[corners[:, 0]], return_inverse=True)
    loose = np.bincount(piece)[piece] <= _LEAF
    if 4 * np.count_nonzero(loose) < len(loose):
        loose[:] = False
    return loose, piece


def _thinned(
    mesh: surface.Mesh, piece: np.ndarray, share: float
) -> tuple[surface.Mesh, np.ndarray]:
    """Clusters vertices within each piece to about `share` of the faces; pieces stay apart."""
    corners = np.stack([np.repeat(piece, 3), mesh.faces.reshape(-1)], axis=-1)
    own, flat = np.unique(corners, axis=0, return_inverse=True)
    mesh = mesh._replace(
        vertices=mesh.vertices[own[:, 1]], faces=flat.reshape(-1, 3).astype(np.int32)
    )
    count = int(share * len(mesh.faces))
    moved, target = cluster_collapse(mesh.vertices, mesh.faces, count, own[:, 0])
    thin = apply(mesh, moved, target)
    return thin, piece[_kept(target[mesh.faces])]


def prune(mesh: surface.Mesh, piece: np.ndarray, faces: int) -> surface.Mesh:
    """Keeps so many of the pieces [f] that about `faces` faces stay, enlarged to the same area.

    Stochastic simplification of aggregate detail (Cook, Halstead, Planck and Ryu 2007). Which
    pieces stay is a fixed function of their number.
    """
    _, own, size = np.unique(piece, return_inverse=True, return_counts=True)
    order = np.random.default_rng(0).permutation(len(size))
    chosen = np.zeros(len(size), bool)
    chosen[order] = np.cumsum(size[order]) <= faces
    stay = chosen[own]
    share = np.count_nonzero(stay) / max(1, len(stay))
    corners = mesh.vertices[mesh.faces[stay]].astype(np.float64)
    _, own = np.unique(own[stay], return_inverse=True)
    count = np.bincount(own)[:, None]
    centre = np.stack([np.bincount(own, corners[..., k].mean(1)) for k in range(3)], -1) / count
    grown = centre[own][:, None] + (corners - centre[own][:, None]) / np.sqrt(share)
    points, flat = np.unique(grown.reshape(-1, 3).astype(np.float32), axis=0, return_inverse=True)
    return subset(mesh, stay)._replace(vertices=points, faces=flat.reshape(-1, 3).astype(np.int32))


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


def shrink_textures(mesh: surface.Mesh, size: int) -> surface.Mesh:
    """The mesh with textures of at most `size` texels a side."""
    if mesh.atlas.shape[-2] <= size:
        return mesh
    shape = (len(mesh.atlas), size, size, 4)
    rows = [images.square(pixels, size) for pixels in mesh.atlas]
    return mesh._replace(atlas=np.reshape(rows, shape).astype(np.uint8))


def quadric_collapse(
    points: np.ndarray, faces: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """New points [w,3] and for each old point its new one [v], by edge collapse."""
    import fast_simplification

    points = np.ascontiguousarray(points, np.float32)
    faces = np.ascontiguousarray(faces, np.int32)
    _, _, collapses = fast_simplification.simplify(
        points, faces, target_count=count, return_collapses=True
    )
    moved, _, target = fast_simplification.replay_simplification(points, faces, collapses)
    return np.asarray(moved, np.float32), np.asarray(target)


def cluster_collapse(
    points: np.ndarray, faces: np.ndarray, count: int, group: np.ndarray | None = None
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
        if np.count_nonzero(_kept(target[faces])) <= count:
            coarse, best = side, target
        else:
            fine = side
    number = np.bincount(best)[:, None]
    mean = np.stack([np.bincount(best, points[:, k]) for k in range(3)], axis=-1) / number
    return mean.astype(np.float32), best


def apply(mesh: surface.Mesh, moved: np.ndarray, target: np.ndarray) -> surface.Mesh:
    """The mesh whose vertex i went to `moved[target[i]]`; faces without area are dropped."""
    faces = target[mesh.faces].astype(np.int32)
    keep = _kept(faces)
    old, new = mesh.vertices[mesh.faces[keep]], moved[faces[keep]]
    kept = subset(mesh, keep)
    used, flat = np.unique(faces[keep], return_inverse=True)
    return kept._replace(
        vertices=moved[used],
        faces=flat.reshape(-1, 3).astype(np.int32),
        uv=continued(old, kept.uv, new),
    )


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


def _kept(faces: np.ndarray) -> np.ndarray:
    """Which faces have three different corners and are the first with these corners."""
    ordered = np.sort(faces, axis=1)
    whole = (ordered[:, 0] != ordered[:, 1]) & (ordered[:, 1] != ordered[:, 2])
    first = np.zeros(len(faces), bool)
    first[np.unique(ordered, axis=0, return_index=True)[1]] = True
    return whole & first
