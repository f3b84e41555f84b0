"""Does a scene model's picture move as the camera turns? Corners tell, in pixels.

A camera that turns about its own centre moves its picture by the homography K R K^-1, whatever the
depth of what it shows, so that what generated frames should do is known exactly. The model is given
one input view of a scene with known cameras, and two questions about each direction:

* the frames' cameras turn step by step up to `DEGREES`, the first of them the input view's;
* the frames' cameras are the same and the noise is too, but the model is told that the input view
  was taken by a camera that had turned so far. All frames have to move the other way.

Axes: t frame of a clip, h w picture. Poses are world-to-camera with OpenCV axes, in float64.
"""

import csv
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Key, UInt8
from tqdm import tqdm

from v3d_jax import errors, pipeline
from v3d_jax.data import clips, paths, scores, shots, warps
from v3d_jax.evaluation import corners, measure, scenes

DEGREES = 10.0
# The axis about which the camera turns, in its own axes: x is right, y down.
DIRECTIONS = {
    "left": (0.0, 1.0, 0.0),
    "right": (0.0, -1.0, 0.0),
    "up": (-1.0, 0.0, 0.0),
    "down": (1.0, 0.0, 0.0),
}
WITHIN = 2.0  # pixels
ALL = "all"
HEADINGS = ("corners", "tracked", "median px", "90 % px", "in 2 px", "still px")
COLUMNS = (
    *("scene", "measured", "direction", "frame", "start_x", "start_y"),
    *("expected_x", "expected_y", "found_x", "found_y", "correlation"),
)
TARGET, INPUT, WARPED = MEASURED = ("target cameras", "input camera", "frame 0 warped")


class Clips(NamedTuple):
    """What a model made of one view with the frames' cameras turning in one direction.

    `told` has the same cameras and noise, and the input view's pose turned by `DEGREES`.
    """

    turned: UInt8[np.ndarray, "t h w 3"]
    told: UInt8[np.ndarray, "t h w 3"]


class Tracks(NamedTuple):
    """The corners of one frame of one clip: of which scene, what was turned, and where to."""

    scene: str
    measured: str  # of MEASURED
    direction: str  # of DIRECTIONS
    frame: int
    corners: corners.Followed


class Summary(NamedTuple):
    """Figures of some corners; None where no corner tells them."""

    corners: int
    tracked: float | None  # share of the corners
    median: float | None  # of the tracked corners' errors, pixels
    percentile_90: float | None
    within: float | None  # share of the corners that are tracked and at most `WITHIN` pixels off
    still: float | None  # median error in frames that do not move, pixels


class Result(NamedTuple):
    """All corners of all scenes, and contact sheets of the first scenes."""

    names: list[str]
    tracks: list[Tracks]
    sheets: list[UInt8[np.ndarray, "H W 3"]]


def evaluate(
    settings: pipeline.Settings, params: Any, sources: Sequence[scenes.Source], seed: int
) -> Result:
    """Turns the cameras of every scene in every direction and follows the corners.

    The noise of a clip depends on the seed, the scene's place and the direction. Raises `UserError`
    for damaged records, and for scenes whose cameras are all at one place.
    """
    names, tracks, sheets = [], [], []
    count = len(sources) * len(DIRECTIONS)
    with tqdm(desc="turning cameras", total=count, unit="turn", disable=None) as bar:
        for place, source in enumerate(sources):
            given = source.read(1)
            names.append(source.name)
            rows = []
            for number, direction in enumerate(DIRECTIONS):
                key = jax.random.fold_in(jax.random.key(seed), place)
                made = generate(settings, params, given, direction, jax.random.fold_in(key, number))
                lens = given.intrinsics[given.inputs[0]]
                tracks += follow(source.name, direction, made, lens)
                rows.append(_row(given, made, homography(lens, direction)))
                bar.update()
            if len(sheets) < measure.SHEETS:
                sheets.append(np.concatenate(rows))
    return Result(names, tracks, sheets)


def generate(
    settings: pipeline.Settings,
    params: Any,
    given: shots.Shots,
    direction: str,
    key: Key[Array, ""],
) -> Clips:
    """Both clips of one direction, from the first input view of a sequence.

    A camera that only turns has no scale, so the world is normalised by the sequence's own first
    clip, as it is for a model that makes that clip.
    """
    frames = settings.generator.num_frames
    chosen = list(shots.clips(given, frames)[0])
    places = paths.centres(given.world_to_camera[chosen])
    if np.ptp(places, axis=0).max() <= 1e-6 * max(1.0, np.abs(places).max()):
        raise errors.UserError(f"{given.name}: all cameras are at one place, which gives no scale")
    pose = clips.normalise(given.world_to_camera[chosen])[0][0]
    side, lens = given.images.shape[1], given.intrinsics[chosen[:1]]
    path = np.stack([turn(direction, angle) @ pose for angle in np.linspace(0.0, DEGREES, frames)])
    targets = scenes.cameras(path, lens.repeat(frames, axis=0), side)
    one = given._replace(inputs=given.inputs[:1])

    def clip(input_pose: Float[np.ndarray, "4 4"]) -> UInt8[np.ndarray, "t h w 3"]:
        views = scenes.source_views(one, scenes.cameras(input_pose[None], lens, side))
        return scenes.frames_of(settings, params, views, targets, key)

    return Clips(clip(path[0]), clip(path[-1]))


def turn(direction: str, degrees: float) -> Float[np.ndarray, "4 4"]:
    """The motion from a camera's axes to those of the camera turned about its own centre."""
    motion = np.eye(4)
    axis = np.asarray(DIRECTIONS[direction])
    motion[:3, :3] = paths.rotation(axis * np.deg2rad(degrees))
    return motion


def homography(lens: Float[np.ndarray, "3 3"], direction: str) -> Float[np.ndarray, "3 3"]:
    """Where a camera's pixels go when it turns by `DEGREES`: K R K^-1."""
    return lens @ turn(direction, DEGREES)[:3, :3] @ np.linalg.inv(lens)


def follow(scene: str, direction: str, made: Clips, lens: Float[np.ndarray, "3 3"]) -> list[Tracks]:
    """The corners of one direction's clips.

    Of the target cameras those of frame 0 in the last frame, which is turned by `DEGREES`; of the
    input camera those of the first, the middle and the last frame in the same frame of the other
    clip. And those of frame 0 in frame 0 warped by the homography, as a flawless model has it:
    what is off there is the measurement's own error.
    """
    moved = homography(lens, direction)
    last = len(made.turned) - 1
    start, end = made.turned[0], made.turned[last]
    found = [
        Tracks(scene, TARGET, direction, last, corners.follow(start, end, moved)),
        Tracks(scene, WARPED, direction, 0, corners.follow(start, warp(start, moved), moved)),
    ]
    back = np.linalg.inv(moved)
    for frame in sorted({0, last // 2, last}):
        pair = corners.follow(made.turned[frame], made.told[frame], back)
        found.append(Tracks(scene, INPUT, direction, frame, pair))
    return found


def warp(
    picture: UInt8[np.ndarray, "h w 3"], moved: Float[np.ndarray, "3 3"]
) -> UInt8[np.ndarray, "h w 3"]:
    """A picture under a homography; beyond its edge it has the edge's colours."""
    height, width = picture.shape[:2]
    y, x = np.mgrid[:height, :width] + 0.5
    places, _ = corners.transform(np.linalg.inv(moved), np.stack([x, y], axis=-1))
    return (warps.sample(picture, places) + 0.5).astype(np.uint8)


def summary(tracks: Sequence[Tracks]) -> Summary:
    """The figures of some corners taken together."""
    total = sum(len(one.corners.start) for one in tracks)
    if not total:
        return Summary(0, None, None, None, None, None)
    error, motion, tracked = (
        np.concatenate([getattr(one.corners, name) for one in tracks])
        for name in ("error", "motion", "tracked")
    )
    within = float((tracked & (error <= WITHIN)).mean())
    still, share = float(np.median(motion)), float(tracked.mean())
    if not tracked.any():
        return Summary(total, share, None, None, within, still)
    median, most = (float(np.percentile(error[tracked], q)) for q in (50, 90))
    return Summary(total, share, median, most, within, still)


def summaries(result: Result) -> dict[str, dict[str, Summary]]:
    """The figures of every scene, and of "all" corners together, by what was turned."""
    named = {name: [one for one in result.tracks if one.scene == name] for name in result.names}
    return {
        name: {what: summary([one for one in tracks if one.measured == what]) for what in MEASURED}
        for name, tracks in (named | {ALL: result.tracks}).items()
    }


def report(result: Result) -> str:
    """Three lines for every scene and for all of them together."""
    found = summaries(result)
    width, wide = max(len(name) for name in found), max(len(what) for what in MEASURED)
    lines = [" " * (width + wide + 2) + "".join(f"{heading:>12}" for heading in HEADINGS)]
    for name, rows in found.items():
        for what, row in rows.items():
            cells = (
                str(row.corners),
                *(_text(value, 2) for value in row[1:]),
            )
            line = f"{name:<{width}}  {what:<{wide}}"
            lines.append(line + "".join(f"{cell:>12}" for cell in cells))
            name = ""
    return "\n".join(lines)


def write(out: Path, result: Result, about: dict[str, Any]) -> None:
    """Writes corners.csv, rotation.json and sheets/ into a new folder, aside first."""
    aside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    scores_of = {
        name: {what: row._asdict() for what, row in rows.items()}
        for name, rows in summaries(result).items()
    }
    try:
        (aside / "sheets").mkdir(parents=True)
        with (aside / "corners.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for one in result.tracks:
                told = (one.scene, one.measured, one.direction, one.frame)
                writer.writerows((*told, *numbers) for numbers in _numbers(one.corners))
        about = about | {"degrees": DEGREES, "within_px": WITHIN, "scenes": scores_of}
        text = json.dumps(about, indent=2) + "\n"
        (aside / "rotation.json").write_text(text, encoding="utf-8")
        for place, sheet in enumerate(result.sheets):
            scores.write_sheet(aside / "sheets", place, result.names[place], sheet)
        aside.rename(out)
    except OSError as error:
        raise errors.UserError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _numbers(found: corners.Followed) -> list[list[float]]:
    places = (found.start, found.expected, found.found, found.correlation[:, None])
    return np.concatenate(places, axis=1).tolist()


def _text(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _row(
    given: shots.Shots, made: Clips, moved: Float[np.ndarray, "3 3"]
) -> UInt8[np.ndarray, "H W 3"]:
    """Input, the frames at 0 and `DEGREES`, the latter as it should be; the same for the input."""
    start, back = made.turned[0], np.linalg.inv(moved)
    row = [given.images[given.inputs[0]], start, made.turned[-1], warp(start, moved)]
    row += [made.told[0], warp(start, back)]
    return np.concatenate(row, axis=1)
