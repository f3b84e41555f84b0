"""Tests run on eight simulated CPU devices with strict ranks and a compilation cache."""

import os
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

# Half the time to compile on a CPU, operations outside of jit as well. Read when jax is imported;
# from 0.11 on there are only the new emitters, and no flag for them: XLA would end the program.
PLATFORM = os.environ.get("V3D_TEST_PLATFORM", "cpu")
OLD_EMITTERS = tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11)
if PLATFORM == "cpu":
    FAST_COMPILE = "--xla_backend_optimization_level=1"
    FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false" if OLD_EMITTERS else ""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILE}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402

# Some tests lay programs for GPUs out over several devices, of which CPUs can be simulated.
jax.config.update("jax_platforms", "cpu" if PLATFORM == "cpu" else f"{PLATFORM},cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "v3d_jax_test")),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# Linux allows a process 65,530 memory maps. Compiled programs take some each, and XLA crashes when
# there are no more.
MAPS, MOST_MAPS = Path("/proc/self/maps"), 30_000


@pytest.fixture(scope="module", autouse=True)
def room_for_programs() -> Iterator[None]:
    """Forgets compiled programs after a file of tests once they are too many."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)
