"""Tests run on eight simulated CPU devices with strict ranks and a compilation cache."""

import os
import tempfile
from pathlib import Path

import jax
import pytest

jax.config.update("jax_platforms", os.environ.get("V3D_TEST_PLATFORM", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "v3d_jax_test")),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)
