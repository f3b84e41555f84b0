"""Solids of known shape, rendered once."""

import pytest
import solid_views

from v3d_jax.ops import camera


@pytest.fixture(scope="session")
def lenses() -> camera.Camera:
    return solid_views.cameras()


@pytest.fixture(scope="session")
def solids(lenses) -> dict[str, solid_views.Solid]:
    return {name: solid_views.see(make(), lenses) for name, make in solid_views.MESHES.items()}
