"""Claim: 500 steps of a 1,024^2 texture on 18 views of 512^2 take at most 2 s on one H200.

Extracts a bumpy sphere at 384^3, simplifies it to 25,000 faces, unwraps it, paints it, draws its
orbit and fits a texture to those frames with MSE and LPIPS (VGG16, float32), as `v3d_jax.meshing`
does. Prints one table row: seconds of the steps (second run, compiled), the limit, seconds of the
stages before, PSNR, and the operator's size. Run `python benchmarks/mesh_texture.py`;
a CPU takes a 256^2 texture, views of 128^2 and no LPIPS, and no limit applies.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from v3d_jax import pipeline
from v3d_jax.mesh import bake, extract, operator, simplify, texels, texture, topology, unwrap
from v3d_jax.mesh.rasterize import RasterConfig
from v3d_jax.ops import camera, metrics
from v3d_jax.weights import lpips as lpips_weights

VIEWS = 18
LIMIT = 2.0  # seconds on an H200


def bumpy(points: jax.Array) -> jax.Array:
    wave = jnp.prod(jnp.sin(8.0 * points + jnp.asarray([[0.0, 0.5, 0.0]])), axis=-1)
    return 0.8 * (jnp.linalg.norm(points, axis=-1) - 0.5 - 0.04 * wave)


def painted(laid: texels.Texels, surface: topology.Triangles, side: int) -> np.ndarray:
    """Waves, stripes and fine noise of the world as a texture."""
    points = texels.interpolated(laid, surface, surface.vertices)
    wave = 0.5 + 0.3 * np.sin(17.0 * points + [0.0, 1.0, 2.0])
    wave = np.where(np.sin(30.0 * points[:, 2:]) > 0, wave, 1.0 - wave)
    grain = np.random.default_rng(0).uniform(-0.1, 0.1, wave.shape)
    values, known = np.zeros((side**2, 3), np.float32), np.zeros(side**2, bool)
    values[laid.index], known[laid.index] = wave + grain, True
    return texels.fill(laid, surface, side, values, known)


def main() -> None:
    device = jax.devices()[0]
    small = device.platform == "cpu"
    side, size = (256, 128) if small else (1024, 512)
    config = texture.TextureConfig(side=side, lpips=0.0 if small else 1.0)
    spent = {}

    def timed(name, call):
        start = time.perf_counter()
        found = jax.block_until_ready(call())
        spent[name] = time.perf_counter() - start
        return found

    box = extract.Box(np.full(3, -1.0, np.float32), 2.0)
    whole = timed("extract", lambda: extract.extract(bumpy, box))
    surface = timed("simplify", lambda: simplify.simplify(whole))
    atlas = timed("unwrap", lambda: unwrap.unwrap(surface, side))
    cameras = camera.orbit(VIEWS, width=size, height=size, elevation=10.0)
    raster = RasterConfig(width=size, height=size, supersample=config.supersample)
    sight = operator.look(surface, atlas, cameras, raster)  # compiles what the next line times
    sight = timed("look", lambda: operator.look(surface, atlas, cameras, raster))
    matrix, sizes = operator.build(sight, cameras, raster, side)
    matrix, sizes = timed("build", lambda: operator.build(sight, cameras, raster, side))
    truth = jnp.asarray(painted(texels.lay(atlas, side), surface, side))
    draw = jax.jit(jax.vmap(operator.apply, in_axes=(0, None)))
    frames = draw(matrix, truth)
    targets = bake.Targets(frames, matrix.coverage > 0.5, cameras)
    network, params = None, None
    if config.lpips:
        network, params = pipeline.perceptual(jnp.dtype(jnp.float32)), lpips_weights.load("vgg")
    begun = jnp.full_like(truth, 0.5)
    more = {"perceptual": network, "params": params, "chunk": config.steps}
    key = jax.random.key(0)
    for name in ("compile", "fit"):
        found = timed(name, lambda: texture.run(config, sizes, matrix, targets, begun, key, **more))
    psnr = float(metrics.psnr(draw(matrix, found), frames).mean())
    taps = np.prod(matrix.tap.shape[1:])
    stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in spent.items())
    memory = sum(leaf.nbytes for leaf in jax.tree.leaves(matrix)) / 1e6
    limit = "no limit on a CPU" if small else f"H200 limit {LIMIT:.1f} s"
    print(
        f"| mesh_texture | {device.device_kind} | {config.steps} steps, {side}^2 texels,"
        f" {VIEWS} views of {size}^2, LPIPS {'yes' if network else 'no'}"
        f" | {spent['fit']:.2f} s ({1e3 * spent['fit'] / config.steps:.2f} ms a step) | {limit}"
        f" | {stages} | {psnr:.1f} dB | {taps:,} taps a view, operator {memory:,.0f} MB |"
    )


if __name__ == "__main__":
    main()
