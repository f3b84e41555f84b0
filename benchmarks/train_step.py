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
are `--batch` clips on one device, N times as many on one, and as many on N: weak scaling is the
first time over the third, strong scaling an N-th of the second over the third. A process a row
compiles, all at once, and then they are timed in turn; a TPU is one process's and cannot be shared
so. `--profile` adds the slowest kernels of three steps, each with the operation that it was
compiled from.
"""

import argparse
import dataclasses
import multiprocessing
import os
import runpy
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

# Memory is taken as it is needed, and all of it if need be: peers and other rows need theirs.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

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
        self.mesh = mesh = meshes.make(settings.mesh)
        self.optimizer, dtype = state.optimizer(settings.optim), jnp.dtype(settings.dtype)
        self.held = settings.optim.params
        self.params = jax.eval_shape(
            lambda key: parts.random(settings.model, dtype, key, settings.parts), jax.random.key(0)
        )
        self.frozen, self.networks = plan.abstract_frozen(settings), ()
        if perceptual is not None:
            networks = {
                "vgg": random_lpips(VGG_WIDTHS, 13 * (3,)),
                "alex": random_lpips(ALEX_WIDTHS, ALEX_SIDES),
            }
            self.networks = tuple(networks[net] for net in perceptual.nets)
            self.frozen = self.frozen._replace(lpips=jax.eval_shape(lambda: self.networks))
        loss = video.make_loss(
            pipeline.Settings(settings.model, settings.sampling, activations=settings.dtype),
            settings.loss,
            settings.perceptual if perceptual is None else perceptual,
            settings.condition,
            settings.parts,
        )
        abstract = jax.eval_shape(self.create, self.params)
        self.placements = sharding.weights(abstract, mesh)
        resting = sharding.weights(self.frozen, mesh)
        step = state.sharded_step(
            loss, self.optimizer, settings.optim, mesh, self.placements, resting
        )
        batch = random_weights.batch(plan.inputs(settings))
        self.others = (
            sharding.put_batch(batch, mesh),
            jax.device_put(jax.random.key(1), sharding.replicated(mesh)),
            np.float32(settings.optim.lr),
        )
        begun = time.perf_counter()
        self.program = step.lower(abstract, self.frozen, *self.others).compile()
        self.compilation = time.perf_counter() - begun

    def create(self, params: Any) -> state.TrainState:
        """The state that training begins with."""
        return state.create(params, self.optimizer, self.held)

    def fill(self) -> None:
        """Draws the weights, which the compiler did not need."""
        placed = sharding.weights(self.params, self.mesh)
        params = random_weights.weights(self.params, sharding.put, placed)
        self.state = jax.jit(self.create, out_shardings=self.placements)(params)
        drawn = self.frozen._replace(lpips=None)
        resting = sharding.weights(drawn, self.mesh)
        self.frozen = random_weights.weights(drawn, sharding.put, resting)
        if self.networks:
            whole = jax.device_put(self.networks, sharding.weights(self.networks, self.mesh))
            self.frozen = self.frozen._replace(lpips=whole)

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
    step.fill()
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


def row(pipe: Connection, args: argparse.Namespace, *layout: Any) -> None:
    """A process of `scaling`: compiles, says so, and measures when it is told to."""
    step = build(args, *layout)
    pipe.send(step.compilation)
    pipe.recv()
    pipe.send(measure(step, args, *layout))


def scaling(args: argparse.Namespace, remat: str, devices: int, clips: int) -> Measured:
    """Times clips on one device, N times as many on one, and as many on N; gives the first."""
    processes = multiprocessing.get_context("spawn")
    pipes, children = [], []
    for layout in ((1, clips), (1, devices * clips), (devices, devices * clips)):
        ours, theirs = processes.Pipe()
        children.append(processes.Process(target=row, args=(theirs, args, remat, *layout)))
        children[-1].start()
        theirs.close()  # or the end of a process that failed would not be seen
        pipes.append(ours)
    found = []
    try:
        for pipe in pipes:
            pipe.recv()
        for pipe, child in zip(pipes, children, strict=True):
            pipe.send(None)
            found.append(pipe.recv())
            child.join()  # its memory is free for the next
    except (EOFError, OSError):
        raise SystemExit("a row of the scaling failed: its process says why above") from None
    finally:
        for child in children:
            child.terminate()
    one, alone, split = (measured.seconds for measured in found)
    weak, strong = one / split, alone / split / devices
    print(f"scaling on {devices} devices: weak {weak:.3f}, strong {strong:.3f}", flush=True)
    return found[0]


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
