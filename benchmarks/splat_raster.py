"""How far the plain XLA rasterizer is from gsplat's CUDA kernels, on one GPU.

Three scenes of 100,000 Gaussians on V3D's orbit at 512 x 512 pixels:

- blob: V3D's start, a normal cloud (deviation 1/8) of faint round Gaussians that touch each other;
- fitted: flat, mostly opaque Gaussians on the surface of an object;
- shell: small round half-transparent ones in a fuzzy shell.

For 1, 4 and 18 views in one call it prints one table row each: median milliseconds of the forward
pass, of forward and backward, and of binning alone, after warm-up; slots; megabytes of temporaries
of the gradient; and, where gsplat and a CUDA device are there, gsplat's two times on the same
inputs in the same process (the faster of packed and not) with the ratios ours / gsplat. Run
`python benchmarks/splat_raster.py`; on a CPU, `--splats 2000 --size 128 --repeats 3`.
"""

import argparse
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v3d_jax.ops import camera as cameras
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


def time_ours(
    gaussians: Gaussians, camera: cameras.Camera, size: int, repeats: int
) -> dict[str, float]:
    background = jnp.ones(3)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(size, size, 3)), jnp.float32)
    config = rasterize.RasterConfig(width=size, height=size, slots=1)

    def bins(config: rasterize.RasterConfig, gaussians: Gaussians, camera: cameras.Camera) -> Any:
        projection = rasterize.project_gaussians(gaussians, camera, config)
        return rasterize.bin_gaussians(gaussians, projection, config)

    needed = jax.jit(functools.partial(bins, config))(gaussians, camera).total
    config = rasterize.with_room(config, needed, slack=1.0)

    def forward(gaussians: Gaussians, camera: cameras.Camera) -> jax.Array:
        return rasterize.rasterize(gaussians, camera, config, background).color

    def loss(gaussians: Gaussians, camera: cameras.Camera) -> jax.Array:
        return jnp.sum(forward(gaussians, camera) * weights[None])

    gradient = jax.jit(jax.grad(loss)).lower(gaussians, camera).compile()
    programs = {
        "forward": jax.jit(forward),
        "both": gradient,
        "binning": jax.jit(functools.partial(bins, config)),
    }
    result = {
        name: median_ms(
            functools.partial(program, gaussians, camera), jax.block_until_ready, repeats
        )
        for name, program in programs.items()
    }
    memory = gradient.memory_analysis().temp_size_in_bytes / 1e6
    return result | {"slots": float(needed), "memory": memory}


def time_gsplat(
    gaussians: Gaussians, camera: cameras.Camera, size: int, repeats: int
) -> dict[str, float] | None:
    """gsplat's forward, and forward and backward; None without it or without a GPU for it."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "gsplat")):
        return None
    import torch

    if not torch.cuda.is_available():
        return None
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
        return rasterization(
            *leaves, poses, intrinsics, size, size, packed=packed, backgrounds=background
        )[0]

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--splats", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=512, help="pixels, width and height")
    parser.add_argument("--views", type=int, nargs="+", default=[1, 4, 18])
    parser.add_argument("--scenes", nargs="+", default=["blob", "fitted", "shell"])
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()
    device = jax.devices()[0].device_kind
    print(
        "| scene | views | device | forward | + backward | binning | slots | MB | gsplat | ratio |"
    )
    for kind in options.scenes:
        gaussians = scene(kind, options.splats)
        for views in options.views:
            camera = cameras.orbit(views, width=options.size, height=options.size)
            ours = time_ours(gaussians, camera, options.size, options.repeats)
            peer = time_gsplat(gaussians, camera, options.size, options.repeats)
            beside = "not run | - |"
            if peer:
                ratios = [ours[name] / peer[name] for name in ("forward", "both")]
                beside = f"{peer['forward']:.2f} / {peer['both']:.2f} ms"
                beside += f" | {ratios[0]:.2f} / {ratios[1]:.2f} |"
            print(
                f"| {kind} | {views} | {device} | {ours['forward']:.2f} ms"
                f" | {ours['both']:.2f} ms | {ours['binning']:.2f} ms"
                f" | {ours['slots']:,.0f} | {ours['memory']:,.0f} | {beside}",
                flush=True,
            )


if __name__ == "__main__":
    main()
