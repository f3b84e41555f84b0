"""Fewer faces for an extracted surface: quadric edge collapses, held to what texturing needs.

Garland and Heckbert's collapses (1997) through fast-simplification. How boldly it collapses decides
over more than time: its own default leaves errors four times as large, folds and open edges. So
mild settings come first, every result is examined, and one that is open is not used.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from v3d_jax.mesh import topology
from v3d_jax.mesh.topology import Triangles

FACES = 25_000
# Aggressiveness in the order of trial: fast-simplification's growth of the error that it allows.
_BOLDNESS = (3.0, 2.0, 1.0, 5.0)
_ENOUGH, _MOST = 1.1, 2.0  # times the faces wanted
# A face's height must be this share of its longest side.
_FLATTEST = 1e-4
_NEIGHBOURS = 8


class Flaws(NamedTuple):
    """Faces that a simplified surface should not have."""

    flat: Bool[np.ndarray, "f"]  # without area, or nearly
    flipped: Bool[np.ndarray, "f"]  # turned against the original around them

    @property
    def count(self) -> int:
        """How many faces have either."""
        return int(np.count_nonzero(self.flat | self.flipped))


def simplify(triangles: Triangles, faces: int = FACES) -> Triangles:
    """The same closed surface with about `faces` faces; as it is, if it has no more.

    The result is watertight, of the same Euler number, and without flipped faces, and has up to
    twice the faces where fewer would break that. A surface as rough as its samples is given up for
    the number of faces: it loses handles finer than those, or keeps some flaws. What comes back
    whole is a surface that no setting keeps closed.
    """
    if len(triangles.faces) <= faces:
        return triangles
    number = topology.euler_number(triangles)
    best, least = triangles, None
    for boldness in _BOLDNESS:
        found = _collapsed(triangles, faces, boldness)
        if not topology.is_watertight(found):
            continue
        changed, flawed = topology.euler_number(found) != number, flaws(found, triangles).count
        count = len(found.faces)
        rank = (count > _MOST * faces, changed, flawed, count > _ENOUGH * faces)
        if least is None or rank < least:
            best, least = found, rank
        if not any(rank):
            break
    return best


def flaws(triangles: Triangles, original: Triangles) -> Flaws:
    """Faces without area, and faces that look against all of the original's normals near them."""
    from scipy import spatial

    corners = np.asarray(triangles.vertices, np.float64)[triangles.faces]
    normal = topology.cross(triangles)
    area = np.linalg.norm(normal, axis=1)
    longest = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=2).max(axis=1)
    tree = spatial.KDTree(original.vertices)
    count = min(_NEIGHBOURS, len(original.vertices))
    near = tree.query(corners.mean(axis=1), count)[1].reshape(len(corners), -1)
    facing = np.einsum("fc,fkc->fk", normal, topology.vertex_normals(original)[near]).max(axis=1)
    return Flaws(area <= _FLATTEST * longest**2, facing <= 0.0)


def _collapsed(triangles: Triangles, faces: int, boldness: float) -> Triangles:
    import fast_simplification

    # Its thresholds are absolute: what a world's unit is must not decide over the result.
    points = np.asarray(triangles.vertices, np.float64)
    low, size = points.min(axis=0), max(np.ptp(points, axis=0).max(), 1e-30)
    points, corners = fast_simplification.simplify(
        (points - low) / size, triangles.faces, target_count=faces, agg=boldness
    )[:2]
    found = Triangles(np.float32(points * size + low), np.int32(corners))
    # It may join two sheets along an edge, which is no reason to refuse all of them.
    return topology.unpinched(topology.kept(found, np.ones(len(corners), bool)))
