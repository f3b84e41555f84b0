"""Triangles that share vertices: what is connected, what is closed, and what faces where.

v vertices, f faces, e edges. Faces run counter-clockwise seen from outside. NumPy in float64: these
run once a mesh on the host, between compiled programs.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int


class Triangles(NamedTuple):
    """A surface whose faces share their vertices; world units."""

    vertices: Float[np.ndarray, "v 3"]
    faces: Int[np.ndarray, "f 3"]


def cross(triangles: Triangles) -> Float[np.ndarray, "f 3"]:
    """Normals of the faces, as long as twice their areas."""
    a, b, c = (np.asarray(triangles.vertices, np.float64)[triangles.faces[:, k]] for k in range(3))
    return np.cross(b - a, c - a)


def vertex_normals(triangles: Triangles) -> Float[np.ndarray, "v 3"]:
    """Unit normals, means over the faces around a vertex by area; 0 where there is none."""
    normal = cross(triangles)
    corner, count = triangles.faces.reshape(-1), len(triangles.vertices)
    total = [np.bincount(corner, np.repeat(normal[:, k], 3), count) for k in range(3)]
    total = np.stack(total, axis=-1)
    length = np.linalg.norm(total, axis=-1, keepdims=True)
    return (total / np.where(length > 0, length, 1.0)).astype(np.float32)


def edges(triangles: Triangles) -> tuple[Int[np.ndarray, "e 2"], Int[np.ndarray, "e"]]:
    """Every edge once, low vertex first, and how many faces have it."""
    ends = np.sort(_directed(triangles.faces), axis=1).astype(np.int64)
    key, count = np.unique(ends[:, 0] << 32 | ends[:, 1], return_counts=True)
    return np.stack([key >> 32, key & 0xFFFFFFFF], axis=-1), count


def is_watertight(triangles: Triangles) -> bool:
    """Whether every edge joins two faces that run along it in opposite directions."""
    ends = _directed(triangles.faces).astype(np.int64)
    forth, back = (np.sort(ends[:, a] << 32 | ends[:, b]) for a, b in ((0, 1), (1, 0)))
    once = bool((forth[1:] != forth[:-1]).all())
    return len(forth) > 0 and once and bool((forth == back).all())


def euler_number(triangles: Triangles) -> int:
    """Vertices less edges plus faces: 2 for a ball, 0 for a ring; of used vertices only."""
    used = len(np.unique(triangles.faces))
    return used - len(edges(triangles)[0]) + len(triangles.faces)


def components(triangles: Triangles) -> Int[np.ndarray, "f"]:
    """A number for every face, equal for faces that edges or vertices connect; from 0 on."""
    from scipy import sparse

    ends = _directed(triangles.faces)
    count = len(triangles.vertices)
    ones = np.ones(len(ends), np.int8)
    graph = sparse.coo_matrix((ones, (ends[:, 0], ends[:, 1])), shape=(count, count))
    label = sparse.csgraph.connected_components(graph, directed=False)[1]
    return np.unique(label[triangles.faces[:, 0]], return_inverse=True)[1].reshape(-1)


def sharp(triangles: Triangles, degrees: float) -> float:
    """The share of a closed surface's edges at which normals turn by more than that."""
    normal = cross(triangles).astype(np.float64)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-30)
    ends = np.sort(_directed(triangles.faces).astype(np.int64), axis=1)
    order = np.lexsort(ends.T)
    ends, face = ends[order], order % len(triangles.faces)
    joined = (ends[1:] == ends[:-1]).all(axis=1)
    turn = (normal[face[1:]] * normal[face[:-1]]).sum(axis=1)[joined]
    return float((turn < np.cos(np.radians(degrees))).mean()) if len(turn) else 0.0


def volumes(triangles: Triangles, label: Int[np.ndarray, "f"]) -> Float[np.ndarray, "n"]:
    """What each component encloses; negative for a cavity, whose faces look inwards."""
    a = np.asarray(triangles.vertices, np.float64)[triangles.faces[:, 0]]
    return np.bincount(label, (a * cross(triangles)).sum(axis=1)) / 6.0


def largest(triangles: Triangles, share: float) -> Triangles:
    """Without cavities and pieces that enclose less than `share` of what the largest does."""
    label = components(triangles)
    volume = volumes(triangles, label)
    return kept(triangles, (volume >= share * volume.max())[label] & (volume > 0)[label])


def kept(triangles: Triangles, keep: Bool[np.ndarray, "f"]) -> Triangles:
    """Only the faces chosen, and only the vertices that they use, in their order."""
    faces = triangles.faces[keep]
    used = np.zeros(len(triangles.vertices), bool)
    used[faces] = True
    number = np.cumsum(used) - 1
    return Triangles(triangles.vertices[used], number[faces].astype(np.int32))


def unfolded(triangles: Triangles) -> Triangles:
    """Without pairs of faces of the same three vertices that look in opposite directions."""
    first = np.argmin(triangles.faces, axis=1)
    a, b, c = (
        np.take_along_axis(triangles.faces, ((first + k) % 3)[:, None], 1)[:, 0] for k in range(3)
    )
    same = np.stack([a, np.minimum(b, c), np.maximum(b, c)], axis=1)
    group = np.unique(same, axis=0, return_inverse=True)[1].reshape(-1)
    keep = np.ones(len(group), bool)
    # Of every group as many of either direction go as there are of the rarer one.
    ways = [b < c, b > c]
    counts = [np.bincount(group[way], minlength=group.max(initial=-1) + 1) for way in ways]
    for way in ways:
        members = np.flatnonzero(way)
        members = members[np.argsort(group[members], kind="stable")]
        ordered = group[members]
        place = np.arange(len(members)) - np.searchsorted(ordered, ordered)
        keep[members] = place >= np.minimum(*counts)[ordered]
    return triangles if keep.all() else kept(triangles, keep)


def unpinched(triangles: Triangles) -> Triangles:
    """The same shape where no edge has more than two faces: further pairs get a vertex midway.

    Faces around such an edge are paired as the two sides of one wedge of the solid; what has no
    partner of the opposite direction stays as it is. Faces that lie back to back are dropped.
    """
    # They have nothing between them, and however often they were cut, their edges would meet.
    triangles = unfolded(triangles)
    while True:
        ends = _directed(triangles.faces).astype(np.int64)
        key = ends.min(axis=1) << 32 | ends.max(axis=1)
        _, edge, count = np.unique(key, return_inverse=True, return_counts=True)
        crowded = np.flatnonzero(count[edge.reshape(-1)] > 2)
        crowded = crowded[np.argsort(key[crowded], kind="stable")]
        groups = np.split(crowded, np.flatnonzero(np.diff(key[crowded])) + 1)
        pairs = [pair for group in groups if len(group) for pair in _wedges(triangles, ends, group)]
        # A face with two such edges has its turn with the second one in the next round.
        taken, chosen = set(), []
        for pair in pairs:
            of_pair = {half % len(triangles.faces) for half in pair}
            if taken.isdisjoint(of_pair):
                taken |= of_pair
                chosen.append(pair)
        if not chosen:
            return triangles
        triangles = _parted(triangles, chosen)


def _parted(triangles: Triangles, pairs: list[tuple[int, int]]) -> Triangles:
    """Every pair of half-edges cut by a vertex of its own, two faces into four."""
    ends, number = _directed(triangles.faces), len(triangles.faces)
    midway = triangles.vertices[ends[[pair[0] for pair in pairs]]].mean(axis=1)
    faces, more = triangles.faces.copy(), []
    for place, pair in enumerate(pairs, len(triangles.vertices)):
        for half in pair:
            a, b, c = np.roll(triangles.faces[half % number], -(half // number))
            faces[half % number] = a, place, c
            more.append((place, b, c))
    vertices = np.concatenate([triangles.vertices, midway]).astype(triangles.vertices.dtype)
    return Triangles(vertices, np.concatenate([faces, np.asarray(more, faces.dtype)]))


def _wedges(
    triangles: Triangles, ends: Int[np.ndarray, "h 2"], halves: Int[np.ndarray, "n"]
) -> list[tuple[int, int]]:
    """Pairs of half-edges of one edge between which the solid lies, but for the first pair."""
    number, points, ends = len(triangles.faces), triangles.vertices, ends[halves]
    low, high = (points[end].astype(np.float64) for end in (ends[0].min(), ends[0].max()))
    axis = (high - low) / max(np.linalg.norm(high - low), 1e-30)
    away = points[triangles.faces[halves % number, (halves // number + 2) % 3]] - low
    away -= (away @ axis)[:, None] * axis
    angle = np.arctan2(away @ np.cross(axis, away[0]), away @ away[0])
    order = np.argsort(angle, kind="stable")
    forth = (ends[:, 0] < ends[:, 1])[order]
    # Turning about the edge, the solid begins behind a face that runs back along it.
    open_places, pairs = np.flatnonzero(forth).tolist(), []
    for place in np.flatnonzero(~forth)[: len(open_places)]:
        mate = min(open_places, key=lambda other, place=place: (other - place) % len(order))
        open_places.remove(mate)
        pairs.append((int(halves[order[place]]), int(halves[order[mate]])))
    return pairs[1:]


def _directed(faces: Int[np.ndarray, "f 3"]) -> Int[np.ndarray, "n 2"]:
    return np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
