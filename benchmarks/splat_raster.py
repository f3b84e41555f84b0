"""How far the rasterizer is from gsplat's CUDA kernels, on one GPU.

Three scenes of Gaussians on V3D's orbit at 512 x 512 pixels:

- blob: V3D's start, a normal cloud (deviation 1/8) of faint round Gaussians that touch each other;
- fitted: flat, mostly opaque Gaussians on the surface of an object;
- shell: small round half-transparent ones in a fuzzy shell.

For 10,000, 100,000 and 500,000 splats and 1, 4 and 18 views in one call it prints one table row
each: median milliseconds of the forward pass, of forward and backward, of both as a step of a
compiled loop, and of binning alone, after warm-up; slots; megabytes that the gradient takes; and,
where gsplat and a CUDA device are there, gsplat's two times on the same inputs in the same process
(the faster of packed and not), its peak of memory beyond the inputs, and the ratios ours / gsplat
of forward, both, both in a loop, and memory. With `--kernels FOLDER` also where every kernel's time
goes. `--blocks` takes several sizes of `RasterConfig.block`, `--compositing` several of its
implementations. All programs of a number of splats are compiled side by side first. Run
`python benchmarks/splat_raster.py`; on a CPU, `--splats 2000 --size 128 --repeats 3 --views 1 4`.
"""

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import os
import statistics
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import gpu_kernels
import jax
import jax.numpy as jnp
import numpy as np

from v3d_jax.ops import camera as cameras
from v3d_jax.splat import bin as bins
from v3d_jax.splat import gaussians as splats
from v3d_jax.splat import rasterize
from v3d_jax.splat.gaussians import Gaussians

STEPS = 10  # of the compiled loop
NAMES = ("forward", "both", "loop", "binning")


def scene(kind: str, count: int) -> Gaussians:
    rng = np.random.default_rng(0)
    rotations = rng.normal(size=(count, 4))
    direction = rng.normal(size=(count, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    if kind == "blob":
        means = rng.normal(size=(count, 3)) / 8
        radius = np.linalg.norm(means, axis=1, keepdims=True)
        density = count * np.exp(-32 * radius**2) / (2 * np.pi / 64) ** 1.5
        distance = 0.554 * density ** (-1 / 3)  # to the nearest neighbour, on average
        scales = np.tile(1.7 * np.minimum(distance, 0.05), (1, 3))
        opacities = np.full(count, 0.1)
    elif kind == "fitted":
        bumps = 1 + 0.15 * np.sin(6 * direction[:, :1]) * np.cos(5 * direction[:, 1:2])
        means = 0.6 * direction * bumps
        spacing = np.sqrt(4 * np.pi * 0.36 / count)
        scales = spacing * np.exp(rng.normal(size=(count, 3)) * 0.5) * [[0.9, 0.9, 0.1]]
        rotations = facing(direction)
        opacities = 1 / (1 + np.exp(-1 - 1.5 * rng.normal(size=count)))
    else:
        means = 0.6 * direction * (1 + 0.05 * rng.normal(size=(count, 1)))
        scales = np.tile(np.exp(rng.uniform(np.log(1e-3), np.log(7e-3), (count, 1))), (1, 3))
        opacities = rng.uniform(0.1, 0.9, count)
    logits = np.log(opacities / (1 - opacities))
    colors = jnp.asarray(rng.uniform(size=(count, 3)), jnp.float32)
    fields = (means, rotations, np.log(scales), logits)
    return Gaussians(*(jnp.asarray(x, jnp.float32) for x in fields), splats.sh_from_color(colors))


def facing(normal: np.ndarray) -> np.ndarray:
    """Quaternions that turn the z axis towards unit vectors."""
    x, y, z = normal.T
    turned = np.stack([1 + z, -y, x, np.zeros_like(x)], axis=1)
    return turned / np.maximum(np.linalg.norm(turned, axis=1, keepdims=True), 1e-9)


def median_ms(call: Callable[[], Any], wait: Callable[[Any], Any], repeats: int) -> float:
    for _ in range(max(repeats // 5, 1)):
        wait(call())
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        wait(call())
        taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(taken)


class Case(NamedTuple):
    """One scene seen by so many cameras."""

    kind: str
    gaussians: Gaussians
    camera: cameras.Camera

    @property
    def views(self) -> int:
        """How many cameras."""
        return len(self.camera.intrinsics)


def binned(
    config: rasterize.RasterConfig, gaussians: Gaussians, camera: cameras.Camera
) -> bins.Bins:
    projection = rasterize.project_gaussians(gaussians, camera, config)
    return rasterize.bin_gaussians(gaussians, projection, config)


def passes(config: rasterize.RasterConfig) -> dict[str, Callable[..., Any]]:
    """What a row times, as functions of Gaussians and cameras."""
    size = config.width
    weights = np.random.default_rng(1).normal(size=(size, size, 3)).astype(np.float32)

    def forward(gaussians: Gaussians, camera: cameras.Camera) -> jax.Array:
        return rasterize.rasterize(gaussians, camera, config, jnp.ones(3)).color

    def loss(gaussians: Gaussians, camera: cameras.Camera) -> jax.Array:
        return jnp.sum(forward(gaussians, camera) * weights[None])

    both = jax.grad(loss)

    def loop(gaussians: Gaussians, camera: cameras.Camera) -> Gaussians:
        # The rate is so small that the scene stays, and its slots fit.
        def step(_: int, gaussians: Gaussians) -> Gaussians:
            return jax.tree.map(lambda x, d: x - 1e-20 * d, gaussians, both(gaussians, camera))

        return jax.lax.fori_loop(0, STEPS, step, gaussians)

    return {
        "forward": forward,
        "both": both,
        "loop": loop,
        "binning": functools.partial(binned, config),
    }


def compile_all(jobs: dict[Any, tuple[Callable[..., Any], Case]], workers: int) -> dict[Any, Any]:
    """Programs of all jobs, compiled by several threads."""

    def one(job: tuple[Callable[..., Any], Case]) -> Any:
        function, case = job
        return jax.jit(function).lower(case.gaussians, case.camera).compile()

    with futures.ThreadPoolExecutor(workers) as pool:
        return dict(zip(jobs, pool.map(one, jobs.values()), strict=True))


def time_program(program: Any, case: Case, repeats: int) -> float:
    call = functools.partial(program, case.gaussians, case.camera)
    return median_ms(call, jax.block_until_ready, repeats)


def build_gsplat() -> bool:
    """Whether gsplat is there and has a GPU; compiles its CUDA code if that was never done."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "gsplat")):
        return False
    import torch

    if not torch.cuda.is_available():
        return False
    from gsplat.cuda import _backend

    return _backend._C is not None


def time_gsplat(
    gaussians: Gaussians, camera: cameras.Camera, size: int, repeats: int
) -> dict[str, float]:
    """Milliseconds of gsplat's forward, and forward and backward; bytes of its peak of both."""
    import torch
    from gsplat import rasterization

    def put(x: Any) -> Any:
        return torch.tensor(np.asarray(x), device="cuda")

    colors = 0.5 + splats.SH_C0 * np.asarray(gaussians.sh[:, 0])
    fields = [gaussians.means, gaussians.rotations, gaussians.scales, gaussians.opacities, colors]
    leaves = [put(x).requires_grad_() for x in fields]
    poses, intrinsics = put(camera.world_to_camera), put(camera.intrinsics)
    background = torch.ones(len(poses), 3, device="cuda")
    weights = put(np.random.default_rng(1).normal(size=(size, size, 3)).astype(np.float32))

    def forward(packed: bool) -> Any:
        # The packed form's check of backgrounds only takes them where there is no view axis.
        back = None if packed else background
        color, alpha, _ = rasterization(
            *leaves, poses, intrinsics, size, size, packed=packed, backgrounds=back
        )
        return color if back is not None else color + (1.0 - alpha) * background[:, None, None]

    def no_gradient(packed: bool) -> Any:
        with torch.no_grad():
            return forward(packed)

    def both(packed: bool) -> None:
        for leaf in leaves:
            leaf.grad = None
        (forward(packed) * weights).sum().backward()

    def best(call: Callable[[bool], Any]) -> tuple[float, float]:
        found = []
        for packed in (False, True):
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            one = functools.partial(call, packed)
            taken = median_ms(one, lambda _: torch.cuda.synchronize(), repeats)
            found.append((taken, torch.cuda.max_memory_allocated() - held))
        return min(found)

    taken, peak = best(both)
    return {"forward": best(no_gradient)[0], "both": taken, "bytes": peak}


def print_rows(
    cases: list[Case],
    configs: dict[Any, rasterize.RasterConfig],
    programs: dict[Any, Any],
    options: argparse.Namespace,
    gsplat: bool,
    until: float,
) -> None:
    for case in cases:
        where = (case.kind, case.views)
        begins = f"| {case.kind} | {len(case.gaussians.means):,} | {case.views} |"
        if time.perf_counter() > until:
            print(f"{begins} left out: over {options.budget:.0f} s |")
            continue
        peer = None
        if gsplat:
            peer = time_gsplat(case.gaussians, case.camera, options.size, options.repeats)
        for build in itertools.product(options.compositing, options.blocks):
            own = {name: programs[*where, *build, name] for name in NAMES}
            ours = {name: time_program(own[name], case, options.repeats) for name in NAMES}
            ours["loop"] /= STEPS
            used = own["both"].memory_analysis()
            memory = used.temp_size_in_bytes + used.output_size_in_bytes
            beside = "not run | | - |"
            if peer:
                ratios = [ours[n] / peer[n] for n in ("forward", "both")]
                ratios += [ours["loop"] / peer["both"], memory / peer["bytes"]]
                beside = f"{peer['forward']:.2f} / {peer['both']:.2f} | {peer['bytes'] / 1e6:,.0f}"
                beside += f" | {' / '.join(f'{ratio:.2f}' for ratio in ratios)} |"
            print(
                f"{begins} {build[0]}{f', block {build[1]}' if build[1] else ''}"
                f" | {' | '.join(f'{ours[name]:.2f}' for name in NAMES)}"
                f" | {configs[where].slots:,} | {memory / 1e6:,.0f} | {beside}",
                flush=True,
            )


def print_kernels(case: Case, names: dict[str, Any], folder: Path) -> None:
    """Times of kernels, and the programs' text, in which their names are found, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, program in names.items():
        title = f"{name}, {case.kind}, {case.views} views"
        (folder / f"{name}_{case.kind}_{case.views}.txt").write_text(program.as_text())
        call = functools.partial(program, case.gaussians, case.camera)
        try:
            print(f"\n{gpu_kernels.table(title, gpu_kernels.kernel_times(call, 5))}", flush=True)
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            print(f"\n{title}: no profile: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--splats", type=int, nargs="+", default=[10_000, 100_000, 500_000])
    parser.add_argument("--size", type=int, default=512, help="pixels, width and height")
    parser.add_argument("--views", type=int, nargs="+", default=[1, 4, 18])
    parser.add_argument("--scenes", nargs="+", default=["blob", "fitted", "shell"])
    parser.add_argument("--blocks", type=int, nargs="+", default=[None])
    parser.add_argument("--compositing", nargs="+", default=["xla"], help="xla, triton, auto")
    parser.add_argument("--kernels", type=Path, help="folder; times every kernel of the last case")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--budget", type=float, default=600, help="seconds, then no rows")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads that compile")
    options = parser.parse_args()
    device, size = jax.devices()[0], options.size
    print(f"{device.device_kind}, jax {jax.__version__}; milliseconds, MB", flush=True)
    columns = ["scene", "splats", "views", "compositing", *NAMES, "slots", "MB"]
    columns.extend(("gsplat", "gsplat's MB", "ratios"))
    until = time.perf_counter() + options.budget
    with futures.ThreadPoolExecutor(1) as beside:
        building = beside.submit(build_gsplat)
        for number, count in enumerate(options.splats):
            cases = [
                Case(kind, scene(kind, count), cameras.orbit(views, width=size, height=size))
                for kind in options.scenes
                for views in options.views
            ]
            configs, programs = prepare(cases, options)
            gsplat = building.result()
            if number == 0:
                print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
            print_rows(cases, configs, programs, options, gsplat, until)
            if options.kernels is not None:
                where = (cases[-1].kind, cases[-1].views)
                build = (options.compositing[-1], options.blocks[0])
                own = {name: programs[*where, *build, name] for name in NAMES}
                print_kernels(cases[-1], own, options.kernels / str(count))


def prepare(
    cases: list[Case], options: argparse.Namespace
) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """How each case is rasterized, and the programs of all of them."""
    bare = rasterize.RasterConfig(width=options.size, height=options.size, slots=1)
    count = jax.jit(lambda *arrays: binned(bare, *arrays).total)
    configs, jobs = {}, {}
    begun = time.perf_counter()
    for case in cases:
        where = (case.kind, case.views)
        needed = count(case.gaussians, case.camera)
        configs[where] = rasterize.with_room(bare, needed, slack=1.0)
        for build in itertools.product(options.compositing, options.blocks):
            compositing, block = build
            config = dataclasses.replace(configs[where], compositing=compositing, block=block)
            for name, function in passes(config).items():
                jobs[*where, *build, name] = (function, case)
    programs = compile_all(jobs, options.workers)
    print(f"\n{len(jobs)} programs in {time.perf_counter() - begun:.0f} s\n", flush=True)
    return configs, programs


if __name__ == "__main__":
    main()
