"""Milliseconds of the video model's blocks, forward and backward, at each level of the UNet.

    python benchmarks/train_blocks.py
    python benchmarks/train_blocks.py --config configs/v3d_512.py --batch 1

With random weights and inputs, in bfloat16; `train_step.py` has the step that they are parts of.
"""

import argparse
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from train_step import CONFIGS, seconds

from v3d_jax.nn import layers, spatiotemporal


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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, default=CONFIGS / "mini.py")
    parser.add_argument("--batch", type=int, help="clips; by default those of the config")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    settings = runpy.run_path(str(args.config))["config"]
    clips = args.batch or settings.data.loader.batch_size
    time_blocks(settings, clips, jnp.dtype(args.dtype))


if __name__ == "__main__":
    main()
