"""A small orbit data set of shaded discs that turn, each in a colour of its own."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from v3d_jax.data import orbits

VIEWS = 6


def build(path: Path, *, train: int = 10, heldout: int = 2, size: int = 16) -> Path:
    """Writes a data set in the package's format with two splits."""
    records = (
        ("train" if index < train else "heldout", _orbit(index, size))
        for index in range(train + heldout)
    )
    orbits.build(path, records, views=VIEWS, size=size)
    return path


def _orbit(index: int, size: int) -> orbits.Orbit:
    return orbits.Orbit(
        name=f"disc-{index}",
        variant=0,
        frames=[_png(index, view, size) for view in range(VIEWS)],
        world_to_camera=np.tile(np.eye(4, dtype=np.float32), (VIEWS, 1, 1)),
        intrinsics=np.tile(np.eye(3, dtype=np.float32), (VIEWS, 1, 1)),
        azimuths=np.arange(VIEWS, dtype=np.float32) * (360.0 / VIEWS),
        elevation=0.0,
    )


def _png(index: int, view: int, size: int) -> bytes:
    y, x = np.mgrid[:size, :size] / (size - 1) - 0.5
    light = 0.5 + 0.5 * np.cos(np.arctan2(y, x) - 2 * np.pi * view / VIEWS)
    colour = np.random.default_rng(index).uniform(0.1, 0.9, 3)
    rgb = colour * light[..., None]
    rgba = np.concatenate([rgb, (np.hypot(x, y) < 0.4)[..., None]], axis=-1)
    file = io.BytesIO()
    Image.fromarray(np.round(255 * rgba).astype(np.uint8)).save(file, "png")
    return file.getvalue()
