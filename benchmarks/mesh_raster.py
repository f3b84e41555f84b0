"""Claim: at least 1,000 textured, lit views a second of a 5,000-face object on one H200.

Renders 36 views of 256 x 256 pixels (2 x 2 samples each) to RGBA per call and prints one table
row: views a second (median call after warm-up), the limit, and bytes of device memory; with
`--profile`, on a GPU, also every kernel's time and the operation that it comes from. Run
`python benchmarks/mesh_raster.py`; a CPU runs the same program one view at a time.
"""

import argparse
import functools
import statistics
import time

import gpu_kernels
import jax
import jax.numpy as jnp
import numpy as np

from v3d_jax.mesh import rasterize, shade, surface
from v3d_jax.ops import camera as cameras

VIEWS, SIZE, REPEATS = 36, 256, 7
LIMIT = 1000.0  # views a second on an H200


def bumpy_sphere(rows: int = 50, columns: int = 50, texture: int = 256) -> surface.Mesh:
    """A textured closed surface of 2 * rows * columns faces that about fills the image."""
    v, u = np.meshgrid(np.arange(rows + 1) / rows, np.arange(columns + 1) / columns, indexing="ij")
    polar, azimuth = np.pi * v, 2 * np.pi * u
    radius = 0.8 + 0.1 * np.sin(5 * azimuth) * np.sin(polar) ** 2 * np.sin(4 * polar)
    around = np.stack([np.cos(azimuth), np.sin(azimuth)], -1) * np.sin(polar)[..., None]
    points = np.concatenate([around, np.cos(polar)[..., None]], -1) * radius[..., None]
    a = (np.arange(rows)[:, None] * (columns + 1) + np.arange(columns)).reshape(-1)
    b, c, d = a + 1, a + columns + 1, a + columns + 2
    faces = np.stack([a, c, d, a, d, b], -1).reshape(-1, 3).astype(np.int32)
    mesh = surface.from_geometry(points.reshape(-1, 3), faces, color=(1.0, 1.0, 1.0, 1.0))
    uv = np.stack([u, 1 - v], -1).reshape(-1, 2).astype(np.float32)
    noise = np.random.default_rng(0).integers(0, 256, (1, texture, texture, 4), np.uint8)
    noise[..., 3] = 255
    return mesh._replace(uv=uv[faces], texture=np.zeros(1, np.int32), atlas=noise)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", action="store_true", help="show the slowest kernels")
    options = parser.parse_args()
    mesh = jax.tree.map(jnp.asarray, bumpy_sphere())
    camera = cameras.orbit(VIEWS, width=SIZE, height=SIZE, elevation=15.0)
    lights = shade.random_lights(jax.random.key(0))
    device = jax.devices()[0]
    views_per_pass = 1 if device.platform == "cpu" else None
    config = rasterize.RasterConfig(width=SIZE, height=SIZE)
    config = rasterize.fit(mesh, camera, config, views_per_pass=views_per_pass)
    draw = functools.partial(
        shade.render, config=config, alpha=False, views_per_pass=views_per_pass
    )
    compiled = jax.jit(draw).lower(mesh, camera, lights).compile()
    memory = compiled.memory_analysis()
    for _ in range(2):
        views = jax.block_until_ready(compiled(mesh, camera, lights))
    if bool(views.overflow(config)):
        raise SystemExit("the capacities were too small: faces are missing")
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(mesh, camera, lights))
        seconds.append(time.perf_counter() - start)
    rate = VIEWS / statistics.median(seconds)
    size = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e6
    print(
        f"| mesh_raster | {device.device_kind} | {len(mesh.faces):,} faces,"
        f" {VIEWS} views of {SIZE}^2 | {rate:,.1f} views/s | H200 limit {LIMIT:,.0f}"
        f" | {size:,.0f} MB"
        f" | {int(views.slots):,} slots of {config.slots:,} |"
    )
    if options.profile:
        times = gpu_kernels.kernel_times(lambda: compiled(mesh, camera, lights), 3)
        program = compiled.as_text()
        binning = gpu_kernels.within(times, program, "binning")
        print(gpu_kernels.table("kernel", gpu_kernels.name_operations(times, program)))
        print(f"binning: {binning:.3f} of {sum(spent for _, spent, _ in times):.3f} ms")


if __name__ == "__main__":
    main()
