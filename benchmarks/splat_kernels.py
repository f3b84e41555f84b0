"""The NVIDIA kernels of compositing, one by one and built in several ways, on one GPU.

Scenes are those of `splat_raster.py`, with Gaussians binned once. For each it prints, as it goes,

- on `--variants`: the forward kernel, the backward kernel and the sum over owners, each alone and
  built in several ways: milliseconds a launch, and how far results are from the plain path's
  (largest difference of an image; relative norm of the difference of a gradient);
- on `--scenes`: rasterizing forward, and forward and backward, by XLA and by the kernels as they
  are the fastest, how far the kernels' gradients are from XLA's, whether two runs of the kernels
  are equal to the bit, and, where gsplat is there, gsplat's times on the same inputs; on
  `--profile` where the time goes. `splat_agreement.py` compares with gsplat's results.

A scene's name is its kind and the number of views. A variant that does not compile prints why and
is left out. Run `python benchmarks/splat_kernels.py` on an NVIDIA GPU with the extra `cuda`.
"""

import argparse
import dataclasses
import functools
import importlib
import os
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any, NamedTuple
from unittest import mock

import gpu_kernels
import jax
import jax.numpy as jnp
import splat_raster
from kernel_variants import (
    Variant,
    backward_variants,
    fastest,
    forward_variants,
    owner_variants,
)
from splat_raster import Case

from v3d_jax.ops import camera as cameras
from v3d_jax.splat import bin as bins
from v3d_jax.splat import composite, rasterize
from v3d_jax.splat import gaussians as splats
from v3d_jax.splat.kernels import launches, nvidia
from v3d_jax.splat.kernels.nvidia import Settings

WRONG = 1e-3  # differences that are not rounding


class Prepared(NamedTuple):
    """A scene that is projected and binned, and what the plain path makes of it."""

    fields: tuple[jax.Array, ...]
    bins: bins.Bins
    rows: jax.Array
    cotangents: tuple[jax.Array, jax.Array]
    drawn: nvidia.Drawn  # by the plain path
    gradient: tuple[jax.Array, ...]  # in the fields


class Subject(NamedTuple):
    """A scene, and how it is rasterized."""

    case: Case
    config: rasterize.RasterConfig

    @property
    def name(self) -> str:
        """Such as "fitted-18"."""
        return f"{self.case.kind}-{self.case.views}"

    @property
    def tiles(self) -> bins.Tiling:
        """Of all its views."""
        return bins.tiling(self.case.views, self.config.width, self.config.height)


def prepare(subject: Subject, gaussians: Any, camera: Any) -> Prepared:
    config, tiles = subject.config, subject.tiles
    layout = composite.Layout(tiles, rasterize._block(config, tiles), None)
    projection = rasterize.project_gaussians(gaussians, camera, config)
    found = rasterize.bin_gaussians(gaussians, projection, config)
    fields = rasterize.composited_fields(gaussians, camera, projection)
    keys = jax.random.split(jax.random.key(2))
    shapes = ((4, tiles.tiles, 64), (tiles.tiles, 64))
    cotangents = tuple(jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    draw = functools.partial(composite.composite, layout)
    (channels, left), pull = jax.vjp(lambda fields: draw(fields, found), fields)
    drawn = nvidia.Drawn(channels, left, jnp.zeros((1, 64)), jnp.zeros(1, jnp.int32))
    rows = nvidia.table(Settings(), fields, found)
    return Prepared(fields, found, rows, cotangents, drawn, pull(cotangents)[0])


def rasterizing(subject: Subject, settings: Settings) -> dict[str, Callable[..., Any]]:
    """XLA's and the kernels' passes, as functions of Gaussians and cameras."""
    found = {}
    for name in ("xla", "triton"):
        config = dataclasses.replace(subject.config, compositing=name)
        for part in ("forward", "both"):
            found[f"{name} {part}"] = built(splat_raster.passes(config)[part], settings)
    return found


def built(function: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    """The function, traced with kernels that are built so."""
    kernels = functools.partial(nvidia.composite, settings=settings)

    def traced(*arguments: Any) -> Any:
        with mock.patch.object(nvidia, "composite", kernels):
            return function(*arguments)

    return traced


def program(variant: Variant, build: Callable[..., launches.Launch], *arguments: Any) -> Any:
    """A launch, compiled for arguments of these shapes."""

    def run(*arguments: Any) -> Any:
        launch = build(*arguments)
        if variant.module is None:
            return launches.run(launch)
        other = importlib.import_module(variant.module)
        with mock.patch.object(launches, "kernel", lambda launch: getattr(other, launch.kernel)):
            return launches.run(launch)

    return jax.jit(run).lower(*arguments).compile()


def each_ms(call: Callable[[], Any], repeats: int) -> float:
    """Milliseconds a call of several in a row: launching costs nothing if they take longer."""
    jax.block_until_ready(call())
    taken = []
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(repeats):
            result = call()
        jax.block_until_ready(result)
        taken.append((time.perf_counter() - begun) / repeats)
    return 1e3 * sorted(taken)[2]


def apart(a: Any, b: Any) -> float:
    """Relative norm of a difference."""
    return float(jnp.linalg.norm(a - b) / jnp.maximum(jnp.linalg.norm(b), 1e-30))


def compile_all(jobs: dict[Any, tuple[Callable[..., Any], Case]], workers: int) -> dict[Any, Any]:
    """Programs of all jobs; Triton's compiler works in this thread, XLA's in several."""
    with futures.ThreadPoolExecutor(workers) as pool:
        found = {}
        for key, (function, case) in jobs.items():
            lowered = jax.jit(function).lower(case.gaussians, case.camera)
            found[key] = pool.submit(lowered.compile)
        return {key: job.result() for key, job in found.items()}


def print_variants(
    title: str, variants: list[Variant], one: Callable[[Variant], tuple[float, float]], until: float
) -> dict[Variant, float]:
    """Milliseconds of the variants that run and are right."""
    print(f"\n| {title} | ms | off by |\n|---|---|---|")
    found = {}
    for variant in variants:
        if time.perf_counter() > until:
            print(f"| {variant} | left out for time | |")
            continue
        try:
            spent, worst = one(variant)
        except Exception as error:  # a variant that does not fit the card is left out
            reason = "".join(str(error).strip().splitlines()[:1])
            print(f"| {variant} | {type(error).__name__}: {reason[:150]} | |", flush=True)
            continue
        print(f"| {variant} | {spent:.3f} | {worst:.1e} |", flush=True)
        if worst < WRONG and variant.module is None:
            found[variant] = spent
    return found


def one_forward(
    tiles: bins.Tiling, p: Prepared, repeats: int, variant: Variant
) -> tuple[float, float]:
    saves = variant.settings.saved
    build = functools.partial(nvidia.forward, tiles, variant.settings, save=saves)
    call = functools.partial(program(variant, build, p.rows, p.bins), p.rows, p.bins)
    made = nvidia.Drawn(*call())
    worst = jnp.max(jnp.abs(made.channels - p.drawn.channels))
    worst = float(jnp.maximum(worst, jnp.max(jnp.abs(made.left - p.drawn.left))))
    return each_ms(call, repeats), worst


def one_backward(
    tiles: bins.Tiling, p: Prepared, repeats: int, variant: Variant
) -> tuple[float, float]:
    settings, drawn = variant.settings, p.drawn
    if settings.saved:
        build = functools.partial(nvidia.forward, tiles, settings, save=True)
        drawn = nvidia.Drawn(*program(variant, build, p.rows, p.bins)(p.rows, p.bins))
    build = functools.partial(nvidia.backward, tiles, settings)
    arguments = (p.rows, p.bins, drawn, p.cotangents)
    call = functools.partial(program(variant, build, *arguments), *arguments)
    sums, place = call()
    spent = each_ms(call, repeats)
    build = functools.partial(nvidia.gather, settings)
    owners = program(Variant(settings), build, sums, place, p.bins)(sums, place, p.bins)[0]
    found = nvidia.to_fields(owners, p.fields[2:5])
    worst = max(apart(a, b) for a, b in zip(found, p.gradient, strict=True))
    return spent, worst


def one_gather(
    tiles: bins.Tiling, p: Prepared, repeats: int, variant: Variant
) -> tuple[float, float]:
    arguments = (p.rows, p.bins, p.drawn, p.cotangents)
    build = functools.partial(nvidia.backward, tiles, Settings())
    sums, place = program(Variant(Settings()), build, *arguments)(*arguments)
    build = functools.partial(nvidia.gather, variant.settings)
    call = functools.partial(program(variant, build, sums, place, p.bins), sums, place, p.bins)
    worst = max(
        apart(a, b)
        for a, b in zip(nvidia.to_fields(call()[0], p.fields[2:5]), p.gradient, strict=True)
    )
    return each_ms(call, repeats), worst


def print_whole(
    subject: Subject, programs: dict[str, Any], options: argparse.Namespace, gsplat: bool
) -> None:
    """Rasterizing by XLA, by the kernels and by gsplat."""
    case, found = subject.case, {}
    arguments = (case.gaussians, case.camera)
    print("\n| rasterize | forward ms | + backward ms |\n|---|---|---|")
    for name in ("xla", "triton"):
        calls = {
            part: functools.partial(programs[f"{name} {part}"], *arguments)
            for part in ("forward", "both")
        }
        found[name] = (calls["forward"](), calls["both"]())
        spent = [each_ms(call, options.repeats) for call in calls.values()]
        print(f"| {name} | {spent[0]:.3f} | {spent[1]:.3f} |", flush=True)
    again = calls["both"]()
    same = all(bool(jnp.all(a == b)) for a, b in zip(again, found["triton"][1], strict=True))
    if gsplat:
        both = splat_raster.time_gsplat(*arguments, options.size, options.repeats)
        print(f"| gsplat | {both['forward']:.3f} | {both['both']:.3f} |", flush=True)
    print(f"kernels' gradients twice: {'equal to the bit' if same else 'NOT EQUAL'}")
    (plain_image, plain), (image, ours) = found["xla"], found["triton"]
    print(f"kernels and XLA: image {float(jnp.max(jnp.abs(image - plain_image))):.1e}", end="")
    for name, a, b in zip(splats.Gaussians._fields, ours, plain, strict=True):
        print(f", {name} {apart(a, b):.1e}", end="")
    print()
    if subject.name in options.profile:
        times = gpu_kernels.kernel_times(calls["both"], 5)
        print(gpu_kernels.table(f"forward and backward, {subject.name}", times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--splats", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=512, help="pixels, width and height")
    names = ["fitted-18", "blob-18", "shell-18", "fitted-1", "shell-1"]
    parser.add_argument("--scenes", nargs="*", default=names, help="to rasterize as a whole")
    parser.add_argument("--variants", nargs="*", default=names[:2], help="to time variants on")
    parser.add_argument("--profile", nargs="*", default=["fitted-18"], help="to profile")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads that compile")
    parser.add_argument(
        "--budget", type=float, default=80, help="seconds until variants are left out"
    )
    parser.add_argument("--no-gsplat", action="store_true")
    options = parser.parse_args()
    begun = time.perf_counter()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; missing: {nvidia.missing()}")
    subjects = find_subjects(options)
    prepared = compile_all(
        {name: (functools.partial(prepare, subjects[name]), subjects[name].case)
         for name in options.variants},
        options.workers,
    )  # fmt: skip
    print(f"compiled at {time.perf_counter() - begun:.0f} s", flush=True)
    timed = {"forward": [], "backward": [], "owners": []}
    for name, make in prepared.items():
        case = subjects[name].case
        made = make(case.gaussians, case.camera)
        for title, variants, one in (
            ("forward", forward_variants(), one_forward),
            ("backward", backward_variants(), one_backward),
            ("owners", owner_variants(), one_gather),
        ):
            each = functools.partial(one, subjects[name].tiles, made, options.repeats)
            until = begun + options.budget
            timed[title].append(print_variants(f"{title}, {name}", variants, each, until))
        print(f"at {time.perf_counter() - begun:.0f} s", flush=True)
    best = fastest(timed)
    print(f"\nfastest: {Variant(best)}", flush=True)
    jobs = {
        (name, part): (function, subjects[name].case)
        for name in options.scenes
        for part, function in rasterizing(subjects[name], best).items()
    }
    programs = compile_all(jobs, options.workers)
    gsplat = not options.no_gsplat and splat_raster.build_gsplat()
    print(f"{len(jobs)} programs compiled at {time.perf_counter() - begun:.0f} s", flush=True)
    for name in options.scenes:
        print(f"\n## {name}", flush=True)
        own = {part: program for (of, part), program in programs.items() if of == name}
        print_whole(subjects[name], own, options, gsplat)
        print(f"at {time.perf_counter() - begun:.0f} s", flush=True)


def find_subjects(options: argparse.Namespace, *, quiet: bool = False) -> dict[str, Subject]:
    bare = rasterize.RasterConfig(width=options.size, height=options.size, slots=1)
    count = jax.jit(lambda *arrays: splat_raster.binned(bare, *arrays).total)
    found = {}
    for name in dict.fromkeys((*options.variants, *options.scenes)):
        kind, views = name.split("-")
        lens = cameras.orbit(int(views), width=options.size, height=options.size)
        case = Case(kind, splat_raster.scene(kind, options.splats), lens)
        needed = count(case.gaussians, case.camera)
        found[name] = Subject(case, rasterize.with_room(bare, needed, slack=1.0))
        if not quiet:
            print(f"{name}: {int(needed):,} slots", flush=True)
    return found


if __name__ == "__main__":
    main()
