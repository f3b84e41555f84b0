"""What every evaluation shares: metrics of frames, tables with their comparisons, files.

Axes: t frame, h w picture. Frames are uint8: the scores are those of the files that a user gets.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from v3d_jax import errors
from v3d_jax.data import scores
from v3d_jax.nn import lpips
from v3d_jax.ops import image as images
from v3d_jax.ops import metrics
from v3d_jax.weights import lpips as lpips_weights

MODEL = "model"
SHEETS = 16
TOGETHER = 8
# What rounding to 8 bits alone costs, 10 log10(12 * 255^2): a repeated view can be exact.
MAX_PSNR = 58.92

Net = Literal["alex", "vgg"]


class Result(NamedTuple):
    """All objects' names and scores, the sheets of the first of them, and what was run.

    The model stands beside `baselines`, rows of the table; `groups` are the objects' categories
    where they have some.
    """

    names: list[str]
    table: scores.Table
    sheets: list[np.ndarray]
    about: dict[str, Any]
    baselines: tuple[str, ...]
    groups: list[str] | None = None


def frames(
    perceptual: lpips.LPIPSParams | None,
    prediction: UInt8[Array, "t h w 3"],
    truth: UInt8[Array, "t h w 3"],
) -> dict[str, Float[Array, ""]]:
    """Metrics averaged over frames, without LPIPS if its parameters are None."""
    a, b = (frames.astype(jnp.float32) / 255.0 for frames in (prediction, truth))
    values = {
        "psnr": jnp.mean(jnp.minimum(metrics.psnr(a, b), MAX_PSNR)),
        "ssim": jnp.mean(metrics.ssim(a, b)),
    }
    if perceptual is not None:

        def distance(pair):
            return lpips.distance(perceptual, *(images.to_network(x)[None] for x in pair))[0]

        # So many frames at a time: VGG's activations of a whole sequence take gigabytes.
        values["lpips"] = jnp.mean(jax.lax.map(distance, (a, b), batch_size=TOGETHER))
    return values


def load_lpips(net: Net) -> lpips.LPIPSParams | None:
    """The weights of LPIPS, or None and one printed line where they are not installed."""
    try:
        return lpips_weights.load(net)
    except lpips_weights.LPIPSUnavailable as error:
        print(f"no LPIPS column: {error}", file=sys.stderr)
        return None


def table(marks: list[dict[str, dict[str, float]]]) -> scores.Table:
    """The scores of all objects, each by predictor and metric, as one table."""
    return {
        name: {metric: np.array([mark[name][metric] for mark in marks]) for metric in row}
        for name, row in marks[0].items()
    }


def by_group(result: Result) -> scores.Table:
    """The model's scores of every group, as a table of groups."""
    groups = np.asarray(result.groups)
    return {
        group: {m: values[groups == group] for m, values in result.table[MODEL].items()}
        for group in dict.fromkeys(result.groups or ())
    }


def report(result: Result) -> str:
    """The table, how the model compares with the better baseline, and its means by group."""
    lines = [scores.format_table(result.table)]
    compared = scores.against(result.table, MODEL, result.baselines)
    if "lpips_ratio" in compared:
        lines.append(f"LPIPS is {compared['lpips_ratio']:.3f} x the better baseline's")
    lines.append(f"PSNR is {compared['psnr_gain']:+.2f} dB against the better baseline's")
    if result.groups is not None:
        lines += ["the model by category:", scores.format_table(by_group(result))]
    return "\n".join(lines)


def write(out: Path, results: dict[str, Result]) -> None:
    """Writes scores.csv, scores.json and sheets/ of every result into a new folder, aside first.

    A result lies in the folder of its name, or in `out` itself if that is empty.
    """
    aside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        for name, result in results.items():
            _write(aside / name if name else aside, result)
        aside.rename(out)
    except OSError as error:
        raise errors.UserError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def from_bytes(pictures: UInt8[np.ndarray, "*s"]) -> Float[Array, "*s"]:
    """Frames in [0, 1]."""
    return jnp.asarray(pictures, jnp.float32) / 255.0


def to_bytes(pictures: Float[Array, "*s"]) -> UInt8[np.ndarray, "*s"]:
    """What an 8-bit picture keeps of frames in [0, 1]."""
    return np.asarray(jnp.rint(pictures.astype(jnp.float32) * 255.0).astype(jnp.uint8))


def _write(folder: Path, result: Result) -> None:
    (folder / "sheets").mkdir(parents=True)
    scores.write_csv(folder / "scores.csv", result.table, result.names)
    compared = scores.against(result.table, MODEL, result.baselines)
    about = result.about | {"against_better_baseline": compared}
    if result.groups is not None:
        about["by_category"] = scores.means(by_group(result))
    scores.write_json(folder / "scores.json", result.table, result.names, about)
    for place, sheet in enumerate(result.sheets):
        scores.write_sheet(folder / "sheets", place, result.names[place], sheet)
