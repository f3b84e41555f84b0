"""COLMAP's points on generated frames with known cameras, and their distance from real frames'.

V3D's hydrant figure: frames that agree as views of one thing give points, and these lie where the
points of real frames do. Axes: t frame, h w picture, p point.
"""

import csv
import functools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from v3d_jax import errors, pipeline
from v3d_jax.data import baselines, heldout, sparse, views
from v3d_jax.evaluation import measure, objects, scenes
from v3d_jax.ops import compiling

COLUMNS = ("generated_points", "real_points", "accuracy", "completeness", "chamfer", "relative")
HEADINGS = ("points", "real points", "accuracy", "completeness", "Chamfer", "of radius")


class Frames(NamedTuple):
    """Pictures on white with their cameras."""

    images: UInt8[np.ndarray, "t h w 3"]
    world_to_camera: Float[np.ndarray, "t 4 4"]
    intrinsics: Float[np.ndarray, "t 3 3"]


class Pair(NamedTuple):
    """Generated and real frames of one thing in one world, not made or read yet."""

    name: str
    read: Callable[[], tuple[Frames, Frames]]


class Compared(NamedTuple):
    """One pair's clouds; distances in world units, None where a cloud is empty.

    `relative` is the Chamfer distance over the real cloud's root mean square radius, which has no
    unit.
    """

    generated_points: int
    real_points: int
    accuracy: float | None
    completeness: float | None
    chamfer: float | None
    relative: float | None
    clouds: tuple[Float[np.ndarray, "p 3"], Float[np.ndarray, "q 3"]]


def of_folders(folders: Sequence[Path]) -> list[Pair]:
    """Generated and real frames in two folders of posed views, with one world for both.

    Raises `UserError` unless there are two.
    """
    if len(folders) != 2:
        raise errors.UserError(
            f"--protocol points compares two folders, GENERATED REAL, and {len(folders)} were given"
        )
    generated, real = folders
    return [Pair(str(generated), lambda: (read(generated), read(real)))]


def of_objects(
    settings: pipeline.Settings, params: Any, records: heldout.Records, seed: int, limit: int | None
) -> list[Pair]:
    """Generated and true orbits of the first `limit` objects of a split.

    An object's noise is that of `objects.predict`. Raises `UserError` for data that do not suit
    the model.
    """
    size, count = settings.generator.frame_size, settings.generator.num_frames
    heldout.check(records, size, count)
    chosen = heldout.select(records, size[0], limit)
    scale = np.asarray([[size[0] / records.size], [size[0] / records.size], [1.0]])
    order = baselines.turn(np.arange(records.views), 0, count)

    def pair(row: int) -> tuple[Frames, Frames]:
        record = records[chosen.places[row]]
        truth = heldout.orbit(records, chosen.places[row], 0, size[0], count)
        key = jax.random.fold_in(jax.random.key(seed), row)
        made = _generate(settings, params, measure.from_bytes(truth[:1]), key[None])
        cameras = (
            record.world_to_camera[order].astype(np.float64),
            record.intrinsics[order] * scale,
        )
        return Frames(measure.to_bytes(made)[0], *cameras), Frames(truth, *cameras)

    return [Pair(name, functools.partial(pair, row)) for row, name in enumerate(chosen.names)]


def of_scenes(
    settings: pipeline.Settings, params: Any, sources: Sequence[scenes.Source], seed: int
) -> list[Pair]:
    """A scene model's frames from the first view of every sequence, beside the real ones."""

    def pair(place: int) -> tuple[Frames, Frames]:
        given = sources[place].read(1)
        key = jax.random.fold_in(jax.random.key(seed), place)
        made = given.images.copy()
        made[list(given.unseen)] = scenes.generate(settings, params, given, key)
        cameras = given.world_to_camera, given.intrinsics
        return Frames(made, *cameras), Frames(given.images, *cameras)

    return [Pair(one.name, functools.partial(pair, place)) for place, one in enumerate(sources)]


def read(folder: Path) -> Frames:
    """Posed views of any kind that `data.views` reads; raises `UserError` as it does."""
    found = views.read(folder)
    shown = (views.on_white(found.images, found.alpha) * 255.0 + 0.5).astype(np.uint8)
    poses, lenses = (np.asarray(field, np.float64) for field in found.cameras[:2])
    return Frames(shown, poses, lenses)


def compare(generated: Frames, real: Frames, config: sparse.SparseConfig) -> Compared:
    """Clouds of both and the distance between them; raises `UserError` without pycolmap."""
    cloud, other = (sparse.triangulate(*frames, config).positions for frames in (generated, real))
    distance, radius = sparse.distance(cloud, other), sparse.radius(other)
    if distance is None:
        return Compared(len(cloud), len(other), None, None, None, None, (cloud, other))
    relative = None if radius is None else distance.chamfer / radius
    return Compared(len(cloud), len(other), *distance, relative, (cloud, other))


def evaluate(pairs: Sequence[Pair], config: sparse.SparseConfig) -> dict[str, Compared]:
    """Every pair's comparison by its name."""
    bar = tqdm(pairs, "triangulating", unit="pair", disable=None)
    return {pair.name: compare(*pair.read(), config) for pair in bar}


def report(found: dict[str, Compared]) -> str:
    """A line for every pair and, of several, their means over those with two clouds."""
    rows = {name: _numbers(one) for name, one in found.items()}
    if len(found) > 1:
        rows["mean"] = _means(found)
    width = max(len(name) for name in rows)
    lines = [" " * width + "".join(f"{heading:>14}" for heading in HEADINGS)]
    for name, row in rows.items():
        lines.append(f"{name:<{width}}" + "".join(f"{_text(value):>14}" for value in row))
    return "\n".join(lines)


def write(out: Path, found: dict[str, Compared], about: dict[str, Any]) -> None:
    """Writes points.csv, points.json and clouds.npz into a new folder, aside first."""
    aside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    rows = {name: dict(zip(COLUMNS, _numbers(one), strict=True)) for name, one in found.items()}
    means = dict(zip(COLUMNS, _means(found), strict=True))
    arrays = {
        f"{place:03d}_{kind}": cloud
        for place, one in enumerate(found.values())
        for kind, cloud in zip(("generated", "real"), one.clouds, strict=True)
    }
    try:
        aside.mkdir(parents=True)
        with (aside / "points.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["object", *COLUMNS])
            writer.writerows([name, *row.values()] for name, row in rows.items())
        content = about | {"means": means, "objects": rows}
        (aside / "points.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        np.savez(aside / "clouds.npz", **arrays)
        aside.rename(out)
    except OSError as error:
        raise errors.UserError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _numbers(one: Compared) -> list[Any]:
    return [getattr(one, column) for column in COLUMNS]


def _means(found: dict[str, Compared]) -> list[float | None]:
    """Column by column, over the pairs that have a value there."""
    columns = zip(*(_numbers(one) for one in found.values()), strict=True)
    there = [[value for value in column if value is not None] for column in columns]
    return [float(np.mean(column)) if column else None for column in there]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


_generate = jax.jit(objects.generate, static_argnums=0, compiler_options=compiling.OPTIONS)
