"""How long the programs of a fit take to compile on a GPU, by XLA's defaults and as we ask for it.

    python benchmarks/compile_fits.py

Random pictures of the sizes of a fit: the gradient of SSIM alone, the step of a fit to lego at
800 x 800 without LPIPS, and the step of V3D's recipe on an orbit at 512 x 512 with it (random
weights: no time depends on them). Prints one table row a program and way: seconds of compilation,
in a process of its own because results of autotuning stay in one, and steps a second.

On one H200, the three after each other in one process a way and three such processes at a time:
SSIM 12.9 s by default and 1.1 s as we ask; lego's step then 27.6 and 30.5 s, most of it for finding
fusions, and 242 steps a second both ways; the orbit's step had no program after 150 s by default
and had one after 35. `--size 64 --gaussians 500 --steps 2` shows on a CPU that the benchmark runs.
"""

import itertools
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from v3d_jax import pipeline
from v3d_jax.nn import lpips
from v3d_jax.ops import camera, compiling, metrics
from v3d_jax.splat import fit, rasterize
from v3d_jax.splat.gaussians import Gaussians
from v3d_jax.splat.objective import LossConfig

Program = Literal["ssim", "lego", "orbit"]
Way = Literal["default", "ours"]
REPEATS = 4  # the first is not counted
LEGO = fit.FitConfig(degree=3, loss=LossConfig(dssim=0.2, lpips=0.0, opacity=0.01, scale=0.01))
ROOM = {"lego": 1 << 21, "orbit": 1 << 20}  # slots


@dataclass(frozen=True)
class Args:
    """Which programs, and of which sizes."""

    programs: tuple[Program, ...] = ("ssim", "lego", "orbit")
    ways: tuple[Way, ...] = ("default", "ours")
    size: int | None = None
    """Pixels a side, instead of a program's own."""
    gaussians: int = 100_000
    steps: int = 100
    """Of a call."""
    alone: bool = False
    """Measure the first program in the first way in this process, instead of starting others."""


class Lowered(NamedTuple):
    """A program before compilation, and what it is run with; None: it is not run."""

    program: Any
    given: tuple[Any, ...] | None


def scene(size: int, views: int, count: int, harmonics: int) -> tuple[fit.Targets, Gaussians]:
    """Noise on an orbit, and Gaussians on a sphere."""
    random = np.random.default_rng(0)
    images = jnp.asarray(random.integers(0, 256, (views, size, size, 3), dtype=np.uint8))
    alpha = jnp.full((views, size, size), 255, jnp.uint8)
    points = random.normal(size=(count, 3))
    points *= 0.5 / np.linalg.norm(points, axis=1, keepdims=True)
    gaussians = Gaussians(
        jnp.asarray(points, jnp.float32),
        jnp.tile(jnp.asarray([1.0, 0.0, 0.0, 0.0]), (count, 1)),
        jnp.full((count, 3), np.log(0.006), jnp.float32),
        jnp.zeros(count),
        jnp.asarray(0.1 * random.normal(size=(count, harmonics, 3)), jnp.float32),
    )
    return fit.Targets(images, alpha, camera.orbit(views, width=size, height=size)), gaussians


def vgg() -> lpips.LPIPSParams:
    """Random parameters of LPIPS on VGG16."""
    random = np.random.default_rng(0)
    widths = (3, 64, 64, 128, 128, *3 * (256,), *6 * (512,))
    convs = tuple(
        lpips.Conv(
            jnp.asarray(random.normal(size=(3, 3, i, o)) * (2 / (9 * i)) ** 0.5, jnp.float32),
            jnp.zeros(o),
        )
        for i, o in itertools.pairwise(widths)
    )
    return lpips.LPIPSParams(convs, tuple(jnp.ones(c) for c in (64, 128, 256, 512, 512)))


def lower(program: Program, way: Way, args: Args) -> Lowered:
    """A program with the compiler's options of a way, before compilation."""
    options = compiling.OPTIONS if way == "ours" else None
    if program == "ssim":
        image = jnp.zeros((1, *2 * [args.size or 800], 3))
        slope = jax.grad(lambda a, b: metrics.ssim(a, b).sum())
        return Lowered(jax.jit(slope, compiler_options=options).lower(image, image), None)
    network, params, config, own, views = None, None, LEGO, 800, 87
    if program == "orbit":
        network, params = pipeline.perceptual(jnp.dtype(jnp.bfloat16)), vgg()
        config, own, views = fit.V3D, 512, 18
    side = args.size or own
    targets, gaussians = scene(side, views, args.gaussians, (config.degree + 1) ** 2)
    config = replace(config, count=args.gaussians)
    slots = ROOM[program] * side**2 // own**2
    raster = rasterize.RasterConfig(width=side, height=side, slots=slots)
    if network is not None:
        targets = fit.features_jit(config, targets, network, params)
    state, key = fit.begin(gaussians, views), jax.random.key(0)
    given = (params, targets, state, key)
    step = jax.jit(fit.advance, static_argnums=(0, 1, 2, 7), compiler_options=options)
    return Lowered(step.lower(config, raster, network, *given, args.steps), given)


def measure(program: Program, way: Way, args: Args) -> str:
    """A row of the table."""
    lowered = lower(program, way, args)
    start = time.perf_counter()
    compiled = lowered.program.compile()
    seconds, rate = time.perf_counter() - start, "-"
    if lowered.given is not None:
        taken = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            jax.block_until_ready(compiled(*lowered.given))
            taken.append(time.perf_counter() - start)
        rate = f"{args.steps / statistics.median(taken[1:]):.1f}"
    device = jax.devices()[0].device_kind
    return f"| {program} | {way} | {device} | {seconds:.1f} s | {rate} |"


def main(args: Args) -> None:
    if args.alone:
        print(measure(args.programs[0], args.ways[0], args), flush=True)
        return
    print(
        "| program | options | device | compilation | steps/s |\n|---|---|---|---|---|", flush=True
    )
    for program, way in itertools.product(args.programs, args.ways):
        told = ["--alone", "--programs", program, "--ways", way]
        told += ["--gaussians", str(args.gaussians), "--steps", str(args.steps)]
        told += [] if args.size is None else ["--size", str(args.size)]
        subprocess.run([sys.executable, __file__, *told], check=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
