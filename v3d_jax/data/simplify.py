"""Fewer triangles and smaller textures for a mesh, so that it packs and renders quickly."""

import numpy as np

from v3d_jax.data import collapse, images, parts
from v3d_jax.mesh import surface

# Faces of the largest piece that counts as a leaf.
_LEAF = 64


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
            *_thinned(collapse.subset(mesh, loose), piece[loose], share**0.5),
            round(share * int(np.count_nonzero(loose))),
        )
        mesh = collapse.join(collapse.subset(mesh, ~loose), leaves)
        steps.append("prune")
        loose = np.arange(len(mesh.faces)) >= len(mesh.faces) - len(leaves.faces)
        allowed = faces - len(leaves.faces)
    solid = collapse.subset(mesh, ~loose)
    if len(solid.faces) > allowed:
        solid, step = collapse.collapsed(solid, allowed)
        steps.append(step)
    mesh = collapse.join(solid, collapse.subset(mesh, loose))
    return mesh._replace(vertices=parts.centred(mesh.vertices)), " ".join(steps)


def loose_pieces(mesh: surface.Mesh) -> tuple[np.ndarray, np.ndarray]:
    """Which faces [f] belong to a connected piece of at most `_LEAF` faces, and to which [f].

    All False unless such pieces make up at least a quarter of the faces.
    """
    _, weld = np.unique(mesh.vertices, axis=0, return_inverse=True)
    corners = weld.reshape(-1)[mesh.faces]
    links = np.concatenate([corners[:, :2], corners[:, 1:]])
    label = collapse.components(int(corners.max()) + 1, links)
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
    moved, target = collapse.cluster_collapse(
        mesh.vertices, mesh.faces, mesh.material, count, own[:, 0]
    )
    thin = collapse.apply(mesh, moved, target)
    return thin, piece[collapse.kept(target[mesh.faces], mesh.material)]


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
    return collapse.subset(mesh, stay)._replace(
        vertices=points, faces=flat.reshape(-1, 3).astype(np.int32)
    )


def shrink_textures(mesh: surface.Mesh, size: int) -> surface.Mesh:
    """The mesh with textures of at most `size` texels a side."""
    if mesh.atlas.shape[-2] <= size:
        return mesh
    shape = (len(mesh.atlas), size, size, 4)
    rows = [images.square(pixels, size) for pixels in mesh.atlas]
    return mesh._replace(atlas=np.reshape(rows, shape).astype(np.uint8))
