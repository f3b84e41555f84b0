"""Binning alone, by XLA and by the Triton kernels, stage by stage, on one NVIDIA GPU.

Scenes are those of `splat_raster.py`, projected beforehand. For each it prints, as it goes,

- whole binning: milliseconds by XLA, and by the kernels with and without what only gradients need;
  whether the kernels' lists are XLA's and whether two runs are equal to the bit. Compilers contract
  products and sums each in their way, so a tile whose test falls within rounding of its bound may
  be listed by one alone: the number of those is told. No pixel of such a tile is seen to change;
- on `--stages`: every stage as a program of its own, whose inputs and outputs go through memory;
- on `--variants`: emission with other numbers of slots and warps a program.

A time is the median of five, each of `--repeats` calls in a row. What fails says why, and the rest
goes on. Run `python benchmarks/splat_binning.py` with the extra `cuda`; on a CPU only XLA's columns
come, with `--splats 2000 --size 128 --repeats 3 --scenes shell-2 --stages shell-2`.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import splat_kernels
from splat_kernels import Subject, each_ms

from v3d_jax.ops import binning
from v3d_jax.splat import bin as bins
from v3d_jax.splat import rasterize
from v3d_jax.splat.kernels import launches, nvidia, nvidia_bin
from v3d_jax.splat.kernels.nvidia_bin import Settings

GOAL = 0.6  # milliseconds of the stages from counts to offsets, 18 views
STAGES = ("depth sort", "boxes", "scan of counts", "emission", "tile sort", "offsets", "positions")
SLOTS = STAGES[2:6]  # those of the goal

State = dict[str, Any]
Stage = Callable[[State], State]


def project(subject: Subject) -> State:
    """What binning takes."""
    gaussians, camera = subject.case.gaussians, subject.case.camera

    def run(gaussians: Any, camera: Any) -> State:
        projection = rasterize.project_gaussians(gaussians, camera, subject.config)
        return {
            "projection": projection,
            "log_opacity": jax.nn.log_sigmoid(gaussians.opacity_logits),
        }

    return jax.block_until_ready(jax.jit(run)(gaussians, camera))


def size(subject: Subject) -> tuple[int, int]:
    return subject.config.width, subject.config.height


def shared_stages(subject: Subject) -> dict[str, Stage]:
    """Those that both ways take."""

    def depth_sort(s: State) -> State:
        found = bins.by_depth(s["projection"], s["log_opacity"], subject.tiles)
        return dict(zip(("order", "distance"), found, strict=True))

    def boxes(s: State) -> State:
        arguments = (s["projection"], s["order"], s["distance"], size(subject))
        return {"boxes": bins.boxes_in_order(*arguments)}

    return {"depth sort": depth_sort, "boxes": boxes}


def plain_stages(subject: Subject) -> dict[str, Stage]:
    """The stages of `bin.bin_splats`."""
    tiles, capacity = subject.tiles, subject.config.slots

    def view(s: State) -> jax.Array:
        return s["order"] // s["projection"].depth.shape[1]

    def scan(s: State) -> State:
        end = jnp.cumsum(s["boxes"].count)
        ends = (end - s["boxes"].count, end)
        ends = tuple(jnp.clip(part, 0, capacity) for part in ends)
        return {"runs": binning.expand(s["boxes"].count, capacity), "ends": ends}

    def emission(s: State) -> State:
        return {"key": bins.tile_keys(s["boxes"], s["runs"], view(s), tiles, size(subject))}

    def tile_sort(s: State) -> State:
        tile, slot = bins.by_tile(s["key"], s["boxes"], view(s), tiles)
        owner = jnp.maximum(s["runs"].owner, 0)
        return {"tile": tile, "slot": slot, "rank": owner[slot]}

    def offsets(s: State) -> State:
        return {"offsets": binning.sorted_offsets(s["tile"], tiles.tiles)}

    found = (scan, emission, tile_sort, offsets)
    return shared_stages(subject) | dict(zip(SLOTS, found, strict=True))


def kernel_stages(subject: Subject, settings: Settings) -> dict[str, Stage]:
    """The stages of `nvidia_bin.bin_splats`."""
    tiles, capacity = subject.tiles, subject.config.slots

    def scan(s: State) -> State:
        start, end = nvidia_bin.runs(settings, s["boxes"].count, capacity)
        (edge,) = launches.run(nvidia_bin.edges(settings, end, capacity))
        return {"runs": (edge, start, end)}

    def emission(s: State) -> State:
        count = s["projection"].depth.shape[1]
        of_all = (s["order"], s["boxes"], count, tiles, size(subject), capacity)
        key, owner = launches.run(nvidia_bin.emit(settings, s["runs"], *of_all))
        return {"key": key, "owner": owner}

    def tile_sort(s: State) -> State:
        tile, rank = binning.sort_by_key(s["key"], s["owner"])
        return {"tile": tile, "rank": rank}

    def offsets(s: State) -> State:
        first = s["distance"][: tiles.views * s["projection"].depth.shape[1]]
        second = jnp.sum(first > 0.0, dtype=jnp.int32)
        of_slots = (s["tile"], s["rank"], second, tiles)
        return {"offsets": launches.run(nvidia_bin.offsets(settings, *of_slots))[0]}

    def positions(s: State) -> State:
        of_slots = (s["runs"][1], s["tile"], s["rank"], tiles)
        return {"slot": nvidia_bin.positions(s["boxes"], *of_slots)}

    found = (scan, emission, tile_sort, offsets, positions)
    return shared_stages(subject) | dict(zip(STAGES[2:], found, strict=True))


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {''.join(str(error).strip().splitlines()[:1])[:120]}"


def timed(stage: Stage, state: State, repeats: int) -> tuple[State, float]:
    """What a stage gives, and milliseconds a call."""
    program = jax.jit(stage)
    return program(state), each_ms(functools.partial(program, state), repeats)


def whole(subject: Subject, way: Callable[..., bins.Bins], *, positions: bool = True) -> Stage:
    """All of binning as one program."""

    def run(s: State) -> State:
        of_scene = (s["projection"], s["log_opacity"], size(subject), subject.config.slots)
        found = way(*of_scene)._asdict()
        return found if positions else found | {"slot": None}

    return run


def print_whole(subject: Subject, state: State, repeats: int) -> None:
    print("\n| binning, whole | ms |\n|---|---|")
    found = {}
    for name, stage in {
        "XLA": whole(subject, bins.bin_splats),
        "Triton": whole(subject, nvidia_bin.bin_splats),
        "Triton, no gradient": whole(subject, nvidia_bin.bin_splats, positions=False),
    }.items():
        try:
            found[name], spent = timed(stage, state, repeats)
        except Exception as error:  # the other ways are told all the same
            print(f"| {name} | {reason(error)} |", flush=True)
            continue
        print(f"| {name} | {spent:.3f} |", flush=True)
        if name == "Triton":
            again = jax.jit(stage)(state)
            same = all(bool(jnp.all(again[k] == found[name][k])) for k in again)
            print(f"| Triton twice | {'equal to the bit' if same else 'NOT EQUAL'} |")
    if "XLA" in found and "Triton" in found:
        print(compared(found["XLA"], found["Triton"]), flush=True)


def compared(plain: State, ours: State) -> str:
    """How many entries of lists differ, and in how many slots the tests of tiles do."""
    parts = []
    for name in ("order", "run_start", "run_end", "offsets", "total"):
        parts.append(f"{name} {int(jnp.sum(plain[name] != ours[name]))}")
    valid, capacity = int(plain["offsets"][-1]), plain["slot"].shape[0]
    for name in ("rank", "slot"):
        parts.append(f"{name} {int(jnp.sum((plain[name] != ours[name])[:valid]))}")
    listed = [
        jnp.zeros(capacity, bool).at[s["slot"]].max(jnp.arange(capacity) < s["offsets"][-1])
        for s in (plain, ours)
    ]
    tests = int(jnp.sum(listed[0] != listed[1]))
    return f"entries that differ: {', '.join(parts)}; {tests} of {valid:,} tests of tiles"


def print_stages(subject: Subject, given: State, repeats: int) -> State:
    """Times of every stage of both ways; the state that the kernels reached."""
    print(f"\n| stage, {subject.name} | XLA ms | Triton ms |\n|---|---|---|")
    ways = {"XLA": plain_stages(subject), "Triton": kernel_stages(subject, Settings())}
    states = {way: dict(given) for way in ways}
    spent = {way: {} for way in ways}
    failed = set()
    for stage in STAGES:
        cells = []
        for way, stages in ways.items():
            if stage not in stages or way in failed:
                cells.append("-")
                continue
            try:
                made, spent[way][stage] = timed(stages[stage], states[way], repeats)
            except Exception as error:  # the other way goes on
                failed.add(way)
                cells.append(reason(error))
                continue
            states[way] |= made
            cells.append(f"{spent[way][stage]:.3f}")
        print(f"| {stage} | {' | '.join(cells)} |", flush=True)
    sums = [
        f"{sum(found[s] for s in SLOTS):.3f}" if set(SLOTS) <= set(found) else "-"
        for found in spent.values()
    ]
    print(f"| scan to offsets (goal: {GOAL}) | {' | '.join(sums)} |", flush=True)
    return states["Triton"]


def emission(subject: Subject, settings: Settings, s: State) -> State:
    """Emission and what depends on the same settings."""
    _, start, end = s["runs"]
    (edge,) = launches.run(nvidia_bin.edges(settings, end, subject.config.slots))
    return kernel_stages(subject, settings)["emission"](s | {"runs": (edge, start, end)})


def print_variants(subject: Subject, state: State, repeats: int) -> None:
    print(f"\n| emission, {subject.name} | ms with edges |\n|---|---|")
    for slots, warps in itertools.product((256, 512, 1024), (2, 4, 8)):
        both = functools.partial(emission, subject, Settings(slots=slots, warps=warps))
        try:
            made, spent = timed(both, state, repeats)
        except Exception as error:  # a variant that does not fit the card is left out
            print(f"| slots={slots}, warps={warps} | {reason(error)} |", flush=True)
            continue
        same = bool(jnp.all(made["key"] == state["key"]))
        print(f"| slots={slots}, warps={warps} | {spent:.3f}{'' if same else ', DIFFERS'} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--splats", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=512, help="pixels, width and height")
    names = ["shell-18", "blob-18", "fitted-18", "shell-1"]
    parser.add_argument("--scenes", nargs="*", default=names)
    parser.add_argument("--stages", nargs="*", default=names[:2], help="whose stages to time")
    parser.add_argument("--variants", nargs="*", default=names[:2], help="whose emission to vary")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    begun = time.perf_counter()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; missing: {nvidia.missing()}")
    for name, subject in splat_kernels.find_subjects(options).items():
        print(f"\n## {name}, capacity {subject.config.slots:,}", flush=True)
        try:
            state = project(subject)
            print_whole(subject, state, options.repeats)
            if name in {*options.stages, *options.variants}:
                reached = print_stages(subject, state, options.repeats)
            if name in options.variants and "offsets" in reached:
                print_variants(subject, reached, options.repeats)
        except Exception as error:  # the next scene may do
            print(f"{name}: {reason(error)}")
        print(f"at {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
