"""Milliseconds and memory of one training step, beside PyTorch's with diffusers' UNet.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --remat none dots blocks --peers
    python benchmarks/train_step.py --devices 2 --peers
    python benchmarks/train_step.py --config configs/mini.py --batch 64 --perceptual --profile

The step is the config's as `v3d_jax.train` compiles it, with random weights, latents and LPIPS
networks: no data and no model are needed. The peers' is `train_peer.py`, of the same clips on the
same device in the same process: eager, eager with checkpoints, and compiled. Prints median
milliseconds after warm-up, gigabytes (10^9) and seconds of compilation.

With `--devices N` parameters, optimiser and average are split over N (`mesh.fsdp`), and the rows
are a clip on one device, N clips on one, and N clips on N, compiled side by side: weak scaling is
the first time over the third, strong scaling an N-th of the second over the third. `--profile` adds
the slowest kernels of three steps, each with the operation that it was compiled from.
"""

import argparse
import dataclasses
import os
import runpy
import statistics
import sys
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

# Memory is taken as it is needed: the peers need theirs.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import gpu_kernels
import jax
import jax.numpy as jnp
import numpy as np
import random_weights

from v3d_jax import pipeline, state
from v3d_jax.nn import lpips
from v3d_jax.parallel import mesh as meshes
from v3d_jax.parallel import sharding
from v3d_jax.training import parts, plan, video

CONFIGS = Path(__file__).parents[1] / "configs"
GROUPS, CALLS = 7, 4  # the median is over groups of calls; only their last is waited for
VGG_WIDTHS = (3, 64, 64, 128, 128, *3 * (256,), *6 * (512,))
ALEX_WIDTHS, ALEX_SIDES = (3, 64, 192, 384, 256, 256), (11, 5, 3, 3, 3)
HEAD = "| step | devices | clips | ms | clips/s | GB a device | s to compile |"


class Measured(NamedTuple):
    """Seconds of a step, and bytes that it needs on a device: what stays and what it takes."""

    seconds: float
    bytes: int
    compilation: float


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, default=CONFIGS / "v3d_512.py")
    parser.add_argument("--batch", type=int, default=1, help="clips a device")
    parser.add_argument("--attention", type=int, nargs="+", help="unet.attention_resolutions")
    parser.add_argument(
        "--remat", nargs="*", default=["none"], help="none, dots, blocks; nothing for peers alone"
    )
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--perceptual", action="store_true", help="add LPIPS of decoded frames")
    parser.add_argument("--profile", action="store_true", help="show the slowest kernels")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--peers", nargs="*", default=[], choices=("eager", "checkpoint", "compile"),
        help="modes of PyTorch's step; all if none is named",
    )  # fmt: skip
    args = parser.parse_args()
    if "--peers" in sys.argv and not args.peers:
        args.peers = ["eager", "checkpoint", "compile"]
    return args


def seconds(call: Callable[[], Any], wait: Callable[[Any], Any] = jax.block_until_ready) -> float:
    """Median of a call, of which a few are under way at a time as in training."""
    for _ in range(2):
        wait(call())
    taken = []
    for _ in range(GROUPS):
        start = time.perf_counter()
        for _ in range(CALLS):
            last = call()
        wait(last)
        taken.append((time.perf_counter() - start) / CALLS)
    return statistics.median(taken)


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


def settings_of(args: argparse.Namespace, remat: str, devices: int, clips: int) -> Any:
    """The config with the arguments' changes, its weights split over the devices."""
    config = runpy.run_path(str(args.config))["config"]
    unet = dataclasses.replace(config.model.unet, remat=remat)
    if args.attention:
        unet = dataclasses.replace(unet, attention_resolutions=tuple(args.attention))
    loader = dataclasses.replace(config.data.loader, batch_size=clips)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, unet=unet),
        data=dataclasses.replace(config.data, loader=loader),
        mesh=meshes.MeshConfig(fsdp=devices, devices=devices),
        perceptual=dataclasses.replace(config.perceptual, weight=0.0),
        dtype=args.dtype,
    )


class Step:
    """The step as `v3d_jax.train` compiles it, and what it is called with."""

    def __init__(self, settings: Any, perceptual: Any = None):
        mesh = meshes.make(settings.mesh)
        optimizer, dtype = state.optimizer(settings.optim), jnp.dtype(settings.dtype)
        abstract = jax.eval_shape(
            lambda key: parts.random(settings.model, dtype, key, settings.parts), jax.random.key(0)
        )
        frozen = plan.abstract_frozen(settings)
        placed = sharding.weights(abstract, mesh)
        resting = sharding.weights(frozen, mesh)
        params = random_weights.weights(abstract, sharding.put, placed)
        create = jax.jit(
            lambda params: state.create(params, optimizer, settings.optim.params),
            out_shardings=sharding.weights(
                jax.eval_shape(lambda p: state.create(p, optimizer, settings.optim.params), params),
                mesh,
            ),
        )
        self.state = create(params)
        del params
        self.frozen = random_weights.weights(frozen, sharding.put, resting)
        if perceptual is not None:
            networks = {
                "vgg": random_lpips(VGG_WIDTHS, 13 * (3,)),
                "alex": random_lpips(ALEX_WIDTHS, ALEX_SIDES),
            }
            networks = tuple(networks[net] for net in perceptual.nets)
            self.frozen = self.frozen._replace(lpips=networks)
        loss = video.make_loss(
            pipeline.Settings(settings.model, settings.sampling, activations=settings.dtype),
            settings.loss,
            settings.perceptual if perceptual is None else perceptual,
            settings.condition,
            settings.parts,
        )
        placements, frozen = (
            jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (self.state, self.frozen)
        )
        step = state.sharded_step(loss, optimizer, settings.optim, mesh, placements, frozen)
        everywhere = sharding.replicated(mesh)
        batch = random_weights.batch(plan.inputs(settings))
        self.others = (
            sharding.put_batch(batch, mesh),
            jax.device_put(jax.random.key(1), everywhere),
            np.float32(settings.optim.lr),
        )
        begun = time.perf_counter()
        self.program = step.lower(self.state, self.frozen, *self.others).compile()
        self.compilation = time.perf_counter() - begun

    def __call__(self) -> Any:
        """One update; its metrics."""
        self.state, metrics = self.program(self.state, self.frozen, *self.others)
        return metrics

    @property
    def bytes(self) -> int:
        """On one device: arguments, which the results replace, and temporaries."""
        used = self.program.memory_analysis()
        return used.argument_size_in_bytes + used.temp_size_in_bytes


def build(args: argparse.Namespace, remat: str, devices: int, clips: int) -> Step:
    """A compiled step and its state."""
    perceptual = runpy.run_path(str(args.config))["config"].perceptual if args.perceptual else None
    return Step(settings_of(args, remat, devices, clips), perceptual)


def measure(step: Step, args: argparse.Namespace, remat: str, devices: int, clips: int) -> Measured:
    """Times a step and prints its row, and its kernels if they are asked for."""
    found = Measured(seconds(step), step.bytes, step.compilation)
    show(f"ours, remat {remat}", devices, clips, found)
    values = {name: float(value) for name, value in step().items()}
    if not all(np.isfinite(list(values.values()))):
        raise SystemExit(f"not finite: {values}")
    if args.profile:
        # In this thread: CUPTI has crashed where another one traced.
        times = gpu_kernels.kernel_times(step, 3)
        print(
            gpu_kernels.table("kernel", gpu_kernels.name_operations(times, step.program.as_text()))
        )
    return found


def show(name: str, devices: int, clips: int, found: Measured) -> None:
    """Prints a row under `HEAD`."""
    print(
        f"| {name} | {devices} | {clips} | {1e3 * found.seconds:.1f} | {clips / found.seconds:.2f} "
        f"| {found.bytes / 1e9:.2f} | {found.compilation:.0f} |",
        flush=True,
    )


def scaling(args: argparse.Namespace, remat: str, devices: int, clips: int) -> Measured:
    """Times a clip on one device, N clips on one, and N on N; gives the first."""
    # What needs the most memory comes first: others then find room where it was.
    rows = ((1, devices * clips), (1, clips), (devices, devices * clips))
    with futures.ThreadPoolExecutor(len(rows)) as pool:
        steps = list(pool.map(lambda row: build(args, remat, *row), rows))
    found = [
        measure(steps.pop(0), args, remat, *row)  # its state is free before the next is timed
        for row in rows
    ]
    alone, one, split = (measured.seconds for measured in found)
    weak, strong = one / split, alone / split / devices
    print(f"scaling on {devices} devices: weak {weak:.3f}, strong {strong:.3f}", flush=True)
    return found[1]


def peer(args: argparse.Namespace, mode: str) -> Measured:
    """Times PyTorch's step and prints its row; its memory is the allocator's peak."""
    import torch
    import train_peer

    config = settings_of(args, "none", 1, args.batch)
    begun = time.perf_counter()
    trainer = train_peer.Trainer(config.model, config.loss, config.optim, args.batch, mode)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.step().item()
    first = time.perf_counter() - begun
    taken = seconds(trainer.step, lambda loss: loss.item())
    found = Measured(taken, torch.cuda.max_memory_allocated() if on_gpu else 0, first)
    show(f"PyTorch, {mode}", 1, args.batch, found)
    del trainer
    if on_gpu:
        torch.cuda.empty_cache()
    return found


def main() -> None:
    args = arguments()
    device = jax.devices()[0]
    print(f"{args.devices} x {device.device_kind}, jax {jax.__version__}, {args.config.stem}")
    print(f"{HEAD}\n{'|---' * 7}|")
    clips, devices = args.batch, args.devices
    ours = []
    for remat in args.remat:
        if devices == 1:
            ours.append(measure(build(args, remat, 1, clips), args, remat, 1, clips))
        else:
            ours.append(scaling(args, remat, devices, clips))
    best = min(ours, default=None)
    for mode in args.peers:
        theirs = peer(args, mode)
        if best is not None:
            ratios = (best.seconds / theirs.seconds, best.bytes / max(theirs.bytes, 1))
            print(f"ours / {mode}: time {ratios[0]:.2f}, memory {ratios[1]:.2f}", flush=True)


if __name__ == "__main__":
    main()
