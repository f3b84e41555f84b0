"""A small data set of scenes: painted skies far away, seen along arcs."""

from pathlib import Path

import numpy as np

from v3d_jax.data import orbits, png
from v3d_jax.ops import camera, rays

VIEWS = 6


def build(path: Path, *, train: int = 4, heldout: int = 1, size: int = 16) -> Path:
    """Writes a data set in the package's format with two splits."""
    records = (
        ("train" if index < train else "heldout", scene(index, size))
        for index in range(train + heldout)
    )
    orbits.build(path, records, views=VIEWS, size=size)
    return path


def cameras(index: int, size: int) -> camera.Camera:
    """Ten degrees a frame about a scene of its own size."""
    whole = camera.orbit(
        36, width=size, height=size, radius=1.0 + index, start_azimuth=50.0 * index
    )
    return camera.Camera(*(field[:VIEWS] for field in whole))


def scene(index: int, size: int) -> orbits.Orbit:
    """The record of one scene."""
    seen = cameras(index, size)
    directions = np.asarray(rays.pixel_rays(seen, (size, size)).directions)
    rng = np.random.default_rng(index)
    waves = np.sin(directions @ rng.normal(0.0, 3.0, (3, 3)) + rng.uniform(0.0, 6.0, 3))
    frames = np.round(127.5 + 127.5 * waves).astype(np.uint8)
    return orbits.Orbit(
        name=f"sky-{index}",
        variant=0,
        frames=[png.encode(frame) for frame in frames],
        world_to_camera=np.asarray(seen.world_to_camera),
        intrinsics=np.asarray(seen.intrinsics),
        azimuths=np.zeros(VIEWS, np.float32),
        elevation=0.0,
    )
