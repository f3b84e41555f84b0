"""CO3D, version 2: videos of objects with cameras, masks and scores of their quality.

    ROOT/CATEGORY/{frame,sequence}_annotations.jgz     gzipped JSON, a list each
    ROOT/CATEGORY/set_lists/set_lists_SUBSET.json      which frames are of train, val and test
    ROOT/CATEGORY/SEQUENCE/{images,masks}/frame000001.{jpg,png} ...

Paths in the annotations are relative to ROOT, sizes are (height, width). Cameras are PyTorch3D's:
x_camera = x_world R + T with rows for vectors, x to the left, y up, z forward. Focal lengths and
the principal point are in NDC, whose x and y grow to the left and up from the middle of the
picture: "ndc_isotropic" has the shorter side from -1 to 1 and the same unit along the longer one,
"ndc_norm_image_bounds" has both sides from -1 to 1. Sources: facebookresearch/co3d, README and the
fields of `co3d/dataset/data_types.py`; PyTorch3D's notes on cameras, whose text has pixel centres
at integers while its data code and the set have the picture's edges at -1 and 1, as here.
"""

import dataclasses
import gzip
import json
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from v3d_jax.data import clips, poses, views
from v3d_jax.errors import UserError

FRAMES, SEQUENCES = "frame_annotations.jgz", "sequence_annotations.jgz"
_CLIP = clips.ClipConfig(num_frames=20, min_sources=2, max_sources=5)
# From PyTorch3D's axes of a camera to OpenCV's.
_FLIP = np.diag([-1.0, -1.0, 1.0])


@dataclasses.dataclass(frozen=True)
class CO3DConfig:
    """How sequences become clips.

    Sequences whose cameras score below `min_quality` (`viewpoint_quality_score`; more is better)
    are left out, all are taken if it is None. Of every picture a box is taken around where the mask
    is above `threshold`, larger by `context` of its width and height; the defaults are those of
    PyTorch3D's reader and of V3D.
    """

    clip: clips.ClipConfig = _CLIP
    min_quality: float | None = None
    threshold: float = 0.4
    context: float = 0.3


class NoSequence(UserError):  # noqa: N818
    """A category has nothing that can be used."""


class Sequence(NamedTuple):
    """A video by the order of its frames; 1.5 KB a frame."""

    name: str  # CATEGORY/SEQUENCE
    posed: tuple[poses.Posed, ...]
    quality: float | None


class _Frame(NamedTuple):
    """What tells a frame's place, and the rest of its annotation."""

    time: float  # seconds
    number: int
    where: str  # in messages
    row: dict[str, Any]


def sequences(
    root: Path,
    category: str,
    config: CO3DConfig,
    skip: clips.Skip,
    *,
    subset: str | None = None,
    split: str = "train",
    seen_only: bool = False,
) -> list[Sequence]:
    """The sequences of a category that make clips; `skip` is told of every other and why.

    With `subset` ("fewview_dev", ...) only those frames count that its list has in `split`, with
    `seen_only` only those whose mask is annotated to hold more than a pixel. What is left out:
    sequences with too few frames, below the quality asked for, with frames that have no camera or
    mask, or with missing files. Raises `UserError` for annotations and lists that are missing,
    damaged or lack an entry and for cameras that are none, and `NoSequence` if nothing is left.
    """
    frames = _frames(root / category / FRAMES)
    qualities = _qualities(root / category / SEQUENCES)
    if subset is not None:
        frames = _listed(frames, root / category / "set_lists" / f"set_lists_{subset}.json", split)
    if seen_only:
        frames = {name: [frame for frame in of if _seen(frame)] for name, of in frames.items()}
    found, first = [], ""
    for name, members in frames.items():
        members = sorted(members, key=lambda frame: (frame.time, frame.number))
        if name not in qualities:
            raise UserError(f"{root / category / SEQUENCES} lacks sequence {name}: get it again")
        reason = _refusal(members, qualities[name], config)
        posed = () if reason else tuple(_posed(root, frame) for frame in members)
        reason = reason or _missing(posed) or clips.refusal(posed, config.clip)
        if reason is None:
            found.append(Sequence(f"{category}/{name}", posed, qualities[name]))
            continue
        first = first or f"{category}/{name}: {reason}"
        skip(f"{category}/{name}", reason)
    if not found:
        told = f"({first})" if first else "(there is none)"
        raise NoSequence(f"no sequence of {root / category} can be used {told}")
    return found


def read(sequence: Sequence, config: CO3DConfig, rng: np.random.Generator) -> clips.Clip:
    """The clip of one sequence: frames in the order of time, the first is the reference.

    Boxes keep their shape, padded right and below to squares; a picture whose mask is nowhere above
    the threshold is taken whole. Cameras and scale are as `clips.Clip` says. Raises `UserError` for
    pictures and masks that are damaged, or of other sizes than annotated.
    """

    def cutter(view: poses.Posed) -> clips.Cut:
        return cut(view, config)

    return clips.read(sequence.name, sequence.posed, cutter, config.clip, rng)


def cut(view: poses.Posed, config: CO3DConfig) -> clips.Cut:
    """One frame's object with its context; raises `UserError` as `read` does."""
    rgb, mask, _ = views.pixels(view, f'its "image.size" in {FRAMES} is')
    box = (0, 0, *view.size) if mask is None else _box(mask, config)
    return clips.cut(rgb, mask, view.intrinsics, box, config.clip.size)


def _box(mask: UInt8[np.ndarray, "h w"], config: CO3DConfig) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the object with its context, within the picture."""
    inside = mask > 255.0 * config.threshold
    edges = []
    for along, length in ((inside.any(axis=0), mask.shape[1]), (inside.any(axis=1), mask.shape[0])):
        there = np.flatnonzero(along)
        low, high = (there[0], there[-1] + 1) if len(there) else (0, length)
        margin = 0.5 * config.context * (high - low)
        edges.append((max(0, round(low - margin)), min(length, round(high + margin))))
    (left, right), (top, bottom) = edges
    return left, top, right, bottom


def _annotations(path: Path) -> list[dict[str, Any]]:
    try:
        with gzip.open(path) as file:
            content = json.loads(file.read())
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise UserError(f"{path} is truncated or no gzip file: get it again") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise UserError(f"{path} holds no list of objects: get the annotations of CO3D version 2")
    return content


def _frames(path: Path) -> dict[str, list[_Frame]]:
    """The frames of every sequence."""
    found = defaultdict(list)
    for index, row in enumerate(_annotations(path)):
        where = f"{path}: frame {index}"
        name, number = _text(row, where, "sequence_name"), int(_number(row, where, "frame_number"))
        where = f"{path}: frame {number} of {name}"
        found[name].append(_Frame(_number(row, where, "frame_timestamp"), number, where, row))
    return dict(found)


def _qualities(path: Path) -> dict[str, float | None]:
    """The score of every sequence's cameras; None for those without."""
    found = {}
    for index, row in enumerate(_annotations(path)):
        where = f"{path}: sequence {index}"
        name, key = _text(row, where, "sequence_name"), "viewpoint_quality_score"
        found[name] = None if row.get(key) is None else _number(row, where, key)
    return found


def _listed(frames: dict[str, list[_Frame]], path: Path, split: str) -> dict[str, list[_Frame]]:
    """Those frames that a set list names; its rows are sequence, frame number and path."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        others = ", ".join(sorted(p.stem.removeprefix("set_lists_") for p in path.parent.glob("*")))
        raise UserError(
            f"cannot read {path}: {error.strerror or error} (there are: {others or 'none'})"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({str(error).splitlines()[0]})") from None
    rows = content.get(split) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise UserError(f'{path} has no list "{split}" of frames')
    numbered = {(name, one.number): one for name, members in frames.items() for one in members}
    found = defaultdict(list)
    for index, row in enumerate(rows):
        try:
            name, number = row[:2]
            found[name].append(numbered[name, number])
        except (TypeError, ValueError, KeyError):
            raise UserError(
                f'{path}: "{split}" {index} is {str(row)[:80]}, which is no frame of {FRAMES}'
            ) from None
    return dict(found)


def _refusal(frames: list[_Frame], quality: float | None, config: CO3DConfig) -> str | None:
    """Why a sequence is left out, as far as annotations tell."""
    if config.min_quality is not None and (quality is None or quality < config.min_quality):
        told = "no viewpoint_quality_score" if quality is None else f"quality {quality:g}"
        return f"has {told}, at least {config.min_quality:g} is asked for"
    for key in ("viewpoint", "mask"):
        without = [frame.number for frame in frames if frame.row.get(key) is None]
        if without:
            return f"has {len(without)} frames without {key}, the first is {without[0]}"
    return None


def _seen(frame: _Frame) -> bool:
    """Whether the mask holds more than a pixel, which is what PyTorch3D's reader asks of it."""
    return frame.row.get("mask") is None or _number(frame.row, frame.where, "mask", "mass") > 1.0


def _missing(posed: tuple[poses.Posed, ...]) -> str | None:
    """Why a sequence is left out, as far as its files tell."""
    paths = [path for view in posed for path in (view.image, view.mask) if path is not None]
    lacking = [path for path in paths if not path.is_file()]
    if not lacking:
        return None
    return f"lacks {len(lacking)} of {len(paths)} pictures and masks, the first is {lacking[0]}"


def _posed(root: Path, frame: _Frame) -> poses.Posed:
    where, row = frame.where, frame.row
    name = _text(row, where, "image", "path")
    height, width = (int(side) for side in _numbers(row, where, (2,), "image", "size"))
    pose = np.eye(4)
    pose[:3, :3] = _FLIP @ _numbers(row, where, (3, 3), "viewpoint", "R").T
    pose[:3, 3] = _FLIP @ _numbers(row, where, (3,), "viewpoint", "T")
    return poses.Posed(
        name,
        root / name,
        root / _text(row, where, "mask", "path"),
        poses.rigid(pose, f'{where}: "viewpoint.R"'),
        _intrinsics(row, where, (width, height)),
        (width, height),
    )


def _intrinsics(row: dict[str, Any], where: str, size: tuple[int, int]) -> Float[np.ndarray, "3 3"]:
    kind = row["viewpoint"].get("intrinsics_format", "ndc_norm_image_bounds")
    half = 0.5 * np.asarray(size)
    if kind == "ndc_isotropic":
        unit = np.full(2, half.min())
    elif kind == "ndc_norm_image_bounds":
        unit = half
    else:
        raise UserError(f'{where}: "viewpoint.intrinsics_format" is {kind!r}, which is unknown')
    focal = unit * _numbers(row, where, (2,), "viewpoint", "focal_length")
    centre = half - unit * _numbers(row, where, (2,), "viewpoint", "principal_point")
    return poses.pinhole(tuple(focal), tuple(centre), f'{where}: "viewpoint"')


def _text(row: dict[str, Any], where: str, *keys: str) -> str:
    value = _entry(row, keys)
    if not isinstance(value, str) or not value:
        raise _wrong(value, where, keys, "a text")
    return value


def _number(row: dict[str, Any], where: str, *keys: str) -> float:
    return float(_numbers(row, where, (), *keys))


def _numbers(
    row: dict[str, Any], where: str, shape: tuple[int, ...], *keys: str
) -> Float[np.ndarray, "..."]:
    value = _entry(row, keys)
    try:
        numbers = np.asarray(value)
    except ValueError:  # of lists of different lengths
        numbers = np.zeros(0)
    if numbers.shape != shape or numbers.dtype.kind not in "if" or not np.isfinite(numbers).all():
        what = "finite numbers" if shape else "a finite number"
        raise _wrong(value, where, keys, " x ".join(map(str, shape)) + " " * bool(shape) + what)
    return numbers.astype(np.float64)


def _entry(row: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        row = row.get(key) if isinstance(row, dict) else None
    return row


def _wrong(value: Any, where: str, keys: tuple[str, ...], needed: str) -> UserError:
    told = "missing" if value is None else str(value)[:60]
    return UserError(f'{where}: "{".".join(keys)}" is {told}: {needed} must be there')
