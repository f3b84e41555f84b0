"""How far the rasterizer is from gsplat's CUDA kernels, on one GPU.

Three scenes of 100,000 Gaussians on V3D's orbit at 512 x 512 pixels:

- blob: V3D's start, a normal cloud (deviation 1/8) of faint round Gaussians that touch each other;
- fitted: flat, mostly opaque Gaussians on the surface of an object;
- shell: small round half-transparent ones in a fuzzy shell.

For 1, 4 and 18 views in one call it prints one table row each: median milliseconds of the forward
pass, of forward and backward, and of binning alone, after warm-up; slots; megabytes of temporaries
of the gradient; and, where gsplat and a CUDA device are there, gsplat's two times on the same
inputs in the same process (the faster of packed and not) with the ratios ours / gsplat. Then the
stages of binning at the most views (`--parts`), and with `--kernels FOLDER` where every kernel's
time goes. `--blocks` takes several sizes of `RasterConfig.block`, `--compositing` several of its
implementations. All programs are compiled side by side first. Run
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

from v3d_jax.ops import binning
from v3d_jax.ops import camera as cameras
from v3d_jax.splat import bin as bins
from v3d_jax.splat import gaussians as splats
from v3d_jax.splat import rasterize
from v3d_jax.splat.gaussians import Gaussians


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

    return {
        "forward": forward,
        "both": jax.grad(loss),
        "binning": functools.partial(binned, config),
    }


def stages(config: rasterize.RasterConfig) -> dict[str, Callable[..., Any]]:
    """Binning up to and including each of its stages (`bin.bin_splats`)."""
    size, capacity = (config.width, config.height), config.slots

    def upto(stage: int, gaussians: Gaussians, camera: cameras.Camera) -> Any:
        projection = rasterize.project_gaussians(gaussians, camera, config)
        if stage == 0:
            return projection
        log_opacity = jax.nn.log_sigmoid(gaussians.opacity_logits)
        views, count = projection.depth.shape
        tiles = bins.tiling(views, *size)
        order, distance = bins.by_depth(projection, log_opacity, tiles)
        if stage == 1:
            return order, distance, projection[:7]
        boxes = bins.boxes_in_order(projection, order, distance, size)
        if stage == 2:
            return boxes
        runs = binning.expand(boxes.count, capacity)
        if stage == 3:
            return boxes, runs
        key = bins.tile_keys(boxes, runs, order // count, tiles, size)
        if stage == 4:
            return key, runs.owner
        tile, slot = bins.by_tile(key, boxes, order // count, tiles)
        if stage == 5:
            return tile, slot, runs.owner
        return binning.sorted_offsets(tile, tiles.tiles), slot, runs.owner

    names = ["project", "sort by depth", "gather, boxes", "expand", "tile test", "sort by tile"]
    names.append("offsets")
    found = {name: functools.partial(upto, stage) for stage, name in enumerate(names)}
    return found | {"owners of slots: all": functools.partial(binned, config)}


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
    """gsplat's forward, and forward and backward."""
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

    def best(call: Callable[[bool], Any]) -> float:
        return min(
            median_ms(functools.partial(call, packed), lambda _: torch.cuda.synchronize(), repeats)
            for packed in (False, True)
        )

    return {"forward": best(no_gradient), "both": best(both)}


def print_rows(
    cases: list[Case],
    configs: dict[Any, rasterize.RasterConfig],
    programs: dict[Any, Any],
    options: argparse.Namespace,
    gsplat: bool,
) -> None:
    device = jax.devices()[0].device_kind
    columns = ["scene", "views", "compositing", "block", "device", "forward", "+ backward"]
    columns.extend(("binning", "slots", "MB", "gsplat", "ratio"))
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    begun = time.perf_counter()
    for case in cases:
        where = (case.kind, case.views)
        if time.perf_counter() - begun > options.budget:
            print(f"| {case.kind} | {case.views} | left out: over {options.budget:.0f} s |")
            continue
        peer = None
        if gsplat:
            peer = time_gsplat(case.gaussians, case.camera, options.size, options.repeats)
        for build in itertools.product(options.compositing, options.blocks):
            ours = {
                name: time_program(programs[*where, *build, name], case, options.repeats)
                for name in ("forward", "both", "binning")
            }
            memory = programs[*where, *build, "both"].memory_analysis().temp_size_in_bytes / 1e6
            beside = "not run | - |"
            if peer:
                ratios = [ours[name] / peer[name] for name in ("forward", "both")]
                beside = f"{peer['forward']:.2f} / {peer['both']:.2f} ms"
                beside += f" | {ratios[0]:.2f} / {ratios[1]:.2f} |"
            print(
                f"| {case.kind} | {case.views} | {build[0]} | {build[1] or 'auto'} | {device}"
                f" | {ours['forward']:.2f} ms | {ours['both']:.2f} ms | {ours['binning']:.2f} ms"
                f" | {configs[where].slots:,.0f} | {memory:,.0f} | {beside}",
                flush=True,
            )


def print_parts(case: Case, programs: dict[Any, Any], repeats: int) -> None:
    print(f"\n| binning, {case.kind}, {case.views} views | ms up to here | ms of this stage |")
    print("|---|---|---|")
    before = 0.0
    for name, program in programs.items():
        taken = time_program(program, case, repeats)
        print(f"| {name} | {taken:.3f} | {taken - before:.3f} |", flush=True)
        before = taken


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
    parser.add_argument("--splats", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=512, help="pixels, width and height")
    parser.add_argument("--views", type=int, nargs="+", default=[1, 4, 18])
    parser.add_argument("--scenes", nargs="+", default=["blob", "fitted", "shell"])
    parser.add_argument("--blocks", type=int, nargs="+", default=[None])
    parser.add_argument("--compositing", nargs="+", default=["xla"], help="xla, triton, auto")
    parser.add_argument("--parts", nargs="*", default=["shell"], help="scenes whose stages to time")
    parser.add_argument("--kernels", type=Path, help="folder; times every kernel of the last case")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--budget", type=float, default=90, help="seconds of timing, then no rows")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads that compile")
    options = parser.parse_args()
    cases = [
        Case(kind, gaussians, cameras.orbit(views, width=options.size, height=options.size))
        for kind, gaussians in ((kind, scene(kind, options.splats)) for kind in options.scenes)
        for views in options.views
    ]
    bare = rasterize.RasterConfig(width=options.size, height=options.size, slots=1)
    count = jax.jit(lambda *arrays: binned(bare, *arrays).total)
    configs, jobs = {}, {}
    for case in cases:
        where = (case.kind, case.views)
        needed = count(case.gaussians, case.camera)
        configs[where] = rasterize.with_room(bare, needed, slack=1.0)
        for build in itertools.product(options.compositing, options.blocks):
            compositing, block = build
            config = dataclasses.replace(configs[where], compositing=compositing, block=block)
            for name, function in passes(config).items():
                jobs[*where, *build, name] = (function, case)
        if case.kind in options.parts and case.views == max(options.views):
            for name, function in stages(configs[where]).items():
                jobs[*where, "parts", None, name] = (function, case)
    begun = time.perf_counter()
    with futures.ThreadPoolExecutor(1) as beside:
        building = beside.submit(build_gsplat)
        programs = compile_all(jobs, options.workers)
        print(f"{len(jobs)} programs compiled in {time.perf_counter() - begun:.0f} s", flush=True)
        gsplat = building.result()
    print_rows(cases, configs, programs, options, gsplat)
    for case in cases:
        where = (case.kind, case.views, "parts")
        parts = {key[4]: program for key, program in programs.items() if key[:3] == where}
        if parts:
            print_parts(case, parts, options.repeats)
    if options.kernels is not None:
        where = (cases[-1].kind, cases[-1].views, options.compositing[-1], options.blocks[0])
        names = {key[4]: program for key, program in programs.items() if key[:4] == where}
        print_kernels(cases[-1], names, options.kernels)


if __name__ == "__main__":
    main()
