"""The generator's speed and memory at V3D's size on one device, beside diffusers' networks.

    python benchmarks/generator.py
    python benchmarks/generator.py --parts compile step decode run --peers
    python benchmarks/generator.py --low-memory --peers
    python benchmarks/generator.py --parts compare
    python benchmarks/generator.py --devices 2 --parts same step decode run --peers
    python benchmarks/generator.py --parts quality --model V3D_512.ckpt
    python benchmarks/generator.py --size tiny --activations float32 --peers eager

Weights are random, no model is needed. The parts are seconds of compilation, cold and from a
folder of kept programs (`compile`); one UNet step with guidance (`step`); the decoding of all
frames at once (`decode`); a picture to frames with 25 Euler steps (`run`) and with the fast preset
(`fast`, ours only): medians after warm-up, in the type of `--activations`, with the peers' on the
same device in the same process and the ratios. The peak of device memory is JAX's, before `fast`.

`same` holds the frames of a whole sample on `--devices` to those of one, in either type.
`compare` gives both sides the same weights and holds outputs to each other: every network in
float32 and in bfloat16 against the peer's float32 ones, and the frames of a whole sample.
`quality` needs a trained model: what faster settings cost against 50 steps from the same noise.
"""

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
import random_weights

from v3d_jax import pipeline
from v3d_jax.diffusion import sampler
from v3d_jax.nn import generator
from v3d_jax.ops import compiling
from v3d_jax.parallel import sampling as parallel
from v3d_jax.weights import folder

Part = Literal["compile", "step", "decode", "run", "fast", "same", "compare", "quality"]
SIZES = {"v3d_512": generator.V3D_512, "tiny": published_files.REDUCED}
ROWS = {"step": "UNet step with guidance", "decode": "decode, all frames", "run": "25 steps"}
TIMED = (*ROWS, "compile", "fast")


@dataclasses.dataclass(frozen=True)
class Args:
    """What to measure."""

    parts: tuple[Part, ...] = ("compile", "step", "decode", "run", "fast")
    """Which figures, in this order."""
    peers: tuple[Literal["eager", "compile"], ...] = ("eager", "compile")
    """How the peers' networks run; none are timed if this is empty."""
    size: Literal["v3d_512", "tiny"] = "v3d_512"
    """The published size, or one to try this out on a CPU."""
    activations: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of both sides' networks."""
    repeats: int = 5
    """Measurements of a median."""
    low_memory: bool = False
    """Run ours as `--low-memory` of the command line does."""
    devices: int = 1
    """Split ours over so many devices."""
    model: str | None = None
    """A model to judge `quality` on; speed is measured with random weights."""
    picture: Path | None = None
    """What the model of `quality` is given, instead of the packaged example."""
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
        told = {}
        condition = self._compile(told, "encode", encode, self.image, self.keys[0])
        self._compile(told, "advance", pipeline.advance, condition, start, levels[:2])
        self._compile(told, "decode", pipeline.decode, start.x)
        return told

    def _compile(self, told: Any, name: str, function: Any, *arguments: Any) -> Any:
        """One stage's program; its result, which lies where the next stage's argument does."""
        begun = time.perf_counter()
        lowered = jax.jit(function, static_argnums=0).lower(self.settings, self.params, *arguments)
        compiled = lowered.compile(compiling.OPTIONS)
        told[name] = (time.perf_counter() - begun, compiled.memory_analysis())
        setattr(self, name, compiled)
        return compiled(self.params, *arguments)

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
    leaves = [
        jnp.asarray(random_weights.weight(name, leaf.shape).astype(dtype if name in cast else "f"))
        for name, leaf in named.items()
    ]
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


def repeats(args: Args, part: str) -> int:
    """Measurements of a part: fewer of a whole run, which is long."""
    return min(3, args.repeats) if part == "run" else args.repeats


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


def peer_times(args: Args, ours: Ours) -> Iterator[tuple[str, dict[str, float]]]:
    """Seconds of every part, a mode of the peers after another."""
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
    # The loop is left out: it is the step many times.
    tried = [call for name, call in calls.items() if name != "run"] or list(calls.values())
    laid_out = {}
    for channels_last in (False, True):
        peer.set_layout(channels_last)
        laid_out[channels_last] = sum(seconds(call, 2) for call in tried)
    better = laid_out[True] < laid_out[False]
    print(f"peers: channels {'last' if better else 'first'} is the faster layout", flush=True)
    peer.set_layout(better)
    for mode in args.peers:
        if mode == "compile":
            peer.compile()
            begun = time.perf_counter()
            for call in tried:
                call()
            spent = time.perf_counter() - begun
            print(f"peers: {spent:.1f} s for the first calls of torch.compile", flush=True)
        yield mode, {name: seconds(call, repeats(args, name)) for name, call in calls.items()}


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
    """Prints ours, then every mode of the peers beside it as soon as it is known."""
    ours.prepare()
    calls = {"step": ours.step, "decode": ours.decoded, "run": ours.run}
    taken = {
        name: seconds(call, repeats(args, name))
        for name, call in calls.items()
        if name in args.parts
    }
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    rows = [[ROWS[name], f"{1e3 * spent:.1f}"] for name, spent in taken.items()]
    if "fast" in args.parts:
        rows.append(["fast preset", f"{1e3 * fast_seconds(args, ours):.1f}"])
    table(["part", "ours ms"], rows)
    print(f"peak device memory: {'not told' if peak is None else f'{peak / 2**30:.2f} GiB'}")
    for mode, theirs in peer_times(args, ours) if args.peers and taken else ():
        rows = [
            [ROWS[name], *(f"{1e3 * x:.1f}" for x in (taken[name], x)), f"{taken[name] / x:.2f}"]
            for name, x in theirs.items()
        ]
        table(["part", "ours ms", f"{mode} ms", f"ours / {mode}"], rows)


def fast_seconds(args: Args, ours: Ours) -> float:
    """Of a picture to frames with the fast preset, whose step is another program."""
    sampling = sampler.fast(ours.settings.sampling)
    fast = Ours(dataclasses.replace(ours.settings, sampling=sampling), ours.params, ours.image)
    print(f"fast: {fast.compile()['advance'][0]:.1f} s to compile its step", flush=True)
    fast.prepare()
    return seconds(fast.run, args.repeats)


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
    settings = pipeline.Settings(
        config,
        sampler.SamplingConfig(),
        activations=args.activations,
        low_memory=args.low_memory,
        devices=args.devices,
    )
    height, width = config.frame_size
    image = jax.random.uniform(jax.random.key(1), (1, height, width, 3))
    if "quality" in args.parts and args.model is None:
        raise SystemExit("--parts quality needs --model")
    if "same" in args.parts and args.devices < 2:
        raise SystemExit("--parts same needs --devices, two or more")
    if set(args.parts) & set(TIMED):
        params, mesh = random_params(config, settings.dtype), pipeline.device_mesh(settings)
        params = params if mesh is None else parallel.repeat(params, mesh)
        ours = Ours(settings, params, image)
        show_compilation(ours, args)
        show_times(args, ours)
        del ours
    if "same" in args.parts:
        import generator_devices

        generator_devices.main(settings, image)
    if "compare" in args.parts:
        import generator_compare

        generator_compare.main(settings, image)
    if "quality" in args.parts:
        import generator_quality

        generator_quality.main(args.model, args.activations, args.picture)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
