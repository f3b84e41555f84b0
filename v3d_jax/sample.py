"""Pictures to orbit videos: `python -m v3d_jax.sample IMAGE... --out DIR`.

Every picture gets a folder DIR/<stem>/ with input.png, frames/, orbit.mp4, transforms.json,
preview.png and report.json (docs/method.md). Without a picture the packaged example is used.
"""

import contextlib
import dataclasses
import os
import platform
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import UInt8
from tqdm import tqdm

from v3d_jax import __version__, errors, pipeline
from v3d_jax.data import output, preprocess
from v3d_jax.ops import camera
from v3d_jax.weights import folder, packaged

STAGES = ("video",)
EXAMPLE = packaged.ASSETS / "example.png"


@dataclasses.dataclass(frozen=True)
class SampleArgs:
    """Turns pictures of objects into orbit videos."""

    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Pictures, best with a transparent background; without any the packaged example."""
    out: Path = Path("out")
    """Folder that receives one folder a picture."""
    model: str = "mini"
    """A packaged model's name, or a model folder."""
    steps: int | None = None
    """Sampling steps, instead of the model's own."""
    sampler: Literal["euler", "heun", "dpmpp_2m"] | None = None
    """Solver, instead of the model's own."""
    schedule: Literal["edm", "ays"] | None = None
    """Noise levels: EDM's, or those of Align Your Steps, instead of the model's own."""
    guidance: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="MIN MAX")] = None
    """Smallest and largest guidance scale over the frames, instead of the model's own."""
    seed: int = 0
    """Of all noise; every picture starts from the same."""
    border: float = preprocess.BORDER
    """Empty share of the frame around the object."""
    stages: str = "video"
    """How far to go, separated by commas: video."""
    activations: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the networks' activations; auto is float32 on a CPU, else bfloat16."""
    cache: bool = True
    """Keep compiled programs in the user's cache folder (~/.cache/v3d_jax)."""


def cli() -> None:
    """Entry point of `v3d-sample` and `python -m v3d_jax.sample`."""
    errors.run(main)


def main() -> None:
    """Parses the command line and runs it."""
    run(tyro.cli(SampleArgs, prog="python -m v3d_jax.sample"))


def run(args: SampleArgs) -> list[Path]:
    """Generates and writes every orbit; returns their folders.

    All pictures are read and all folders checked before the first is generated. Raises `UserError`.
    """
    _check(args)
    pictures = list(args.images) or [EXAMPLE]
    folders = output.plan(pictures, args.out)
    if args.cache:
        enable_cache()
    seconds: dict[str, float] = {}
    with _timed(seconds, "load"):
        model = folder.load(packaged.resolve(args.model))
        settings = configure(args, model)
        params = jax.device_put(nnx.to_pure_dict(model.params))
    height, width = settings.generator.frame_size
    if height != width:
        raise errors.UserError(f"{args.model} makes {width} x {height} frames; orbits are square")
    with _timed(seconds, "prepare"):
        prepared = [preprocess.prepare(picture, width, args.border) for picture in pictures]
    for note in dict.fromkeys(note for one in prepared for note in one.notes):
        print(f"note: {note}", file=sys.stderr)
    cameras = camera.orbit(settings.generator.num_frames, width=width, height=height)
    for picture, one, target in zip(pictures, prepared, folders, strict=True):
        spent = dict(seconds)
        frames = generate(settings, params, one.image, args.seed, spent)
        report = describe(args, settings, picture, one, spent)
        output.write(target, one.rgba, frames, cameras, report)
        generated = sum(spent[stage] for stage in ("encode", "sample", "decode"))
        print(f"{target}: {len(frames)} frames in {generated:.1f} s")
    return folders


def configure(args: SampleArgs, model: folder.Model) -> pipeline.Settings:
    """The model's own sampling settings with those of the command line put in."""
    given = {"steps": args.steps, "sampler": args.sampler, "schedule": args.schedule}
    if args.guidance is not None:
        given["guidance_min"], given["guidance_max"] = args.guidance
    changes = {name: value for name, value in given.items() if value is not None}
    sampling = dataclasses.replace(model.sampling, **changes)
    return pipeline.Settings(model.generator, sampling, activations=args.activations)


def generate(
    settings: pipeline.Settings,
    params: Any,
    image: UInt8[np.ndarray, "h w 3"],
    seed: int,
    seconds: dict[str, float],
) -> UInt8[np.ndarray, "t h w 3"]:
    """`pipeline.generate_orbit`, a stage and a step at a time so that progress can be shown.

    Adds each stage's time to `seconds`, compilation included.
    """
    condition_key, noise_key = pipeline.split_key(jax.random.key(seed))
    pixels = jnp.asarray(image, jnp.float32)[None] / 255.0
    with _stage(seconds, "encode", 1) as bar:
        condition = _encode(settings, params, pixels, condition_key)
        jax.block_until_ready(condition)
        bar.update()
    trajectory, levels = pipeline.begin(settings, 1, noise_key)
    with _stage(seconds, "sample", len(levels) - 1) as bar:
        for step in range(len(levels) - 1):
            trajectory = _advance(settings, params, condition, trajectory, levels[step : step + 2])
            jax.block_until_ready(trajectory)
            bar.update()
    with _stage(seconds, "decode", 1) as bar:
        frames = np.asarray(_decode(settings, params, trajectory.x)[0])
        bar.update()
    if not np.isfinite(frames).all():
        raise errors.UserError("the model gave NaN: try --activations float32, or another --seed")
    return (frames * 255.0 + 0.5).astype(np.uint8)


_encode = jax.jit(pipeline.encode_condition, static_argnums=0)
_advance = jax.jit(pipeline.advance, static_argnums=0)
_decode = jax.jit(pipeline.decode, static_argnums=0)


def describe(
    args: SampleArgs,
    settings: pipeline.Settings,
    picture: Path,
    prepared: preprocess.Prepared,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The report: settings, versions, device, seconds a stage and peak memory in bytes."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "flax", "numpy", "pillow")
    return {
        "image": str(picture),
        "notes": list(prepared.notes),
        "model": args.model,
        "seed": args.seed,
        "border": args.border,
        "sampling": dataclasses.asdict(settings.sampling),
        "conditioning": dataclasses.asdict(settings.conditioning),
        "generator": dataclasses.asdict(settings.generator),
        "activations": settings.dtype.name,
        "versions": {
            "v3d_jax": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
        "device": {"platform": device.platform, "kind": device.device_kind},
        "seconds": {stage: round(spent, 3) for stage, spent in seconds.items()},
        "peak_memory": {
            "host": peak_host_memory(),
            "device": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        },
    }


def peak_host_memory() -> int | None:
    """Peak resident memory of this process in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kibibytes, except on macOS.
    return peak if sys.platform == "darwin" else 1024 * peak


def enable_cache() -> None:
    """Keeps compiled programs between runs, unless JAX was told of a folder already.

    The folder is v3d_jax/jax in $XDG_CACHE_HOME or ~/.cache; where it cannot be written nothing is
    kept.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(root) / "v3d_jax" / "jax"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(path, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _check(args: SampleArgs) -> None:
    unknown = [stage for stage in args.stages.split(",") if stage.strip() not in STAGES]
    if unknown:
        raise errors.UserError(
            f"--stages: {unknown[0]!r} is not available; there is: {', '.join(STAGES)}"
        )
    if args.steps is not None and args.steps < 1:
        raise errors.UserError(f"--steps {args.steps}: at least 1 is needed")
    if not 0.0 <= args.border < 1.0:
        raise errors.UserError(f"--border {args.border}: a fraction from 0 to below 1 is needed")
    if not 0 <= args.seed < 2**32:
        raise errors.UserError(f"--seed {args.seed}: a number from 0 to {2**32 - 1} is needed")
    if args.guidance is not None and not np.isfinite(args.guidance).all():
        raise errors.UserError("--guidance: two finite numbers are needed")


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


@contextlib.contextmanager
def _stage(seconds: dict[str, float], stage: str, steps: int) -> Iterator[tqdm]:
    """A progress bar of a stage, and its time."""
    form = "{desc} {bar:30} {n_fmt}/{total_fmt} {elapsed}<{remaining}"
    with _timed(seconds, stage), tqdm(total=steps, desc=f"{stage:7}", bar_format=form) as bar:
        yield bar


if __name__ == "__main__":
    cli()
