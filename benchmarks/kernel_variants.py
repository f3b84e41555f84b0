"""Ways to build the NVIDIA kernels of compositing, for `splat_kernels.py` to time."""

from typing import NamedTuple

import numpy as np

from v3d_jax.splat.kernels.nvidia import Settings

# What the fastest variant of each kernel decides.
DECIDES = {
    "forward": ("chunk", "warps"),
    "owners": ("owners", "slots", "warps_gather"),
    "backward": ("chunk_back", "warps_back", "registers_back", "saved"),
}


class Variant(NamedTuple):
    """One way to build a kernel."""

    settings: Settings
    module: str | None = None  # of another form of the kernel

    def __str__(self) -> str:
        given = self.settings._asdict().items()
        parts = [f"{k}={v}" for k, v in given if v != Settings._field_defaults[k]]
        return ", ".join(parts + ([self.module] if self.module else [])) or "default"


def forward_variants() -> list[Variant]:
    sizes = ((16, 1), (8, 1), (32, 1), (16, 2), (8, 2))
    found = [Variant(Settings(chunk=chunk, warps=warps)) for chunk, warps in sizes]
    return [*found, Variant(Settings(chunk=4), "triton_loop")]


def backward_variants() -> list[Variant]:
    """Of these `registers_back` is known to jax-triton since 0.4."""
    most = [Variant(Settings(registers_back=most)) for most in (None, 200, 168, 152, 144, 128)]
    sizes = ((8, 1, 128), (16, 2, None), (16, 4, None), (32, 2, None), (32, 2, 168))
    names = ("chunk_back", "warps_back", "registers_back")
    found = [Variant(Settings(**dict(zip(names, size, strict=True)))) for size in sizes]
    return [*most, *found, Variant(Settings(saved=True))]


def owner_variants() -> list[Variant]:
    sizes = ((16, 4, 4), (16, 2, 4), (16, 8, 4), (32, 4, 4), (8, 4, 2))
    names = ("owners", "slots", "warps_gather")
    return [Variant(Settings(**dict(zip(names, size, strict=True)))) for size in sizes]


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
