"""Adding up the gradient of a scene model's feature maps, by scatter and by products.

    python benchmarks/corner_sums.py
    python benchmarks/corner_sums.py --clips 1 --rays 32

One part of a training step's rays: samples of `--rays` rays of every clip, of a frame along a walk,
projected into one source view (`PixelNeRFConfig.rays_at_once`, samples and maps of SCENE_MINI and
SCENE_512). Two source views, one that sees nearly all of them and one turned aside; points that are
not seen lie in the first cell, as `nn.pixelnerf` has them. Prints, a row a model, view and way, the
median milliseconds of a call after warm-up, of a step (all parts and three source views), temporary
memory, and how far the sums are from those of the scatter. "scatter, all" adds what is not seen as
well, zeros to one cell.
"""

import argparse
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from train_step import seconds

from v3d_jax.nn import generator
from v3d_jax.ops import camera, corner_sums, rays

VIEWS = 3
WALK = ((0.0, 0.0, 0.0), (0.6, 0.2, 0.05))  # of the source view and of the target frame
AHEAD = (3.0, 0.0, 0.0)
LOOKS = {"ahead": AHEAD, "aside": (3.0, 2.6, 0.0)}  # what the source view looks at


def points(config: generator.GeneratorConfig, clips: int, count: int, look: str) -> Any:
    """Where samples lie in the maps of the source view, in cells, and which are seen."""
    model, size = config.pixelnerf, config.frame_size
    rng = np.random.default_rng(0)
    up = jnp.asarray([0.0, 0.0, 1.0])

    def cameras(place: tuple[float, ...], ahead: tuple[float, ...]) -> camera.Camera:
        places = jnp.asarray(place + rng.normal(scale=0.1, size=(clips, 3)), jnp.float32)
        sides = [jnp.full((clips,), side, jnp.int32) for side in size[::-1]]
        lens = jnp.broadcast_to(camera.pinhole(60.0, *size[::-1]), (clips, 3, 3))
        return camera.Camera(camera.look_at(places, jnp.asarray(ahead), up), lens, *sides)

    source, target = cameras(WALK[0], LOOKS[look]), cameras(WALK[1], AHEAD)
    shown = rays.pixel_rays(target, config.latent_shape[1:3])
    origins, directions = (x.reshape(clips, -1, 3)[:, :count] for x in shown)
    near, far = (jnp.full(origins.shape[:2], x) for x in (model.near, model.far))
    distances = rays.disparity_distances(near, far, model.samples)
    where = origins[:, :, None] + distances[..., None] * directions[:, :, None]
    pixels, seen = jax.vmap(rays.project)(source, where.reshape(clips, -1, 3))
    return jnp.where(seen[..., None], pixels / 4.0, 0.0), seen


def scatter_all(size: tuple[int, int], pixels: Any, values: Any, seen: Any) -> Any:
    """The scatter with zeros for what is not seen."""
    return corner_sums.scatter(size, pixels, values, jnp.ones_like(seen))


def products(size: tuple[int, int], pixels: Any, values: Any, seen: Any) -> Any:
    """The products, which need not know what is seen."""
    del seen
    return corner_sums.products(size, pixels, values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--rays", type=int, help="a part's; the model's if not given")
    args = parser.parse_args()
    ways = {"scatter": corner_sums.scatter, "scatter, all": scatter_all, "products": products}
    print(
        f"| {jax.devices()[0].device_kind}, {args.clips} clips | way | ms | ms a step | GB | off |"
    )
    print("|---|---|---|---|---|---|")
    models = {"SCENE_MINI": generator.SCENE_MINI, "SCENE_512": generator.SCENE_512}
    for name, look in itertools.product(models, LOOKS):
        config = models[name]
        model = config.pixelnerf
        # A clip of the large one is as much work as many of the small one.
        clips = args.clips if name == "SCENE_MINI" else max(1, args.clips // 16)
        count = args.rays or model.rays_at_once
        pixels, seen = jax.jit(points, static_argnums=(0, 1, 2, 3))(config, clips, count, look)
        shape = (*seen.shape, model.encoder.channels)
        values = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16) * seen[..., None]
        size = tuple(side // 4 for side in config.frame_size)
        frame = config.latent_shape[1] * config.latent_shape[2]
        parts = -(-(config.num_frames + VIEWS) * frame // count) * VIEWS
        title = f"{name}, {seen.shape[1]:,} points, {float(jnp.mean(seen)):.0%} seen"
        expected = None
        for way, function in ways.items():
            arrays = (pixels, values, seen)
            program = jax.jit(functools.partial(function, size)).lower(*arrays).compile()
            taken = seconds(functools.partial(program, *arrays))
            sums = program(*arrays)
            expected = sums if expected is None else expected
            off = float(jnp.linalg.norm(sums - expected) / jnp.linalg.norm(expected))
            memory = program.memory_analysis().temp_size_in_bytes / 1e9
            print(
                f"| {title}, maps of {size[0]} x {size[1]} | {way} | {1e3 * taken:.3f} "
                f"| {1e3 * taken * parts:.1f} | {memory:.2f} | {off:.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
