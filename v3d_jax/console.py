"""What the command lines of a run share: progress bars, times, kept programs, the machine."""

import contextlib
import os
import platform
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from v3d_jax import __version__

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "pillow")
_FORM = "{desc} {bar:30} {n_fmt}/{total_fmt} {elapsed}<{remaining}"


@contextlib.contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Puts the time that its block takes into `seconds`."""
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


@contextlib.contextmanager
def progress(seconds: dict[str, float], stage: str, steps: int) -> Iterator[tqdm]:
    """A progress bar of a stage, and its time."""
    with timed(seconds, stage), tqdm(total=steps, desc=f"{stage:7}", bar_format=_FORM) as bar:
        yield bar


def note(text: str) -> None:
    """A remark for the user, one line on stderr."""
    print(f"note: {text}", file=sys.stderr)


def machine(seconds: dict[str, float]) -> dict[str, Any]:
    """A report's entries on versions, device, seconds a stage and peak memory in bytes."""
    device = jax.devices()[0]
    return {
        "versions": {
            "v3d_jax": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _PACKAGES},
        },
        "device": {"platform": device.platform, "kind": device.device_kind},
        "seconds": {stage: round(spent, 3) for stage, spent in seconds.items()},
        "peak_memory": {
            "host": peak_host_memory(),
            "device": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        },
    }


def peak_host_memory() -> int | None:
    """Peak resident memory of this process in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kibibytes, except on macOS.
    return peak if sys.platform == "darwin" else 1024 * peak


def enable_cache() -> None:
    """Keeps compiled programs between runs, unless JAX was told of a folder already.

    The folder is v3d_jax/jax in $XDG_CACHE_HOME or ~/.cache; where it cannot be written nothing is
    kept.
    """
    # cuDNN's attention over several GPUs has a pointer in its program, which no other process would
    # find again in either folder. What it leads to is told by shapes: attention has one scale.
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
    if jax.config.jax_compilation_cache_dir is not None:
        return
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(root) / "v3d_jax" / "jax"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(path, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
