"""Solids of known shape, rendered once; fused kernels, run or interpreted."""

import interpreted
import jax
import pytest
import solid_views

from v3d_jax.ops import camera
from v3d_jax.splat.kernels import launches, nvidia


@pytest.fixture(scope="session")
def lenses() -> camera.Camera:
    return solid_views.cameras()


@pytest.fixture(scope="session")
def solids(lenses) -> dict[str, solid_views.Solid]:
    return {name: solid_views.see(make(), lenses) for name, make in solid_views.MESHES.items()}


@pytest.fixture
def triton_kernels(monkeypatch) -> None:
    """Triton's kernels, run by the GPU where there is one, and interpreted elsewhere."""
    if jax.default_backend() == "gpu":
        assert nvidia.missing() is None
        return
    pytest.importorskip("triton", reason="the kernels' interpreter is triton's")
    monkeypatch.setattr(launches, "through_jax_triton", interpreted.launch)


@pytest.fixture(params=["triton", "pallas"])
def kernels(request) -> str:
    """What `RasterConfig.compositing` is to be for fused kernels that can be tried here."""
    if request.param == "triton":
        request.getfixturevalue("triton_kernels")
    elif jax.default_backend() == "gpu":
        pytest.skip("these kernels are for TPUs, and interpreted on CPUs")
    return request.param
