"""A scene model's frames of sequences with known cameras, beside two baselines.

A model is given some input views and the cameras of all frames, and is scored on the frames that
are no input views. The baselines are given the same: the nearest input view, and the input views
warped by a plane (`data.warps`). Axes: n frame of a sequence, u unseen frame, b clip, t frame of a
clip, s side.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8
from tqdm import tqdm

from v3d_jax import console, errors, pipeline, scene_pipeline
from v3d_jax.data import clips, co3d_protocol, scores, shots, warps
from v3d_jax.evaluation import measure
from v3d_jax.evaluation.measure import MODEL
from v3d_jax.nn import lpips, pixelnerf
from v3d_jax.ops import compiling
from v3d_jax.ops import image as images
from v3d_jax.ops.camera import Camera

NEAREST, PLANE = BASELINES = ("nearest input view", "depth-free plane warp")


class Source(NamedTuple):
    """A sequence that was not read yet: `read` gives it with so many input views."""

    name: str
    read: Callable[[int], shots.Shots]
    group: str | None = None
    may_lack: bool = False  # a damaged file leaves the sequence out, and does not stop the run


def of_records(records: Any, size: int, limit: int | None) -> list[Source]:
    """The first `limit` scenes of a split of a data set, at `size` pixels.

    Raises `UserError` where frames are smaller than that, or where the split holds only augmented
    copies.
    """
    if size > records.size:
        raise errors.UserError(
            f"the model makes frames of {size} x {size}, the data are {records.size} x "
            f"{records.size}: render them at the model's size"
        )
    found: list[Source] = []
    for place in range(len(records)):
        if len(found) == limit:
            break
        record = records[place]
        if record.variant == 0:
            read = _reader(records, place, size)
            found.append(Source(record.name, read))
    if not found:
        raise errors.UserError("the split holds no scene as it is, only augmented copies")
    return found


def of_co3d(
    found: Sequence[co3d_protocol.Scored], size: int, background: str, limit: int | None
) -> list[Source]:
    """CO3D's sequences by SparseFusion's protocol, at `size` pixels."""

    def source(one: co3d_protocol.Scored) -> Source:
        def read(views: int) -> shots.Shots:
            return co3d_protocol.read(one, size, views, background)

        return Source(one.sequence.name, read, one.category, may_lack=True)

    return [source(one) for one in found[:limit]]


def evaluate(
    settings: pipeline.Settings,
    params: Any,
    perceptual: lpips.LPIPSParams | None,
    sources: Sequence[Source],
    views: int,
    about: dict[str, Any],
    seed: int,
) -> measure.Result:
    """The scores of all sequences with so many input views.

    A sequence's noise depends on the seed and its place. Raises `UserError` for damaged records,
    and where no sequence is left.
    """
    compare = jax.jit(measure.frames, compiler_options=compiling.OPTIONS)
    names, groups, marks, sheets, left_out = [], [], [], [], {}
    bar = tqdm(sources, f"{views} input views", unit="scene", disable=None)
    for place, source in enumerate(bar):
        try:
            given = source.read(views)
        except errors.UserError as error:
            if not source.may_lack:
                raise
            left_out[source.name] = str(error)
            console.note(f"left out: {source.name}: {error}")
            continue
        truth = given.images[list(given.unseen)]
        key = jax.random.fold_in(jax.random.key(seed), place)
        made = {
            MODEL: generate(settings, params, given, key),
            NEAREST: warps.nearest_view(given),
            PLANE: warps.plane_warp(given),
        }
        scored = {name: compare(perceptual, frames, truth) for name, frames in made.items()}
        marks.append({name: {m: float(v) for m, v in row.items()} for name, row in scored.items()})
        names.append(source.name)
        groups.append(source.group)
        if len(sheets) < measure.SHEETS:
            first = given.images[given.inputs[0]][None]
            sheets.append(scores.sheet(*(np.concatenate([first, x]) for x in (made[MODEL], truth))))
    if not names:
        name, reason = next(iter(left_out.items()))
        raise errors.UserError(f"no sequence could be read ({name}: {reason})")
    about = about | {"input_views": views, "left_out": left_out}
    grouped = None if None in groups else groups
    return measure.Result(names, measure.table(marks), sheets, about, BASELINES, grouped)


def generate(
    settings: pipeline.Settings, params: Any, given: shots.Shots, key: Key[Array, ""]
) -> UInt8[np.ndarray, "u s s 3"]:
    """The model's unseen frames of a sequence, a clip of its length at a time."""
    frames = settings.generator.num_frames
    made: dict[int, np.ndarray] = {}
    for number, chosen in enumerate(shots.clips(given, frames)):
        views, targets = prepare(given, chosen, frames)
        clip = frames_of(settings, params, views, targets, jax.random.fold_in(key, number))
        made |= dict(zip(chosen, clip, strict=False))
    return np.stack([made[frame] for frame in given.unseen])


def frames_of(
    settings: pipeline.Settings,
    params: Any,
    views: pixelnerf.Views,
    targets: Camera,
    key: Key[Array, ""],
) -> UInt8[np.ndarray, "t s s 3"]:
    """The frames of one clip: `scene_pipeline.views_to_frames`, compiled."""
    return measure.to_bytes(_views_to_frames(settings, params, views, targets, key)[0])


def prepare(
    given: shots.Shots, chosen: tuple[int, ...], frames: int
) -> tuple[pixelnerf.Views, Camera]:
    """The input views of a sequence and the cameras [1, t] of a clip, in one normalised world.

    What is normalised are the cameras of the clip and of the input views, each once, as those of a
    training clip are. A clip of too few frames repeats its last.
    """
    everyone = list(dict.fromkeys((*chosen, *given.inputs)))
    moved, _, _ = clips.normalise(given.world_to_camera[everyone])
    poses = dict(zip(everyone, moved, strict=True))
    padded = (*chosen, *chosen[-1:] * (frames - len(chosen)))
    side = given.images.shape[1]
    lenses = [
        cameras(np.stack([poses[n] for n in numbers]), given.intrinsics[list(numbers)], side)
        for numbers in (given.inputs, padded)
    ]
    return source_views(given, lenses[0]), lenses[1]


def source_views(given: shots.Shots, lenses: Camera) -> pixelnerf.Views:
    """The input views as a model takes them, seen by the cameras [1, v]."""
    pictures = images.to_network(measure.from_bytes(given.images[list(given.inputs)]))[None]
    return pixelnerf.Views(pictures, lenses, jnp.ones((1, len(given.inputs)), bool))


def cameras(
    poses: Float[np.ndarray, "n 4 4"], intrinsics: Float[np.ndarray, "n 3 3"], side: int
) -> Camera:
    """Cameras [1, n] of square pictures."""
    size = jnp.full((1, len(poses)), side, jnp.int32)
    pose, lens = (jnp.asarray(x[None], jnp.float32) for x in (poses, intrinsics))
    return Camera(pose, lens, size, size)


def _reader(records: Any, place: int, size: int) -> Callable[[int], shots.Shots]:
    def read(views: int) -> shots.Shots:
        return shots.of_record(records[place], records.size, size, views)

    return read


_views_to_frames = jax.jit(
    scene_pipeline.views_to_frames, static_argnums=0, compiler_options=compiling.OPTIONS
)
