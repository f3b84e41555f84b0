"""The generator's speed and memory at V3D's size on one device, beside diffusers' networks.

    python benchmarks/generator.py
    python benchmarks/generator.py --parts compile step decode run --peers
    python benchmarks/generator.py --parts compare
    python benchmarks/generator.py --size tiny --activations float32

Weights are random, no model is needed. The parts are seconds of compilation, cold and from a
folder of kept programs (`compile`); one UNet step with guidance (`step`); the decoding of all
frames at once (`decode`); a picture to frames with 25 Euler steps (`run`): medians after warm-up,
in the type of `--activations`, with the peers' on the same device in the same process and the
ratios. The peak of device memory is the process's, JAX's alone: of all parts that were run.

`compare` gives both sides the same weights and holds outputs to each other: every network in
float32 and in bfloat16 against the peer's float32 ones, and the frames of a whole sample.
"""

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

# Memory is taken as it is needed: the peers need theirs, and the peak is what was needed.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import published_files

from v3d_jax import pipeline
from v3d_jax.diffusion.sampler import SamplingConfig
from v3d_jax.nn import generator
from v3d_jax.weights import folder

Part = Literal["compile", "step", "decode", "run", "compare"]
SIZES = {"v3d_512": generator.V3D_512, "tiny": published_files.REDUCED}
ROWS = {"step": "UNet step with guidance", "decode": "decode, all frames", "run": "25 steps"}


@dataclasses.dataclass(frozen=True)
class Args:
    """What to measure."""

    parts: tuple[Part, ...] = ("compile", "step", "decode", "run")
    """Which figures, in this order."""
    peers: tuple[Literal["eager", "compile"], ...] = ("eager", "compile")
    """How the peers' networks run; none are timed if this is empty."""
    size: Literal["v3d_512", "tiny"] = "v3d_512"
    """The published size, or one to try this out on a CPU."""
    activations: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of both sides' networks."""
    repeats: int = 5
    """Measurements of a median."""
    cache: Path | None = None
    """Folder of kept programs, when cold compilation is not measured."""


def encode(settings: pipeline.Settings, params: Any, image: Any, key: Any) -> Any:
    """What a picture gives all steps, as the command line computes it."""
    return pipeline.branch(
        settings, params, pipeline.encode_condition(settings, params, image, key)
    )


class Ours:
    """The stages of a sample, compiled as the command line compiles them."""

    def __init__(self, settings: pipeline.Settings, params: Any, image: Any):
        self.settings, self.params, self.image = settings, params, image
        self.keys = pipeline.split_key(jax.random.key(0))

    def compile(self) -> dict[str, tuple[float, Any]]:
        """Seconds and memory of every stage's program."""
        start, levels = pipeline.begin(self.settings, 1, self.keys[1])
        condition = jax.eval_shape(
            lambda *given: encode(self.settings, *given), self.params, self.image, self.keys[0]
        )
        stages = {
            "encode": (encode, (self.image, self.keys[0])),
            "advance": (pipeline.advance, (condition, start, levels[:2])),
            "decode": (pipeline.decode, (start.x,)),
        }
        told = {}
        for name, (function, arguments) in stages.items():
            begun = time.perf_counter()
            lowered = jax.jit(function, static_argnums=0).lower(
                self.settings, self.params, *arguments
            )
            compiled = lowered.compile()
            told[name] = (time.perf_counter() - begun, compiled.memory_analysis())
            setattr(self, name, compiled)
        return told

    def prepare(self) -> None:
        """What single stages are measured on."""
        self.condition = self.encode(self.params, self.image, self.keys[0])
        self.start, self.levels = pipeline.begin(self.settings, 1, self.keys[1])
        # Sliced before the clock runs, as the pairs of the host's loop are ready long before use.
        self.pairs = [self.levels[i : i + 2] for i in range(len(self.levels) - 1)]

    def step(self) -> Any:
        """One step of the sampler."""
        return self.advance(self.params, self.condition, self.start, self.pairs[0])

    def decoded(self) -> Any:
        """Frames of latents."""
        return self.decode(self.params, self.start.x)

    def run(self) -> Any:
        """A picture to its frames."""
        condition = self.encode(self.params, self.image, self.keys[0])
        trajectory = self.start
        for pair in self.pairs:
            trajectory = self.advance(self.params, condition, trajectory, pair)
        return self.decode(self.params, trajectory.x)


def random_params(config: generator.GeneratorConfig, dtype: Any) -> Any:
    """Weights of an initialiser's size as a loaded model holds them, cut from one random block."""
    named = folder.flatten(folder.abstract_params(config))
    cast = generator.cast_weights(named)
    block = np.random.default_rng(0).standard_normal(2**24 + 1, np.float32)
    leaves = []
    for name, leaf in named.items():
        scale = max(1, int(np.prod(leaf.shape[:-1]))) ** -0.5 if len(leaf.shape) > 1 else 0.05
        values = np.resize(block, leaf.shape) * np.float32(scale)
        values = values + np.float32(name.endswith("scale"))
        leaves.append(jnp.asarray(values.astype(dtype) if name in cast else values))
    structure = jax.tree.structure(folder.abstract_params(config))
    return nnx.to_pure_dict(jax.tree.unflatten(structure, leaves))


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median of a call that is waited for, after two to warm up."""
    taken = []
    for i in range(repeats + 2):
        begun = time.perf_counter()
        jax.block_until_ready(call())
        if i >= 2:
            taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def table(head: list[str], rows: list[list[Any]]) -> None:
    """Prints rows under their heads."""
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(str(cell) for cell in row)} |", flush=True)


def show_compilation(ours: Ours, args: Args) -> None:
    """Compiles everything, twice if that is asked for, and prints seconds and memory."""
    measured = [ours.compile()]
    if "compile" in args.parts:
        jax.clear_caches()
        measured.append(ours.compile())
    rows = []
    for name in measured[0]:
        memory = measured[0][name][1]
        spent = [f"{told[name][0]:.1f}" for told in measured]
        held = (memory.temp_size_in_bytes, memory.argument_size_in_bytes)
        rows.append([name, *spent, *(f"{size / 2**30:.2f}" for size in held)])
    total = [f"{sum(spent for spent, _ in told.values()):.1f}" for told in measured]
    head = ["program", "s to compile", "s from kept ones"][: 1 + len(measured)]
    table([*head, "temporary GiB", "arguments GiB"], [*rows, ["all", *total, "", ""]])


def peer_times(args: Args, ours: Ours) -> dict[str, dict[str, float]]:
    """Seconds of every part by the peers' mode."""
    import generator_peer
    import torch

    settings = ours.settings
    peer = generator_peer.Peer(settings.generator, getattr(torch, args.activations))
    image, pixels, noise = (generator_peer.to_torch(x) for x in inputs(settings, ours.image))
    x = generator_peer.to_torch(ours.start.x)
    levels = np.asarray(ours.levels)
    scale = torch.from_numpy(pipeline.frame_scale(settings)).to(x.device)
    scalars = scalar_values(settings)
    condition = peer.encode(image, pixels, noise, scalars)
    first, second = float(levels[0]), float(levels[1])

    def run() -> Any:
        told = peer.encode(image, pixels, noise, scalars)
        return peer.decode(peer.sample(levels, x / (1 + first**2) ** 0.5, told, scale))

    calls = {
        "step": lambda: peer.step(x, first, second, condition, scale),
        "decode": lambda: peer.decode(x),
        "run": run,
    }
    calls = {name: generator_peer.wait(call) for name, call in calls.items() if name in args.parts}
    laid_out = {}
    for channels_last in (False, True):
        peer.set_layout(channels_last)
        laid_out[channels_last] = {name: seconds(call, 2) for name, call in calls.items()}
    better = min(laid_out, key=lambda kind: sum(laid_out[kind].values()))
    print(f"peers: channels {'last' if better else 'first'} is the faster layout", flush=True)
    peer.set_layout(better)
    found = {}
    for mode in args.peers:
        if mode == "compile":
            peer.compile()
            begun = time.perf_counter()
            for call in calls.values():
                call()
            spent = time.perf_counter() - begun
            print(f"peers: {spent:.1f} s for the first calls of torch.compile", flush=True)
        found[mode] = {name: seconds(call, args.repeats) for name, call in calls.items()}
    return found


def scalar_values(settings: pipeline.Settings) -> tuple[float, ...]:
    """SVD's three scalars in the order of the vector."""
    names = settings.generator.conditioner.scalars
    return tuple(getattr(settings.conditioning, name) for name in names)


def inputs(settings: pipeline.Settings, image: Any) -> tuple[Any, Any, Any]:
    """The picture in [-1, 1], the image tower's pixels, and the noise of the picture's latent."""
    from v3d_jax.ops import image as images

    given = images.to_network(image)
    tower = generator.abstract(settings.generator).vision
    noise = settings.conditioning.cond_aug * jax.random.normal(
        jax.random.key(2), (1, *settings.generator.latent_shape[1:])
    )
    return given, jax.jit(tower.preprocess)(given), noise


def show_times(args: Args, ours: Ours) -> None:
    """Prints a row for every part that was asked for."""
    ours.prepare()
    calls = {"step": ours.step, "decode": ours.decoded, "run": ours.run}
    asked = [name for name in calls if name in args.parts]
    taken = {name: seconds(calls[name], args.repeats) for name in asked}
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    peers = peer_times(args, ours) if args.peers and asked else {}
    rows = []
    for name in asked:
        theirs = [peers[mode][name] for mode in peers]
        cells = [f"{1e3 * x:.1f}" for x in (taken[name], *theirs)]
        rows.append([ROWS[name], *cells, *(f"{taken[name] / x:.2f}" for x in theirs)])
    heads = [f"{mode} ms" for mode in peers] + [f"ours / {mode}" for mode in peers]
    table(["part", "ours ms", *heads], rows)
    print(f"peak device memory: {'not told' if peak is None else f'{peak / 2**30:.2f} GiB'}")


def main(args: Args) -> None:
    """Runs the parts that were asked for."""
    device = jax.devices()[0]
    print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}, {args.activations}")
    config = SIZES[args.size]
    cold = "compile" in args.parts or args.cache is None
    kept = tempfile.mkdtemp(prefix="v3d_jax_programs") if cold else str(args.cache)
    jax.config.update("jax_compilation_cache_dir", kept)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    settings = pipeline.Settings(config, SamplingConfig(), activations=args.activations)
    height, width = config.frame_size
    image = jax.random.uniform(jax.random.key(1), (1, height, width, 3))
    if set(args.parts) - {"compare"}:
        ours = Ours(settings, random_params(config, settings.dtype), image)
        show_compilation(ours, args)
        show_times(args, ours)
        del ours
    if "compare" in args.parts:
        import generator_compare

        generator_compare.main(settings, image)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
