"""Milliseconds of one training step of the mini video model, and of its blocks alone.

    python benchmarks/train_step.py --attention 1 2 4 --perceptual --profile
    python benchmarks/train_step.py --blocks

The step is that of configs/mini.py with random weights, latents and LPIPS networks: no data and no
model are needed. Prints one table row: median milliseconds of a step after warm-up, clips a second,
gigabytes of temporary memory, and seconds of compilation. `--profile` adds the slowest kernels of
three steps, each with the operation it was compiled from; `--blocks` times the forward and the
backward pass of every kind of block at each level instead.
"""

import argparse
import dataclasses
import functools
import re
import runpy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_kernels
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from v3d_jax import state
from v3d_jax.nn import clip, generator, layers, lpips, spatiotemporal, unet
from v3d_jax.training import conditioning, video

GROUPS, CALLS = 7, 4  # the median is over groups of calls; only their last is waited for
VGG_WIDTHS = (3, 64, 64, 128, 128, *3 * (256,), *6 * (512,))
ALEX_WIDTHS, ALEX_SIDES = (3, 64, 192, 384, 256, 256), (11, 5, 3, 3, 3)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, help="clips; by default those of the config")
    parser.add_argument("--attention", type=int, nargs="+", help="unet.attention_resolutions")
    parser.add_argument("--remat", action="store_true", help="recompute blocks in the gradient")
    parser.add_argument("--perceptual", action="store_true", help="add LPIPS of decoded frames")
    parser.add_argument("--profile", action="store_true", help="show the slowest kernels")
    parser.add_argument("--blocks", action="store_true", help="time blocks instead of the step")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    return parser.parse_args()


def seconds(call: Callable[[], Any]) -> float:
    """Median of a call, of which a few are under way at a time as in training."""
    for _ in range(2):
        jax.block_until_ready(call())
    taken = []
    for _ in range(GROUPS):
        start = time.perf_counter()
        for _ in range(CALLS):
            last = call()
        jax.block_until_ready(last)
        taken.append((time.perf_counter() - start) / CALLS)
    return statistics.median(taken)


def random_batch(model: generator.GeneratorConfig, clips: int, image_size: int) -> dict[str, Any]:
    """What the loader of cached latents gives."""
    rng = np.random.default_rng(0)
    frames = model.num_frames
    batch = {
        "latents": rng.standard_normal((clips, *model.latent_shape)).astype(np.float16),
        "image": rng.integers(0, 256, (clips, image_size, image_size, 3), np.uint8),
        "azimuth": np.tile(
            np.float32(360 / frames) * np.arange(frames, dtype=np.float32), (clips, 1)
        ),
        "elevation": np.zeros(clips, np.float32),
    }
    return jax.tree.map(jnp.asarray, batch)


def random_lpips(widths: tuple[int, ...], sides: tuple[int, ...]) -> lpips.LPIPSParams:
    """A network of these widths whose activations keep their size."""
    keys = jax.random.split(jax.random.key(0), len(sides))
    trunk = lpips.VGG16 if len(sides) == len(lpips.VGG16) else lpips.ALEXNET
    convs = tuple(
        lpips.Conv(
            jax.random.normal(key, (side, side, i, o)) * (2 / (side * side * i)) ** 0.5,
            jnp.zeros(o),
        )
        for key, side, i, o in zip(keys, sides, widths, widths[1:], strict=False)
    )
    taps = (width for width, layer in zip(widths[1:], trunk, strict=True) if layer.tap)
    return lpips.LPIPSParams(convs, tuple(jnp.full(width, 1 / width) for width in taps))


def training_step(
    settings: Any, perceptual: bool, dtype: Any
) -> tuple[Callable[..., Any], state.TrainState, video.Frozen]:
    """The step as `v3d_jax.train` compiles it, its state, and what it leaves alone."""
    whole = generator.abstract(settings.model, dtype=dtype)
    graphdef = nnx.split(whole)[0]
    abstract = nnx.to_pure_dict(nnx.state(whole.autoencoder))
    networks = None
    if perceptual:
        networks = {
            "vgg": random_lpips(VGG_WIDTHS, 13 * (3,)),
            "alex": random_lpips(ALEX_WIDTHS, ALEX_SIDES),
        }
        networks = tuple(networks[net] for net in settings.perceptual.nets)
    # Small and not zero, so that nothing is folded away and nothing overflows.
    autoencoder = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 1e-3, leaf.dtype), abstract)
    frozen = video.Frozen(autoencoder, networks, {})

    def loss(params: Any, frozen: video.Frozen, batch: Any, key: jax.Array) -> Any:
        return video.video_loss(
            nnx.merge(graphdef, {**params, "autoencoder": frozen.autoencoder}),
            batch,
            key,
            settings.loss,
            conditioning.ConditionConfig(),
            None if frozen.lpips is None else (frozen.lpips, settings.perceptual),
        )

    optimizer = state.optimizer(settings.optim)

    @jax.jit
    def create(key: jax.Array) -> state.TrainState:
        rngs = nnx.Rngs(key)
        modules = {
            "unet": unet.VideoUNet(settings.model.unet, dtype=dtype, rngs=rngs),
            "vision": clip.VisionTransformer(settings.model.vision, dtype=dtype, rngs=rngs),
        }
        params = {name: nnx.to_pure_dict(nnx.state(part)) for name, part in modules.items()}
        return state.create(params, optimizer)

    step = functools.partial(state.train_step, loss, optimizer, settings.optim.ema)
    return jax.jit(step, donate_argnums=0), create(jax.random.key(0)), frozen


def time_step(settings: Any, clips: int, args: argparse.Namespace) -> None:
    """Prints the step's row and, if asked for, its kernels."""
    step, train_state, frozen = training_step(settings, args.perceptual, jnp.dtype(args.dtype))
    batch = random_batch(settings.model, clips, settings.latents.cache.image_size)
    key, rate = jax.random.key(1), np.float32(1e-5)
    start = time.perf_counter()
    compiled = step.lower(train_state, frozen, batch, key, rate).compile()
    compilation = time.perf_counter() - start

    def call() -> Any:
        nonlocal train_state
        train_state, metrics = compiled(train_state, frozen, batch, key, rate)
        return metrics

    took = seconds(call)
    memory = compiled.memory_analysis().temp_size_in_bytes
    levels = "-".join(str(level) for level in settings.model.unet.attention_resolutions)
    print("| device | clips | attention | lpips | ms a step | clips/s | temporary GB | compile s |")
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {jax.devices()[0].device_kind} | {clips} | {levels} | {args.perceptual} "
        f"| {1e3 * took:.1f} | {clips / took:.0f} | {memory / 1e9:.2f} | {compilation:.0f} |"
    )
    print(f"finite: {all(np.isfinite(float(value)) for value in call().values())}")
    if args.profile:
        # In this thread: CUPTI has crashed where another one traced.
        times = gpu_kernels.kernel_times(call, 3)
        print(gpu_kernels.table("kernel", name_operations(times, compiled.as_text())))


def name_operations(
    times: list[tuple[str, float, float]], program: str
) -> list[tuple[str, float, float]]:
    """Puts before a kernel's name the last parts of the operation that its fusion came from."""
    found = re.finditer(r'%([\w.\-]+) = [^\n]*?op_name="([^"]*)"', program)
    operations = {re.sub(r"[.\-]", "_", match[1]): match[2] for match in found}
    named = []
    for name, spent, count in times:
        operation = operations.get(re.sub(r"[.\-]", "_", name))
        named.append((name if operation is None else f"{operation[-38:]} {name}", spent, count))
    return named


def time_blocks(settings: Any, clips: int, dtype: Any) -> None:
    """Prints a row for every kind of block at every level of the UNet."""
    config, model = settings.model.unet, settings.model
    settings_of = {"dtype": dtype, "rngs": layers.Keys(jax.random.key(0))}
    attention = {"head_channels": config.head_channels, "context_dim": config.context_dim}
    frames, side = model.num_frames, model.latent_shape[1]
    vision = model.vision
    tokens = (vision.image_size // vision.patch) ** 2
    context = jnp.ones((clips, 1, tokens, config.context_dim), dtype)
    emb = jnp.ones((clips, frames, config.emb_dim), dtype)
    print("| block | ms forward and backward | temporary GB |\n|---|---|---|")
    for level, c in enumerate(config.widths):
        size = side // 2**level
        image = (clips, frames, size, size, c)
        sequence = (clips, frames, size * size, c)
        groups = {"groups": config.groups, **settings_of}
        transformer = spatiotemporal.SpatialVideoTransformer(c, **attention, **groups)
        temporal = transformer.temporal
        cases = [
            (spatiotemporal.VideoResBlock(c, c, emb_dim=config.emb_dim, **groups), image, (emb,)),
            (layers.GroupNorm(c, eps=1e-5, groups=config.groups), image, ()),
            (layers.TemporalConv(c, c, **settings_of), image, ()),
            (transformer, image, (context,)),
            (transformer.spatial, sequence, (context,)),
            (temporal, sequence, (context,)),
            (temporal.ff, sequence, ()),
            (temporal.norm1, sequence, ()),
        ]
        for block, shape, others in cases:
            x = jax.random.normal(jax.random.key(0), shape, dtype)
            graphdef, params = nnx.split(block)
            took, memory = time_gradient(graphdef, params, x, others)
            name = f"{type(block).__name__} {'x'.join(str(n) for n in shape[2:])}"
            print(f"| {name} | {1e3 * took:.2f} | {memory / 1e9:.2f} |", flush=True)


def time_gradient(graphdef: Any, params: Any, x: Any, others: tuple[Any, ...]) -> tuple[float, int]:
    """Seconds of a block and its gradient, and bytes of temporary memory."""

    @jax.jit
    def both(params: Any, x: Any, cotangent: Any, others: tuple[Any, ...]) -> Any:
        out, pullback = jax.vjp(lambda p, *a: nnx.merge(graphdef, p)(*a), params, x, *others)
        return out, pullback(cotangent)

    compiled = both.lower(params, x, x, others).compile()
    took = seconds(lambda: compiled(params, x, x, others))
    return took, compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    args = arguments()
    config = Path(__file__).parents[1] / "configs" / "mini.py"
    settings = runpy.run_path(str(config))["config"]
    network = dataclasses.replace(settings.model.unet, remat=args.remat)
    if args.attention:
        network = dataclasses.replace(network, attention_resolutions=tuple(args.attention))
    model = dataclasses.replace(settings.model, unet=network)
    settings = dataclasses.replace(settings, model=model)
    clips = args.batch or settings.data.loader.batch_size
    if args.blocks:
        time_blocks(settings, clips, jnp.dtype(args.dtype))
    else:
        time_step(settings, clips, args)


if __name__ == "__main__":
    main()
