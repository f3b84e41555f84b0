"""Scores a model on held-out orbits: `python -m v3d_jax.evaluate --model mini --data heldout`.

Every object of the split is generated from its frame 0 and compared with its other frames: PSNR,
SSIM and LPIPS, averaged over the unseen views, then over the objects. Beside the model stand two
baselines (the input repeated; the training orbit that looks most like the input) and the ceiling
that its autoencoder sets by encoding and decoding the true frames.
"""

import dataclasses
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, Key, UInt8

from v3d_jax import __version__, errors, pipeline
from v3d_jax.data import baselines, heldout, orbits, scores
from v3d_jax.diffusion import sampler
from v3d_jax.nn import lpips
from v3d_jax.ops import compiling, metrics
from v3d_jax.ops import image as images
from v3d_jax.weights import folder, packaged, settings
from v3d_jax.weights import lpips as lpips_weights

MODEL, REPEATED, NEAREST, CEILING = ROWS = (
    "model",
    "input view, repeated",
    "nearest training orbit",
    "autoencoder (ceiling)",
)
SHEETS = 16
# What rounding to 8 bits alone costs, 10 log10(12 * 255^2): a repeated view can be exact.
MAX_PSNR = 58.92


@dataclasses.dataclass(frozen=True)
class EvaluateArgs:
    """Prints a table of scores over the unseen views of held-out orbits."""

    model: str = "mini"
    """A packaged model's name, or a model folder."""
    data: str = "heldout"
    """Split of the data set to score on; augmented copies in it are left out."""
    data_dir: Path = Path("data/orbits")
    """Orbit data set with this split and a split "train", made by python -m v3d_jax.render."""
    steps: int | None = None
    """Sampling steps, instead of the model's own."""
    guidance: tuple[float, float] | None = None
    """Smallest and largest guidance scale, instead of the model's own."""
    seed: int = 0
    """Of the noise; an object's orbit depends on it and on the object's place, on nothing else."""
    batch: int = 4
    """Objects generated together."""
    limit: int | None = None
    """Score only so many objects, the first of the split."""
    lpips: Literal["alex", "vgg"] = "alex"
    """Network of LPIPS."""
    out: Path | None = None
    """Folder to make, with scores.csv, scores.json and contact sheets."""


class Prediction(NamedTuple):
    """One object's true frames, and frames and scores by every predictor of `ROWS`."""

    truth: UInt8[np.ndarray, "t h w 3"]
    frames: dict[str, np.ndarray]
    scores: dict[str, dict[str, float]]


class Result(NamedTuple):
    """All objects' names and scores, the sheets of the first of them, and what was run."""

    names: list[str]
    table: scores.Table
    sheets: list[np.ndarray]
    about: dict[str, Any]


def generate(
    config: pipeline.Settings,
    params: Any,
    inputs: Float[Array, "b h w 3"],
    keys: Key[Array, " b"],
) -> Float[Array, "b t h w 3"]:
    """`pipeline.image_to_orbit` of every input with its own key; the UNet sees them as one batch.

    Encoding and decoding go object by object, so that their memory does not grow with the batch.
    """
    condition_keys, noise_keys = jax.vmap(pipeline.split_key)(keys)

    def encode(entry):
        image, key = entry
        condition = pipeline.encode_condition(config, params, image[None], key)
        return jax.tree.map(lambda x: x[0], condition)

    def draw(key):
        return jax.random.normal(key, (1, *config.generator.latent_shape))[0]

    condition = jax.lax.map(encode, (inputs, condition_keys))
    levels = sampler.sigmas(config.sampling)
    start = sampler.begin(jax.vmap(draw)(noise_keys), levels[0])
    latents = pipeline.advance(config, params, condition, start, levels).x
    return jax.lax.map(lambda x: pipeline.decode(config, params, x[None])[0], latents)


def reconstruct(
    config: pipeline.Settings, params: Any, truth: Float[Array, "b t h w 3"]
) -> Float[Array, "b t h w 3"]:
    """True frames through the autoencoder: the decoded means of their posteriors."""

    def one(clip):
        autoencoder = pipeline.networks(config, params).autoencoder
        latents = autoencoder.encode(images.to_network(clip)).mean
        scaled = latents * config.generator.autoencoder.scale_factor
        return pipeline.decode(config, params, scaled[None])[0]

    return jax.lax.map(one, truth)


def score(
    perceptual: lpips.LPIPSParams | None,
    prediction: UInt8[Array, "b t h w 3"],
    truth: UInt8[Array, "b t h w 3"],
) -> dict[str, Float[Array, " b"]]:
    """Every object's metrics over its unseen frames (all but the first), without LPIPS if None."""

    def one(pair):
        a, b = (frames[1:].astype(jnp.float32) / 255.0 for frames in pair)
        values = {
            "psnr": jnp.mean(jnp.minimum(metrics.psnr(a, b), MAX_PSNR)),
            "ssim": jnp.mean(metrics.ssim(a, b)),
        }
        if perceptual is not None:
            distance = lpips.distance(perceptual, images.to_network(a), images.to_network(b))
            values["lpips"] = jnp.mean(distance)
        return values

    return jax.lax.map(one, (prediction, truth))


def predict(
    config: pipeline.Settings,
    params: Any,
    perceptual: lpips.LPIPSParams | None,
    objects: heldout.Objects,
    known: heldout.Records,
    *,
    batch: int,
    seed: int,
) -> Iterator[Prediction]:
    """Predicts and scores the objects in their order, `batch` of them on the device together."""
    size, count = config.generator.frame_size[0], config.generator.num_frames
    nearest = heldout.neighbours(objects, known, size)
    told = {"compiler_options": compiling.OPTIONS}
    sample, rebuild = (
        jax.jit(stage, static_argnums=0, **told) for stage in (generate, reconstruct)
    )
    compare = jax.jit(score, **told)
    total = len(objects.places)
    for first in range(0, total, batch):
        # The last batch repeats its last object, so that every batch has the compiled shape.
        rows = np.minimum(np.arange(first, first + batch), total - 1)
        truth, near = _clips(objects, known, nearest, rows, size, count)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(rows))
        made = {
            MODEL: _to_bytes(sample(config, params, _from_bytes(truth[:, 0]), keys)),
            REPEATED: baselines.repeat(truth[:, 0], count),
            NEAREST: near,
            CEILING: _to_bytes(rebuild(config, params, _from_bytes(truth))),
        }
        marks = {
            name: jax.device_get(compare(perceptual, jnp.asarray(frames), jnp.asarray(truth)))
            for name, frames in made.items()
        }
        for i in range(min(batch, total - first)):
            yield Prediction(
                truth[i],
                {name: frames[i] for name, frames in made.items()},
                {name: {m: float(v[i]) for m, v in row.items()} for name, row in marks.items()},
            )


def _clips(
    objects: heldout.Objects,
    known: heldout.Records,
    nearest: baselines.Nearest,
    rows: np.ndarray,
    size: int,
    count: int,
) -> tuple[np.ndarray, np.ndarray]:
    """True orbits of some objects, and the training orbits nearest to them."""
    true = [heldout.orbit(objects.records, objects.places[row], 0, size, count) for row in rows]
    near = [
        heldout.orbit(known, int(nearest.orbit[row]), int(nearest.start[row]), size, count)
        for row in rows
    ]
    return np.stack(true), np.stack(near)


def evaluate(args: EvaluateArgs) -> Result:
    """Scores the model that the arguments name; reads everything, writes nothing."""
    from tqdm import tqdm

    model = packaged.load(args.model)
    if model.generator.pixelnerf is not None:
        raise errors.UserError(f"{args.model} is a scene model: name a model of objects")
    config = configure(args, model)
    size, count = config.generator.frame_size, config.generator.num_frames
    records = orbits.source(args.data_dir, args.data)
    known = orbits.source(args.data_dir, "train")
    heldout.check(records, size, count)
    heldout.check(known, size, count)
    objects = heldout.select(records, size[0], args.limit)
    perceptual = load_lpips(args.lpips)
    made = predict(
        config, model.params, perceptual, objects, known, batch=args.batch, seed=args.seed
    )
    marks, sheets = [], []
    for prediction in tqdm(made, "evaluating", len(objects.names), unit="object", disable=None):
        marks.append(prediction.scores)
        if len(sheets) < SHEETS:
            sheets.append(scores.sheet(prediction.frames[MODEL], prediction.truth))
    table = {
        name: {metric: np.array([mark[name][metric] for mark in marks]) for metric in row}
        for name, row in marks[0].items()
    }
    about = {
        "model": args.model,
        "model_metadata": model.metadata,
        "sampling": settings.to_json(config.sampling),
        "data": str(args.data_dir),
        "split": args.data,
        "seed": args.seed,
        "unseen_views": count - 1,
        "lpips": None if perceptual is None else args.lpips,
        "version": __version__,
        "device": jax.devices()[0].device_kind,
    }
    return Result(objects.names, table, sheets, about)


def configure(args: EvaluateArgs, model: folder.Model) -> pipeline.Settings:
    """The run's settings: the model's own sampling, changed as the arguments say."""
    changes: dict[str, Any] = {} if args.steps is None else {"steps": args.steps}
    if args.guidance is not None:
        changes |= dict(zip(("guidance_min", "guidance_max"), args.guidance, strict=True))
    sampling = dataclasses.replace(model.sampling, **changes)
    return pipeline.Settings(model.generator, sampling)


def load_lpips(net: Literal["alex", "vgg"]) -> lpips.LPIPSParams | None:
    """The weights of LPIPS, or None and one printed line where they are not installed."""
    try:
        return lpips_weights.load(net)
    except lpips_weights.LPIPSUnavailable as error:
        print(f"no LPIPS column: {error}", file=sys.stderr)
        return None


def report(result: Result) -> str:
    """The table, and how the model compares with the better baseline."""
    lines = [scores.format_table(result.table)]
    compared = scores.against(result.table, MODEL, (REPEATED, NEAREST))
    if "lpips_ratio" in compared:
        lines.append(f"LPIPS is {compared['lpips_ratio']:.3f} x the better baseline's")
    lines.append(f"PSNR is {compared['psnr_gain']:+.2f} dB against the better baseline's")
    return "\n".join(lines)


def write(out: Path, result: Result) -> None:
    """Writes scores.csv, scores.json and sheets/ into a new folder, aside first."""
    aside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        (aside / "sheets").mkdir(parents=True)
        scores.write_csv(aside / "scores.csv", result.table, result.names)
        compared = scores.against(result.table, MODEL, (REPEATED, NEAREST))
        about = result.about | {"against_better_baseline": compared}
        scores.write_json(aside / "scores.json", result.table, result.names, about)
        for place, sheet in enumerate(result.sheets):
            scores.write_sheet(aside / "sheets", place, result.names[place], sheet)
        aside.rename(out)
    except OSError as error:
        raise errors.UserError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def main(argv: list[str] | None = None) -> None:
    """Parses the command line, scores, prints the table and writes the files."""
    args = tyro.cli(EvaluateArgs, args=argv, prog="python -m v3d_jax.evaluate")
    for name in ("steps", "batch", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise errors.UserError(f"--{name} must be at least 1")
    if args.out is not None:
        orbits.check_destination(args.out)
    result = evaluate(args)
    print(
        f"{args.model} on {args.data_dir}, {args.data}: {len(result.names)} objects, "
        f"{result.about['unseen_views']} unseen views each"
    )
    print(report(result))
    if args.out is not None:
        write(args.out, result)
        print(f"written: {args.out}")


def cli() -> None:
    """The command `v3d-evaluate`."""
    errors.run(main)


def _from_bytes(frames: np.ndarray) -> Array:
    return jnp.asarray(frames, jnp.float32) / 255.0


def _to_bytes(frames: Array) -> np.ndarray:
    """What an 8-bit picture keeps: the scores are those of the files that a user gets."""
    return np.asarray(jnp.rint(frames.astype(jnp.float32) * 255.0).astype(jnp.uint8))


if __name__ == "__main__":
    cli()
