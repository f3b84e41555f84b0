"""Sequences of posed pictures to be scored on: some are input views, the others unseen.

Axes: n frame of a sequence along its path, s side. Cameras are OpenCV's as in `ops.camera`, in
numpy's float64; pixels are those of the pictures.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from v3d_jax import errors
from v3d_jax.data import baselines, orbits


class Shots(NamedTuple):
    """One sequence and its input views, the first of them the one that a model starts from."""

    name: str
    images: UInt8[np.ndarray, "n s s 3"]
    world_to_camera: Float[np.ndarray, "n 4 4"]
    intrinsics: Float[np.ndarray, "n 3 3"]
    inputs: tuple[int, ...]

    @property
    def unseen(self) -> tuple[int, ...]:
        """The frames that are no input views, in order."""
        return tuple(i for i in range(len(self.images)) if i not in self.inputs)


def even(frames: int, views: int) -> tuple[int, ...]:
    """Input views spread evenly over a path: the first frame, and with more than one the last.

    Raises `UserError` where that leaves no frame unseen.
    """
    if views >= frames:
        raise errors.UserError(
            f"{views} input views of sequences of {frames} frames leave none unseen: give fewer"
        )
    return tuple(int(place) for place in np.linspace(0, frames - 1, views).round())


def of_record(record: orbits.Orbit, stored: int, size: int, views: int) -> Shots:
    """A scene of a data set with so many even input views, on white where it is transparent.

    Frames are shrunk from `stored` pixels a side to `size`, intrinsics with them. Raises
    `UserError` for a damaged frame.
    """
    images = orbits.pixels(record, range(len(record.frames)))
    if size != stored:
        images = baselines.thumbnails(images, size)
    scale = np.asarray([[size / stored], [size / stored], [1.0]])
    return Shots(
        record.name,
        images,
        record.world_to_camera.astype(np.float64),
        record.intrinsics * scale,
        even(len(images), views),
    )


def clips(shots: Shots, frames: int) -> list[tuple[int, ...]]:
    """What a model of so many frames makes of a sequence, a clip at a time, by frame.

    Every clip begins with the first input view. All other frames follow in their order, the other
    input views among them, as in a training clip.
    """
    first, step = shots.inputs[0], frames - 1
    others = [i for i in range(len(shots.images)) if i != first]
    return [(first, *others[start : start + step]) for start in range(0, len(others), step)]
