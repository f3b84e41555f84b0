"""How near one surface is to another, by what can be seen of both from outside.

Meshes of catalogues have faces inside, holes, walls of two sheets and normals that face anywhere,
so nothing here asks which side of a face is out. Both surfaces are drawn from the same directions
all around, and of both alike count

- points, evenly by area, that the depth of one of these views at least shows; a view shows none
  at a grazing angle, and a point may lie behind the depth by what a sample's slope allows;
- the solid, which is all that lies within every view's outline. A bowl is therefore full, in truth
  and reconstruction alike: its inside counts in distances and normals, not in the volume.

Axes: v view, h w samples of a picture, n point. World units; distances of `Scores` are divided by
the longest edge of the box around the true points.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from v3d_jax.mesh import topology
from v3d_jax.mesh.operator import GRAZING
from v3d_jax.mesh.topology import Triangles
from v3d_jax.ops import camera
from v3d_jax.splat import carve

THRESHOLDS = (0.01, 0.02)  # of the F-scores, of the truth's longest edge
RADIUS = 2.4  # of the cameras: what reaches somewhat out of the unit ball is not cut off
_SPARE = 4  # points sampled for one that is wanted: some lie inside


class Depths(NamedTuple):
    """What views show of a surface."""

    cameras: camera.Camera
    inverse: Float[Array, "v h w"]  # 1 / camera z; 0: nothing
    supersample: int  # samples a pixel along each axis


class Shell(NamedTuple):
    """A surface as it is seen from all around."""

    points: Float[np.ndarray, "n 3"]
    normals: Float[np.ndarray, "n 3"]  # unit, of either sign
    depths: Depths


class Scores(NamedTuple):
    """Of a reconstruction; the distances are shares of the truth's longest edge."""

    chamfer: float  # the mean of both directions' mean distances to the nearest point, unsquared
    f_scores: tuple[float, ...]  # at each of THRESHOLDS
    iou: float  # of the solids
    normals: float  # the mean of both directions' mean |cosine| with the nearest point's normal
    chamfer_seen: float  # between the true points that the fitted frames show, and those near them


def around(count: int, size: int) -> camera.Camera:
    """Cameras on a Fibonacci spiral around the origin: every one sees as much of the sphere."""
    rank = np.arange(count) + 0.5
    z, angle = 1.0 - 2.0 * rank / count, np.pi * (3.0 - np.sqrt(5.0)) * rank
    flat = np.sqrt(1.0 - z * z)
    place = RADIUS * np.stack([flat * np.cos(angle), flat * np.sin(angle), z], axis=-1)
    pose = camera.look_at(jnp.asarray(place, jnp.float32), jnp.zeros(3), jnp.asarray([0, 0, 1.0]))
    lens = camera.pinhole(camera.ORBIT_FOV, size, size)
    ones = jnp.ones(count, jnp.int32)
    return camera.Camera(pose, jnp.broadcast_to(lens, (count, 3, 3)), size * ones, size * ones)


def shell(triangles: Triangles, depths: Depths, count: int, seed: int) -> Shell:
    """Up to `count` points of a surface, evenly by area, that one of the views shows.

    Raises ValueError if there is none.
    """
    normal = topology.cross(triangles)
    length = np.linalg.norm(normal, axis=1)
    random = np.random.default_rng(seed)
    ends = np.cumsum(length)
    place = np.searchsorted(ends, random.uniform(0.0, ends[-1], _SPARE * count), side="right")
    place = np.minimum(place, len(ends) - 1)
    # Uniform in a triangle: the square root turns shares of its area into shares of its height.
    along, across = np.sqrt(random.uniform(size=len(place))), random.uniform(size=len(place))
    weights = np.stack([1.0 - along, along * (1.0 - across), along * across], axis=1)
    corners = triangles.vertices[triangles.faces[place]].astype(np.float64)
    points = np.einsum("nk,nkd->nd", weights, corners)
    normals = normal[place] / np.maximum(length[place], 1e-300)[:, None]
    kept = np.flatnonzero(shown(depths, points, normals))[:count]
    if not len(kept):
        raise ValueError("no view shows any of the surface")
    return Shell(points[kept], normals[kept], depths)


def shown(depths: Depths, points: np.ndarray, normals: np.ndarray) -> Bool[np.ndarray, "n"]:
    """Which points of a surface at least one view shows."""
    arrays = (jnp.asarray(array, jnp.float32) for array in (points, normals))
    return np.asarray(_shown(depths.cameras, depths.inverse, *arrays, depths.supersample))


@partial(jax.jit, static_argnums=4)
def _shown(
    cameras: camera.Camera,
    inverse: Float[Array, "v h w"],
    points: Float[Array, "n 3"],
    normals: Float[Array, "n 3"],
    supersample: int,
) -> Bool[Array, "n"]:
    def add(found: Array, view: tuple[camera.Camera, Array]) -> tuple[Array, None]:
        lens, picture = view
        there, depth = _look_up(lens, picture, points, supersample)
        ray = camera.position(lens)[None] - points
        cosine = jnp.abs((ray * normals).sum(axis=1)) / jnp.linalg.norm(ray, axis=1)
        sample = depth / (lens.intrinsics[0, 0] * supersample)
        slack = sample * (1.0 + 1.0 / jnp.maximum(cosine, GRAZING))
        near = jnp.abs(1.0 / jnp.where(there > 0, there, 1.0) - depth) <= slack
        return found | ((there > 0) & (cosine > GRAZING) & near), None

    return lax.scan(add, jnp.zeros(len(points), bool), (cameras, inverse))[0]


@partial(jax.jit, static_argnums=3)
def _solid(
    cameras: camera.Camera,
    inverse: Float[Array, "v h w"],
    points: Float[Array, "n 3"],
    supersample: int,
) -> Bool[Array, "n"]:
    def cut(found: Array, view: tuple[camera.Camera, Array]) -> tuple[Array, None]:
        return found & (_look_up(*view, points, supersample)[0] > 0), None

    return lax.scan(cut, jnp.ones(len(points), bool), (cameras, inverse))[0]


def _look_up(
    lens: camera.Camera, picture: Float[Array, "h w"], points: Array, supersample: int
) -> tuple[Float[Array, "n"], Float[Array, "n"]]:
    """The picture's nearest sample, 0 beyond its border, and the points' own depths."""
    pixels, depth, _ = carve.see(lens, points)
    index = jnp.floor(pixels * supersample).astype(jnp.int32)
    height, width = picture.shape
    column, row = jnp.clip(index[:, 0], 0, width - 1), jnp.clip(index[:, 1], 0, height - 1)
    within = (index[:, 0] == column) & (index[:, 1] == row) & (depth > 0)
    return jnp.where(within, picture[row, column], 0.0), depth


def iou(truth: Shell, made: Shell, grid: int) -> float:
    """Of both solids, on a grid of `grid` samples a side around the points of both."""
    both = np.concatenate([truth.points, made.points])
    low, high = both.min(axis=0), both.max(axis=0)
    # A solid seen from finitely many directions reaches out beyond the surface.
    side = 1.1 * (high - low).max()
    steps = ((np.arange(grid) + 0.5) / grid - 0.5) * side
    points = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    points = jnp.asarray(points + 0.5 * (low + high), jnp.float32)
    solids = []
    for depths in (truth.depths, made.depths):
        solid = _solid(depths.cameras, depths.inverse, points, depths.supersample)
        solids.append(np.asarray(solid))
    return float((solids[0] & solids[1]).sum() / max((solids[0] | solids[1]).sum(), 1))


def extent(truth: Shell) -> float:
    """The longest edge of the box around the true points, which is the unit of distances."""
    return float((truth.points.max(axis=0) - truth.points.min(axis=0)).max())


def compare(truth: Shell, made: Shell, seen: Bool[np.ndarray, "n"], grid: int) -> Scores:
    """`seen` says which of the true points the fitted frames show."""
    from scipy import spatial

    unit = extent(truth)
    there, nearest_made = spatial.cKDTree(made.points).query(truth.points, workers=-1)
    back, nearest_true = spatial.cKDTree(truth.points).query(made.points, workers=-1)
    there, back = there / unit, back / unit
    marks = []
    for threshold in THRESHOLDS:
        recall, precision = float((there < threshold).mean()), float((back < threshold).mean())
        marks.append(2.0 * recall * precision / max(recall + precision, 1e-9))
    cosines = [
        np.abs((truth.normals * made.normals[nearest_made]).sum(axis=1)).mean(),
        np.abs((made.normals * truth.normals[nearest_true]).sum(axis=1)).mean(),
    ]
    near = seen[nearest_true]
    parts = [there[seen].mean(), back[near].mean()] if seen.any() and near.any() else [np.nan]
    return Scores(
        chamfer=0.5 * float(there.mean() + back.mean()),
        f_scores=tuple(marks),
        iou=iou(truth, made, grid),
        normals=0.5 * float(sum(cosines)),
        chamfer_seen=float(np.mean(parts)),
    )
