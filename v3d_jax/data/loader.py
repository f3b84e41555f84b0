"""Batches of training clips: Grain over anything that can cut a clip out of an orbit.

Order and every random choice are a pure function of (seed, place in the stream), so a run that was
stopped goes on exactly where it was, on any number of hosts, threads or worker processes.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from v3d_jax.data import orbits


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """How clips are drawn and read.

    `batch_size` counts all hosts. `random_start` is the chance that a clip begins at any view of
    its orbit; else it begins at the first, an object's front in data rendered with
    `--start-azimuth 0`. Every read thread prepares a whole batch, and up to `prefetch` batches wait
    in memory; for clips that lie in memory one or two threads are fastest. `workers` > 0 reads in
    as many processes instead, for work that Python's lock would serialise; each has its own copy
    of clips that lie in memory, and the program's main module must be importable.
    """

    batch_size: int = 64
    num_frames: int = 18
    random_start: float = 1.0
    shuffle: bool = True
    seed: int = 0
    threads: int = 8
    prefetch: int = 8
    workers: int = 0

    def __post_init__(self):
        if not 0.0 <= self.random_start <= 1.0:
            raise ValueError(f"random_start is a chance in [0, 1], not {self.random_start}")


@runtime_checkable
class Clips(Protocol):
    """Orbits of `views` equally spaced frames, from which `clip` takes some."""

    views: int

    def __len__(self) -> int: ...

    def clip(self, index: int, order: Int[np.ndarray, " t"]) -> dict[str, np.ndarray]:
        """Frames `order` of orbit `index`; the first is the input view."""
        ...

    def name(self, index: int) -> str:
        """The object of orbit `index`."""
        ...


@runtime_checkable
class PicturedClips(Clips, Protocol):
    """Clips whose frames can be had as pictures as well."""

    def pictures(self, index: int, views: Int[np.ndarray, " k"]) -> UInt8[np.ndarray, "k h w 3"]:
        """Views of orbit `index` on white."""
        ...


@runtime_checkable
class PathClips(Clips, Protocol):
    """Clips along paths that do not close, of which more is random than where they begin."""

    def path(self, num_frames: int, rng: np.random.Generator) -> Int[np.ndarray, " t"]:
        """The frames of a clip."""
        ...

    def draw(
        self, index: int, order: Int[np.ndarray, " t"], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """As `clip`, with all that is random drawn."""
        ...


@runtime_checkable
class Batches(Protocol):
    """An endless iterator over dictionaries of arrays whose place can be saved and restored.

    The state is a small dictionary of numbers, the same on every host. Close it when done.
    """

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]: ...

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> dict[str, Any]:
        """Where the stream stands: what was handed out, not what was read ahead."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from where a stream of the same clips and settings stood."""
        ...

    def close(self) -> None:
        """Stops threads and processes."""
        ...


class FrameClips:
    """Clips of pictures: "frames" uint8 [t,h,w,3] on white, and the orbit's "index".

    With `first` > 0 only the first so many frames of a clip are decoded and given.
    """

    def __init__(self, source: orbits.Source, first: int = 0):
        self.source = source
        self.views = source.views
        self.first = first or source.views

    def __len__(self) -> int:
        return len(self.source)

    def clip(self, index: int, order: Int[np.ndarray, " t"]) -> dict[str, np.ndarray]:
        """Decodes frames `order` of orbit `index`, or the first of them."""
        return {
            "frames": orbits.pixels(self.source[index], order[: self.first]),
            "index": np.int32(index),
        }

    def name(self, index: int) -> str:
        """Reads the record for its name."""
        return self.source[index].name


class JoinedClips:
    """Several sets of clips with the same number of views, one behind the other."""

    def __init__(self, parts: Sequence[Clips]):
        """Raises ValueError if there is none, or if they differ in their views."""
        views = {part.views for part in parts}
        if len(views) != 1:
            raise ValueError(f"cannot join clips of {sorted(views)} views")
        self.parts, self.views = list(parts), views.pop()
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def clip(self, index: int, order: Int[np.ndarray, " t"]) -> dict[str, np.ndarray]:
        """The clip of the part that holds orbit `index`; its "index" counts over all parts."""
        part, place = self.locate(index)
        return {**part.clip(place, order), "index": np.int32(index)}

    def pictures(self, index: int, views: Int[np.ndarray, " k"]) -> UInt8[np.ndarray, "k h w 3"]:
        """Views of orbit `index`, of parts that are `PicturedClips`."""
        part, place = self.locate(index)
        return part.pictures(place, views)

    def name(self, index: int) -> str:
        """The object of orbit `index`."""
        part, place = self.locate(index)
        return part.name(place)

    def locate(self, index: int) -> tuple[Clips, int]:
        """The part that holds clip `index`, and its number there."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[number], int(index) - int(self._ends[number]) + len(self.parts[number])


def turn(start: int, num_frames: int, views: int) -> Int[np.ndarray, " t"]:
    """The views of one turn of `num_frames` equally spaced frames that begins at view `start`.

    Raises ValueError unless `num_frames` divides `views`.
    """
    if num_frames < 1 or views % num_frames:
        raise ValueError(f"{num_frames} equally spaced frames cannot be taken from {views} views")
    return (start + views // num_frames * np.arange(num_frames)) % views


def batches(
    clips: Clips, config: LoaderConfig, *, pictures: int = 0, rank: int = 0, world: int = 1
) -> Batches:
    """An endless stream of this host's part of every batch: the `rank`-th of `world` in a row.

    Parts laid one behind the other are the batch of one host. Every epoch is shuffled anew, and
    every clip starts where `random_start` has it start; `PathClips` choose their frames themselves.
    With `pictures`, so many random frames of each of the `PicturedClips` come as "pictures" uint8
    [b,k,h,w,3], and their places in the clip as "places" [b,k]. Raises ValueError if the batch
    cannot be divided among `world` hosts or the views among the frames, and if a clip has fewer
    frames than `pictures`.
    """
    import grain

    if not len(clips):
        raise ValueError("there are no orbits to draw clips from")
    if config.batch_size % world:
        raise ValueError(f"a batch of {config.batch_size} cannot be divided among {world} hosts")
    turn(0, config.num_frames, clips.views)
    if pictures > config.num_frames:
        raise ValueError(f"{pictures} pictures cannot be taken from {config.num_frames} frames")

    dataset = grain.MapDataset.range(len(clips)).seed(config.seed)
    if config.shuffle:
        dataset = dataset.shuffle()
    draw = functools.partial(_draw, clips=clips, config=config, pictures=pictures)
    dataset = dataset.repeat().random_map(draw)
    if world > 1:
        # Grain deals clips out one at a time. What is drawn for a clip in training goes by its
        # place in the batch, which must be the same on any number of hosts.
        pick = functools.partial(_pick, source=dataset, batch=config.batch_size, world=world)
        dataset = grain.MapDataset.range(len(dataset)).map(pick)
    return grain.experimental.ElasticIterator(
        dataset,
        config.batch_size,
        grain.sharding.ShardOptions(shard_index=rank, shard_count=world),
        read_options=grain.ReadOptions(
            num_threads=config.threads, prefetch_buffer_size=max(config.prefetch, config.threads)
        ),
        multiprocessing_options=_worker_processes(config.workers),
    )


def _pick(place: int, *, source: Any, batch: int, world: int) -> Any:
    """The clip for a place in the stream that is dealt out to hosts in turn."""
    offset = int(place) % batch
    return source[int(place) - offset + offset % world * (batch // world) + offset // world]


def _draw(
    index: int, rng: np.random.Generator, *, clips: Clips, config: LoaderConfig, pictures: int
) -> dict[str, np.ndarray]:
    if isinstance(clips, PathClips):
        order = clips.path(config.num_frames, rng)
        clip = clips.draw(int(index), order, rng)
    else:
        anywhere = int(rng.integers(clips.views))
        start = anywhere if rng.random() < config.random_start else 0
        order = turn(start, config.num_frames, clips.views)
        clip = clips.clip(int(index), order)
    if pictures:
        places = rng.permutation(config.num_frames)[:pictures]
        clip["pictures"] = clips.pictures(int(index), order[places])
        clip["places"] = places.astype(np.int32)
    return clip


def _worker_processes(workers: int):
    """Grain's options for `workers` processes, or None to stay in this one."""
    if not workers:
        return None
    import grain
    from absl import flags

    # Grain reads absl flags in the parent, which raises unless a command line was parsed.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return grain.MultiprocessingOptions(num_workers=workers)
