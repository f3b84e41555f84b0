"""A tiny orbit data set of noise, so that every frame of every orbit is different."""

import numpy as np
import pytest

from v3d_jax.data import orbits, png

VIEWS, SIZE, OBJECTS = 6, 16, 5


def noise_orbit(index: int, views: int = VIEWS, size: int = SIZE) -> orbits.Orbit:
    rng = np.random.default_rng(index)
    pixels = rng.integers(0, 256, (views, size, size, 4), dtype=np.uint8)
    return orbits.Orbit(
        name=f"shelf/objet é{index}",
        variant=index % 2,
        frames=[png.encode(frame) for frame in pixels],
        world_to_camera=rng.normal(size=(views, 4, 4)).astype(np.float32),
        intrinsics=rng.normal(size=(views, 3, 3)).astype(np.float32),
        azimuths=(10.0 * index + 360.0 / views * np.arange(views)).astype(np.float32),
        elevation=float(index),
    )


@pytest.fixture(scope="session")
def noise_orbits() -> list[orbits.Orbit]:
    return [noise_orbit(index) for index in range(OBJECTS)]


@pytest.fixture(scope="session")
def orbit_folder(noise_orbits, tmp_path_factory):
    """Five orbits in "train", one of them also in "heldout"."""
    path = tmp_path_factory.mktemp("orbits") / "set"
    records = [("train", orbit) for orbit in noise_orbits] + [("heldout", noise_orbits[3])]
    orbits.build(path, iter(records), views=VIEWS, size=SIZE)
    return path
