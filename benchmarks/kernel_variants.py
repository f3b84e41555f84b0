"""Ways to build the NVIDIA kernels of compositing, for `splat_kernels.py` to time."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from v3d_jax.splat.kernels.nvidia import Settings

# What the fastest variant of each kernel decides.
DECIDES = {
    "forward": ("chunk", "warps"),
    "owners": ("owners", "slots", "many", "warps_gather"),
    "backward": ("chunk_back", "warps_back", "saved"),
}


class Variant(NamedTuple):
    """One way to build a kernel."""

    settings: Settings
    registers: int | None = None  # most a thread may have
    module: str | None = None  # of another form of the kernel

    def __str__(self) -> str:
        given = self.settings._asdict().items()
        parts = [f"{k}={v}" for k, v in given if v != Settings._field_defaults[k]]
        parts += [f"registers={self.registers}"] if self.registers else []
        return ", ".join(parts + ([self.module] if self.module else [])) or "default"


def forward_variants() -> list[Variant]:
    sizes = ((16, 1), (8, 1), (32, 1), (16, 2), (8, 2))
    found = [Variant(Settings(chunk=chunk, warps=warps)) for chunk, warps in sizes]
    return [*found, Variant(Settings(), 96), Variant(Settings(chunk=4), None, "triton_loop")]


def backward_variants() -> list[Variant]:
    sizes = ((16, 1), (8, 1), (16, 2), (16, 4), (32, 2))
    found = [Variant(Settings(chunk_back=chunk, warps_back=warps)) for chunk, warps in sizes]
    limited = [Variant(found[i].settings, most) for i, most in ((0, 168), (0, 128), (1, 128))]
    return [*found, *limited, Variant(Settings(saved=True))]


def owner_variants() -> list[Variant]:
    sizes = ((16, 4, 16, 4), (16, 4, 4, 4), (32, 4, 16, 4), (8, 4, 16, 1))
    names = ("owners", "slots", "many", "warps_gather")
    return [Variant(Settings(**dict(zip(names, size, strict=True)))) for size in sizes]


@contextlib.contextmanager
def at_most(registers: int | None) -> Iterator[None]:
    """Triton kernels compiled in this block use no more registers a thread."""
    if registers is None:
        yield
        return
    from triton.backends.nvidia.compiler import CUDABackend

    plain = CUDABackend.parse_options

    def parse(self: Any, options: dict[str, Any]) -> Any:
        return plain(self, {**options, "maxnreg": registers})

    with mock.patch.object(CUDABackend, "parse_options", parse), fresh_kernels():
        yield


@contextlib.contextmanager
def fresh_kernels() -> Iterator[None]:
    """jax-triton's memories of compiled kernels, which know nothing of registers, emptied."""
    from jax_triton import triton_lib

    from v3d_jax.splat.kernels import owners, tiles

    memories = [getattr(triton_lib, "_COMPILED_KERNEL_CACHE", {})]  # before 0.4
    memories += [
        getattr(kernel, "_jT_kernel_cache", {})
        for kernel in (tiles.forward, tiles.backward, owners.gather)
    ]
    kept = [dict(memory) for memory in memories]
    for memory in memories:
        memory.clear()
    try:
        yield
    finally:
        for memory, before in zip(memories, kept, strict=True):
            memory.clear()
            memory.update(before)


def fastest(timed: dict[str, list[dict[Variant, float]]]) -> Settings:
    """Settings of the variants that take the least, kernel by kernel; geometric mean of scenes."""
    chosen = Settings()
    for kernel, fields in DECIDES.items():
        tables = [table for table in timed[kernel] if table]
        common = set.intersection(*(set(table) for table in tables)) if tables else set()
        if not common:
            continue
        best = min(common, key=lambda v: float(np.prod([table[v] for table in tables])))
        chosen = chosen._replace(**{name: getattr(best.settings, name) for name in fields})
    return chosen._replace(chunk=chosen.chunk_back) if chosen.saved else chosen
