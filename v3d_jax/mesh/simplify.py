"""Fewer faces for an extracted surface: quadric edge collapses, held to what texturing needs.

Garland and Heckbert's collapses (1997) through fast-simplification. How boldly it collapses decides
over more than time: its own default leaves errors four times as large, folds and open edges. So
mild settings come first, every result is examined, and one that broke the surface is not used.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from v3d_jax.mesh import topology
from v3d_jax.mesh.topology import Triangles

FACES = 25_000
# Aggressiveness in the order of trial; one of fast-simplification's steps multiplies its threshold.
_MILD, _BOLD = (3.0, 2.0, 1.0), 5.0
_ENOUGH = 1.1  # times the faces wanted
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

    More faces stay where fewer would break the surface: the result is watertight, of the same
    Euler number, and has no flipped faces unless no setting avoids them.
    """
    if len(triangles.faces) <= faces:
        return triangles
    number = topology.euler_number(triangles)
    best, fewest = triangles, len(triangles.faces)
    for boldness in _MILD:
        found = _collapsed(triangles, faces, boldness)
        if not topology.is_watertight(found) or topology.euler_number(found) != number:
            continue
        flawed = flaws(found, triangles).count
        if flawed == 0 and len(found.faces) > _ENOUGH * faces:
            return _bolder(found, triangles, faces, number)
        if flawed < fewest:
            best, fewest = found, flawed
        if flawed == 0:
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


def _bolder(found: Triangles, original: Triangles, faces: int, number: int) -> Triangles:
    """Collapses on from a sound result that mild settings left with too many faces."""
    more = _collapsed(original, faces, _BOLD)
    sound = topology.is_watertight(more) and topology.euler_number(more) == number
    return more if sound and flaws(more, original).count == 0 else found


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
