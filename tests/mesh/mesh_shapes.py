"""Fields with known surfaces, and distances between triangle meshes."""

import jax.numpy as jnp
import numpy as np
from scipy import spatial

from v3d_jax.mesh import extract, topology

BOX = extract.Box(np.full(3, -1.0, np.float32), 2.0)


def sphere(points):
    return jnp.linalg.norm(points, axis=-1) - 0.5


def torus(points):
    ring = jnp.linalg.norm(points[:, :2], axis=-1) - 0.45
    return jnp.hypot(ring, points[:, 2]) - 0.15


def bumpy(points):
    """A sphere with bumps whose gradient is not of length 1."""
    wave = jnp.prod(jnp.sin(8.0 * points + jnp.asarray([[0.0, 0.5, 0.0]])), axis=-1)
    return 0.8 * (jnp.linalg.norm(points, axis=-1) - 0.5 - 0.04 * wave)


def pierced(points):
    """A box with a round hole along z: edges, planes and a handle."""
    beyond = jnp.abs(points) - jnp.asarray([[0.45, 0.35, 0.3]])
    box = jnp.linalg.norm(jnp.maximum(beyond, 0.0), axis=-1) + jnp.minimum(beyond.max(-1), 0.0)
    return jnp.maximum(box, 0.18 - jnp.linalg.norm(points[:, :2], axis=-1))


SHAPES = {"sphere": sphere, "torus": torus, "bumpy": bumpy, "pierced": pierced}
EULER = {"sphere": 2, "torus": 0, "bumpy": 2, "pierced": 0}
VOLUME = {"sphere": 4 / 3 * np.pi * 0.5**3, "torus": 2 * np.pi**2 * 0.45 * 0.15**2}


def scattered(triangles, count, seed=0):
    """Points on a surface, evenly by area, and the faces they lie on."""
    rng = np.random.default_rng(seed)
    area = np.linalg.norm(topology.cross(triangles), axis=1)
    face = rng.choice(len(area), count, p=area / area.sum())
    weights = rng.dirichlet(np.ones(3), count)
    corners = np.asarray(triangles.vertices, np.float64)[triangles.faces[face]]
    return np.einsum("nk,nkc->nc", weights, corners), face


def distances(points, triangles, doubt, candidates=8):
    """From points to a surface, exact above `doubt` and never less than true below it.

    To the nearest of the faces on which points scattered nearby lie; slim faces may be missed, so
    what seems far is compared with every face.
    """
    nearby, face = scattered(triangles, max(200_000, 2 * len(triangles.faces)), seed=1)
    near = face[spatial.KDTree(nearby).query(points, candidates)[1]]
    corners = np.asarray(triangles.vertices, np.float64)[triangles.faces]
    found = np.min([_squared(points, corners[near[:, k]]) for k in range(candidates)], axis=0)
    for far in np.flatnonzero(found > doubt**2):
        found[far] = _squared(points[far : far + 1].repeat(len(corners), 0), corners).min()
    return np.sqrt(found)


def hausdorff(one, other, count, doubt):
    return max(
        distances(np.concatenate([scattered(a, count)[0], a.vertices[:count]]), b, doubt).max()
        for a, b in ((one, other), (other, one))
    )


def _squared(points, corners):
    a = corners[:, 0]
    one, two, offset = corners[:, 1] - a, corners[:, 2] - a, points - a
    normal = np.cross(one, two)
    size = (normal**2).sum(axis=1)
    second = (np.cross(one, offset) * normal).sum(axis=1) / size
    first = (np.cross(offset, two) * normal).sum(axis=1) / size
    inside = (first >= 0) & (second >= 0) & (first + second <= 1)
    found = [np.where(inside, (offset * normal).sum(axis=1) ** 2 / size, np.inf)]
    for k in range(3):
        along = corners[:, k - 2] - corners[:, k]
        offset = points - corners[:, k]
        part = np.clip((offset * along).sum(axis=1) / (along**2).sum(axis=1), 0, 1)
        found.append(((offset - part[:, None] * along) ** 2).sum(axis=1))
    return np.min(found, axis=0)
