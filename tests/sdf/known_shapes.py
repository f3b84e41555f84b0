"""Shapes given by distance functions, their views by sphere tracing, and scores of fields."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import trimesh
from scipy.spatial import cKDTree
from skimage import measure

from v3d_jax.ops import camera

REACH = 0.75  # half side of the cube that holds every shape
VIEWS = 18


def sphere(points):
    return np.linalg.norm(points, axis=-1) - 0.5


def torus(points):
    """Around the x axis, so that cameras at the sides see through it."""
    ring = np.hypot(points[..., 1], points[..., 2]) - 0.45
    return np.hypot(ring, points[..., 0]) - 0.15


def bumpy(points):
    """A sphere with bumps; its gradient is up to 1.3 long, hence the factor."""
    radius = np.linalg.norm(points, axis=-1)
    x, y, z = np.moveaxis(points / np.maximum(radius, 1e-9)[..., None], -1, 0)
    return 0.75 * (radius - 0.5 - 0.05 * np.sin(6 * x) * np.cos(5 * y) * np.cos(4 * z))


def box(points):
    """1 x 0.7 x 0.8 with a round hole through the middle, along y."""
    beyond = np.abs(points) - np.array([0.5, 0.35, 0.4])
    outside = np.linalg.norm(np.maximum(beyond, 0.0), axis=-1)
    hole = 0.2 - np.hypot(points[..., 0], points[..., 2])
    return np.maximum(outside + np.minimum(beyond.max(axis=-1), 0.0), hole)


SHAPES = {"sphere": sphere, "torus": torus, "bumpy": bumpy, "box": box}
EULER = {"sphere": 2, "torus": 0, "bumpy": 2, "box": 0}


class Views(NamedTuple):
    images: np.ndarray  # uint8 [v, h, w, 3], black where nothing is
    masks: np.ndarray  # bool [v, h, w]
    cameras: camera.Camera


class Score(NamedTuple):
    chamfer: float  # mean of both ways' mean distance to the other surface
    normals: float  # mean cosine between a surface's normals and the other's nearest
    iou: float
    euler: int
    parts: int
    watertight: bool


def cameras(size, count=VIEWS):
    """A third of the views at each of three elevations (from one, lids are never seen).

    Two of them look along y, through the hole of the box.
    """
    orbits = [
        camera.orbit(count // 3, width=size, height=size, elevation=tilt, start_azimuth=turn)
        for tilt, turn in ((0.0, 30.0), (35.0, 37.0), (-30.0, 44.0))
    ]
    return camera.Camera(*(jnp.concatenate(fields) for fields in zip(*orbits, strict=True)))


def paint(points, textured):
    if not textured:
        return np.broadcast_to([0.8, 0.5, 0.3], points.shape)
    x, y, z = np.moveaxis(points, -1, 0)
    waves = [np.sin(9 * x + 2 * y), np.sin(8 * y - 3 * z), np.cos(7 * z + 4 * x)]
    return 0.5 + 0.35 * np.stack(waves, axis=-1)


def see(shape, size, *, textured=True, count=VIEWS):
    """What pixel centres see, by steps of the distance."""
    lenses = cameras(size, count)
    images, masks = [], []
    for pose, intrinsics in zip(lenses.world_to_camera, lenses.intrinsics, strict=True):
        pose, intrinsics = np.asarray(pose, np.float64), np.asarray(intrinsics, np.float64)
        x, y = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5)
        x, y = (x - intrinsics[0, 2]) / intrinsics[0, 0], (y - intrinsics[1, 2]) / intrinsics[1, 1]
        rays = (np.stack([x, y, np.ones_like(x)], axis=-1) @ pose[:3, :3]).reshape(-1, 3)
        rays /= np.linalg.norm(rays, axis=1, keepdims=True)
        origin = -pose[:3, :3].T @ pose[:3, 3]
        distance = np.full(len(rays), 1.0)
        hit, going = np.zeros(len(rays), bool), np.arange(len(rays))
        for _ in range(150):
            ahead = shape(origin + distance[going, None] * rays[going])
            distance[going] += ahead
            hit[going[ahead < 2e-4]] = True
            going = going[(ahead >= 2e-4) & (distance[going] < 3.0)]
        colors = paint(origin + distance[:, None] * rays, textured) * hit[:, None]
        images.append((255.0 * colors + 0.5).astype(np.uint8).reshape(size, size, 3))
        masks.append(hit.reshape(size, size))
    return Views(np.stack(images), np.stack(masks), lenses)


def grid(distance, side):
    """Values of a function of points [n, 3] on a cubic grid of `side` points along each axis."""
    steps = np.linspace(-REACH, REACH, side, dtype=np.float32)
    places = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    return np.array(distance(places), np.float32).reshape(side, side, side)


def mesh_of(values):
    step = 2.0 * REACH / (len(values) - 1)
    vertices, faces, _, _ = measure.marching_cubes(values, 0.0, spacing=(step,) * 3)
    # Meshes wind the other way round.
    return trimesh.Trimesh(vertices - REACH, faces[:, ::-1], process=False)


def score(distance, shape, side=160, samples=60_000):
    """Compares the surface of a fitted distance with a shape's.

    Distances go along the nearest sample's normal, which takes away what samples lie apart.
    """
    values = [grid(one, side) for one in (distance, shape)]
    inside = [one < 0.0 for one in values]
    meshes = [mesh_of(one) for one in values]
    points, normals = [], []
    for seed, mesh in enumerate(meshes):
        found, faces = trimesh.sample.sample_surface(mesh, samples, seed=seed)
        points.append(found)
        normals.append(mesh.face_normals[faces])
    apart, facing = [], []
    for one, other in ((0, 1), (1, 0)):
        _, nearest = cKDTree(points[other]).query(points[one])
        offset = points[one] - points[other][nearest]
        apart.append(np.abs((offset * normals[other][nearest]).sum(axis=1)).mean())
        facing.append((normals[one] * normals[other][nearest]).sum(axis=1).mean())
    return Score(
        float(np.mean(apart)),
        float(np.mean(facing)),
        float((inside[0] & inside[1]).sum() / (inside[0] | inside[1]).sum()),
        meshes[0].euler_number,
        len(meshes[0].split(only_watertight=False)),
        meshes[0].is_watertight,
    )
