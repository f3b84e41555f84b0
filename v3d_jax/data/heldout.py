"""The objects a model is scored on: their input views, true orbits, and nearest training orbits.

Frames are uint8 [n, h, w, 3] on white, shrunk by averaging where the data are larger than asked.
"""

from collections.abc import Iterator
from concurrent import futures
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from v3d_jax import errors
from v3d_jax.data import baselines, orbits, png

THREADS = 8


@runtime_checkable
class Records(Protocol):
    """Orbits of `views` frames of `size` x `size` pixels, by number; `orbits.Source` is one."""

    views: int
    size: int

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> orbits.Orbit: ...


class Objects(NamedTuple):
    """The objects to score: their split, their places in it, names and input views."""

    records: Records
    places: list[int]
    names: list[str]
    inputs: UInt8[np.ndarray, "n s s 3"]


def check(records: Records, size: tuple[int, int], count: int) -> None:
    """Raises `UserError` unless the orbits give `count` even frames of `size` (height, width)."""
    if records.views % count:
        raise errors.UserError(
            f"the model makes {count} frames, which do not divide the data's {records.views} views"
        )
    if size[0] != size[1] or size[0] > records.size:
        raise errors.UserError(
            f"the model makes frames of {size[0]} x {size[1]}, the data are {records.size} x "
            f"{records.size}: render them at the model's size"
        )


def select(records: Records, size: int, limit: int | None = None) -> Objects:
    """The first `limit` objects of a split as they are: augmented copies are passed over.

    Raises `UserError` if there is none.
    """
    places, names, inputs = [], [], []
    for place in range(len(records)):
        if len(places) == limit:
            break
        record = records[place]
        if record.variant == 0:
            places.append(place)
            names.append(record.name)
            inputs.append(frames(record._replace(frames=record.frames[:1]), size)[0])
    if not places:
        raise errors.UserError("the split holds no object as it is, only augmented copies")
    return Objects(records, places, names, np.stack(inputs))


def neighbours(objects: Objects, known: Records, size: int) -> baselines.Nearest:
    """Each object's nearest orbit and view in `known`, read whole, with a progress bar.

    Orbits named as one of the objects are left out. Raises `UserError` if nothing is left.
    """
    from tqdm import tqdm

    own = set(objects.names)

    def read(place: int) -> tuple[int, np.ndarray] | None:
        record = known[place]
        return None if record.name in own else (place, frames(record, size))

    def others() -> Iterator[tuple[int, np.ndarray]]:
        group = 4 * THREADS
        with futures.ThreadPoolExecutor(THREADS) as pool:
            bar = tqdm(total=len(known), desc="searching", unit="orbit", disable=None)
            for first in range(0, len(known), group):
                for found in pool.map(read, range(first, min(first + group, len(known)))):
                    bar.update()
                    if found is not None:
                        yield found
            bar.close()

    try:
        return baselines.nearest(objects.inputs, others())
    except baselines.NothingKnown:
        raise errors.UserError(
            "every training orbit is of an object that is scored: there is none to compare with"
        ) from None


def orbit(
    records: Records, place: int, start: int, size: int, count: int
) -> UInt8[np.ndarray, "{count} {size} {size} 3"]:
    """One record's `count` even frames from frame `start` onwards; decodes no others."""
    record = records[place]
    order = baselines.turn(np.arange(len(record.frames)), start, count)
    return frames(record._replace(frames=[record.frames[view] for view in order]), size)


def frames(record: orbits.Orbit, size: int) -> UInt8[np.ndarray, "v s s 3"]:
    """All frames of a record."""
    decoded = np.stack([png.decode_on_white(frame) for frame in record.frames])
    return decoded if decoded.shape[1] == size else baselines.thumbnails(decoded, size)
