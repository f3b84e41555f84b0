"""Solids of known shape seen by eighteen cameras at three elevations."""

import functools
from typing import NamedTuple

import fixtures
import jax.numpy as jnp
import numpy as np
import trimesh

from v3d_jax.mesh import rasterize, surface
from v3d_jax.ops import camera

SIZE, VIEWS = 128, 18
RASTER = rasterize.RasterConfig(width=SIZE, height=SIZE, supersample=1, rows=1 << 18)
_rasterize = fixtures.jit(functools.partial(rasterize.rasterize, config=RASTER))


class Solid(NamedTuple):
    mesh: trimesh.Trimesh
    faces: np.ndarray  # int32 [v, h, w]: face at every pixel, -1 for none
    masks: np.ndarray  # bool [v, h, w]


def cameras() -> camera.Camera:
    orbits = [
        camera.orbit(VIEWS // 3, width=SIZE, height=SIZE, elevation=tilt, start_azimuth=turn)
        for tilt, turn in ((0.0, 0.0), (35.0, 7.0), (-30.0, 14.0))
    ]
    return camera.Camera(*(jnp.concatenate(fields) for fields in zip(*orbits, strict=True)))


def see(mesh: trimesh.Trimesh, lenses: camera.Camera) -> Solid:
    """What the z-buffer sees at pixel centres."""
    # One size for all, so one program.
    geometry = surface.from_geometry(mesh.vertices, mesh.faces)
    sizes = {"vertices": 1100, "faces": 2100, "materials": 1, "textures": 0, "size": 64}
    seen = _rasterize(surface.pad(geometry, **sizes), lenses)
    assert not seen.overflow(RASTER)
    faces = np.asarray(seen.face)
    return Solid(mesh, faces, faces >= 0)


def two_boxes() -> trimesh.Trimesh:
    boxes = [
        trimesh.creation.box((0.3, 0.3, 0.3)).apply_translation((0.4, 0.0, 0.1)),
        trimesh.creation.box((0.3, 0.2, 0.4)).apply_translation((-0.3, 0.1, -0.2)),
    ]
    return trimesh.util.concatenate(boxes)


MESHES = {
    "sphere": lambda: trimesh.creation.icosphere(3, 0.5),
    "box": lambda: trimesh.creation.box((0.9, 0.6, 0.5)),
    "torus": lambda: trimesh.creation.torus(0.45, 0.15),
    "two boxes": two_boxes,
}
