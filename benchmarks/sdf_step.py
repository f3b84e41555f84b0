"""How long a step of the surface's fit takes, and a whole fit.

Eighteen views of a textured ball on V3D's orbit. For every way of taking normals it prints one
table row: median milliseconds a step of the V3D recipe (262,144 samples) over chunks of 50 steps,
once all grid levels are open; megabytes of temporaries; seconds of the whole fit without
compilation, and of compilation. The limits on an H200 are 2.5 ms a step with analytic normals and
5 ms with differences. Run `python benchmarks/sdf_step.py`; on a CPU, `--preset preview --size 128`.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp

from v3d_jax.ops import camera
from v3d_jax.sdf import fit, render, targets

CHUNK = 50
PRESETS = {"v3d": fit.V3D, "preview": fit.PREVIEW}


def ball(size: int, radius: float = 0.6) -> targets.Targets:
    """Views of a ball with waves of colour, by intersecting its rays."""
    cameras = camera.orbit(width=size, height=size)
    x, y = jnp.meshgrid(jnp.arange(size) + 0.5, jnp.arange(size) + 0.5)
    pixels = jnp.stack([x, y], axis=-1).reshape(-1, 2)

    def one(view: jax.Array) -> tuple[jax.Array, jax.Array]:
        rays = render.pixel_rays(cameras, jnp.full(len(pixels), view), pixels)
        middle = -jnp.sum(rays.origins * rays.directions, axis=-1)
        depth = jnp.sum(rays.origins**2, axis=-1) - middle**2
        hit = depth < radius**2
        distance = middle - jnp.sqrt(jnp.maximum(radius**2 - depth, 0.0))
        places = rays.origins + distance[:, None] * rays.directions
        color = jnp.where(hit[:, None], 0.5 + 0.35 * jnp.sin(9.0 * places), 0.0)
        return color.reshape(size, size, 3), hit.reshape(size, size)

    images, masks = jax.lax.map(one, jnp.arange(camera.ORBIT_FRAMES))
    return targets.Targets((255.0 * images + 0.5).astype(jnp.uint8), masks, cameras)


def measure(config: fit.FitConfig, seen: targets.Targets, repeats: int) -> dict[str, float]:
    key = jax.random.key(0)
    start = time.perf_counter()
    state = jax.block_until_ready(fit.begin_jit(config, key))
    program = fit.advance_jit.lower(config, None, None, seen, state, key, CHUNK).compile()
    jax.block_until_ready(program(None, seen, state, key))
    compiling = time.perf_counter() - start
    memory = program.memory_analysis().temp_size_in_bytes / 1e6

    start = time.perf_counter()
    state = fit.begin_jit(config, key)
    taken = []
    for _ in range(0, config.steps, CHUNK):
        before = time.perf_counter()
        state, losses = jax.block_until_ready(program(None, seen, state, key))
        taken.append((time.perf_counter() - before) / CHUNK)
    whole = time.perf_counter() - start
    return {
        "step": 1e3 * statistics.median(taken[-repeats:]),
        "whole": whole,
        "compiling": compiling,
        "memory": memory,
        "loss": float(losses[-1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="v3d")
    parser.add_argument("--size", type=int, default=512, help="pixels, width and height")
    parser.add_argument("--steps", type=int, help="instead of the recipe's own")
    parser.add_argument("--normals", nargs="+", default=["analytic", "tetrahedral", "central"])
    parser.add_argument("--repeats", type=int, default=20, help="chunks that count, the last")
    options = parser.parse_args()
    config = PRESETS[options.preset]
    config = dataclasses.replace(config, steps=options.steps or config.steps)
    seen = jax.jit(targets.with_pixels)(ball(options.size))
    device = jax.devices()[0].device_kind
    print("| normals | samples | device | step | temporaries | fit | compiling | last loss |")
    for normals in options.normals:
        told = dataclasses.replace(config.field, normals=normals)
        found = measure(dataclasses.replace(config, field=told), seen, options.repeats)
        print(
            f"| {normals} | {config.rays * config.render.samples:,} | {device}"
            f" | {found['step']:.2f} ms | {found['memory']:,.0f} MB | {found['whole']:.1f} s"
            f" | {found['compiling']:.1f} s | {found['loss']:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
