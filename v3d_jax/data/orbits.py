"""Orbit data sets: TFDS builders stored as array_record, written and read without TensorFlow.

A record is one object seen from v equally spaced cameras. Frames stay encoded (PNG, RGBA with
unmultiplied alpha) until somebody wants them: a clip needs only some of them. A data set lies in
`DIR/orbits/1.0.0`, so that `tfds.data_source("orbits", data_dir=DIR, split=...)` reads it too.

Records are written by `data.shards`: TFDS's own writers lose what they have when the process is
killed, and its `GeneratorBasedBuilder` needs TensorFlow's files for more than 1 GB.
"""

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from v3d_jax import errors
from v3d_jax.data import png, shards, skips

NAME = "orbits"
VERSION = "1.0.0"
RECORDS_PER_SHARD = 256
SKIPPED = "skipped.csv"

_PROGRESS = "progress"
_SHARDS = ".array_record"


class Orbit(NamedTuple):
    """One record: an object's closed turn of v frames, encoded.

    Cameras are as in `ops.camera`: OpenCV world-to-camera, intrinsics in pixels, degrees.
    `variant` 0 is the object as it is; higher ones are augmented copies.
    """

    name: str
    variant: int
    frames: list[bytes]
    world_to_camera: np.ndarray  # float32 [v, 4, 4]
    intrinsics: np.ndarray  # float32 [v, 3, 3]
    azimuths: np.ndarray  # float32 [v]
    elevation: float


class _Last(threading.local):
    """The record that a thread read last."""

    index: int | None = None
    record: Orbit | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Last, ()


class Source:
    """Random access to the records of one split; picklable, and safe to read from threads."""

    def __init__(self, path: str | Path, split: str = "train"):
        """Opens a data set. Raises UserError when there is none, or no such split."""
        import tensorflow_datasets as tfds

        folder = _folder(Path(path))
        if not (folder / "dataset_info.json").is_file():
            raise errors.UserError(
                f"{path} is no orbit data set; make one with: python -m v3d_jax.render"
            )
        builder = tfds.builder_from_directory(folder)
        if split not in builder.info.splits:
            found = ", ".join(sorted(builder.info.splits))
            raise errors.UserError(f"{path} has no split {split!r}; it has: {found}")
        metadata = builder.info.metadata
        self.path, self.split = Path(path), split
        self.views: int = metadata["views"]
        self.size: int = metadata["size"]
        self.digest: str = metadata["digest"]
        self._records = builder.as_data_source(split=split)
        # Of a clip first one thing is wanted and then another. Parsing holds Python's lock, so that
        # a second time costs all threads.
        self._last = _Last()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Orbit:
        """Raises UserError for a record that is damaged."""
        if self._last.index == index and self._last.record is not None:
            return self._last.record
        try:
            record = self._records[int(index)]
        except Exception as error:  # of the file format or of what the record holds
            text = " ".join(str(error).split())[:200]
            raise errors.UserError(
                f"record {int(index)} of {self.split!r} in {self.path} is damaged ({text}): "
                "render or copy the data set again"
            ) from error
        found = Orbit(
            name=record["name"].decode(),
            variant=int(record["variant"]),
            frames=list(record["frames"]),
            world_to_camera=record["world_to_camera"],
            intrinsics=record["intrinsics"],
            azimuths=record["azimuths"],
            elevation=float(record["elevation"]),
        )
        self._last.index, self._last.record = index, found
        return found


def pixels(orbit: Orbit, views: Iterable) -> UInt8[np.ndarray, "k h w 3"]:
    """Views of an orbit, decoded on white; UserError for a picture that is damaged."""
    try:
        return np.stack([png.decode_on_white(orbit.frames[view]) for view in views])
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises
        raise errors.UserError(
            f"a frame of {orbit.name!r} is damaged ({error}): render or copy the data set again"
        ) from error


def source(path: str | Path, split: str = "train") -> Source:
    """Opens one split of an orbit data set; see `Source`."""
    return Source(path, split)


def splits(path: str | Path) -> dict[str, int]:
    """The number of records of every split of an orbit data set."""
    import tensorflow_datasets as tfds

    info = tfds.builder_from_directory(_folder(Path(path))).info
    return {name: split.num_examples for name, split in info.splits.items()}


def made_from(path: Path) -> Any:
    """What a complete data set was made from (see `Writer`); None if there is none or it is old."""
    try:
        return json.loads((_folder(path) / "metadata.json").read_text("utf-8")).get("made_from")
    except (OSError, ValueError):
        return None


def unfinished(path: Path) -> Path:
    """Where a `Writer` keeps what is to become the data set at `path`."""
    return path.with_name(f".{path.name}.partial")


def check_destination(path: Path) -> None:
    """Raises UserError unless a data set can be written at `path`, which must not exist yet."""
    if path.exists() or path.is_symlink():
        raise errors.UserError(f"{path} exists already; remove it or choose another --out")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise errors.UserError(f"cannot write to {parent}; choose another --out")


def build(
    path: str | Path, records: Iterable[tuple[str, Orbit]], *, views: int, size: int
) -> Counter[str]:
    """Writes `(split, orbit)` pairs, as they come, as a data set at `path`; counts them by split.

    On any failure nothing is left behind. Raises UserError if `path` exists, cannot be written, or
    if there are no records.
    """
    path = Path(path)
    check_destination(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with Writer(path, views=views, size=size, aside=aside) as writer:
            for split, orbit in records:
                writer.add(split, orbit)
            return writer.finish()
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class Writer:
    """A data set in the making, which another process can go on with where this one ended.

    It lies in `.NAME.partial` beside `path` (or in `aside`) until it is complete, and is then
    renamed. `made_from` (JSON) is what the records are a function of: only a writer with the same
    goes on. `done` are the records that are there, `skipped` the objects that were left out, and
    why. The order of its calls decides the data set, not how often it was interrupted.
    """

    def __init__(
        self,
        path: Path,
        *,
        views: int,
        size: int,
        made_from: dict[str, Any] | None = None,
        aside: Path | None = None,
    ):
        """Raises UserError if `path` exists, cannot be written, or is begun from something else."""
        check_destination(path)
        self._path, self._views, self._size = path, views, size
        self._made_from = json.loads(json.dumps(made_from))
        self._aside = aside or unfinished(path)
        self._folder, self._progress = _folder(self._aside), self._aside / _PROGRESS
        self._splits: dict[str, shards.Shards] = {}
        self._features, self._serializer = _features(views), None
        with contextlib.ExitStack() as opened, self._writing():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._progress.mkdir(exist_ok=True)
            opened.enter_context(shards.lock(self._progress / "lock"))
            self._check_begun()
            for split in self._begun_splits():
                opened.callback(self._open(split).close)
            self._skips = skips.Skips(self._aside / SKIPPED)
            opened.callback(self._skips.close)
            self._opened = opened.pop_all()
        self.skipped = self._skips.reasons
        self.done = {
            (record.note["name"], record.note["variant"])
            for split in self._splits.values()
            for record in split.records
        }

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        for split in self._splits.values():
            split.close()
        self._opened.close()

    def add(self, split: str, orbit: Orbit) -> None:
        """Adds a record, which is safe when this returns; UserError if the disk is full."""
        if len(orbit.frames) != self._views:
            raise ValueError(f"{orbit.name} has {len(orbit.frames)} frames, not {self._views}")
        digest = hashlib.sha256(f"{orbit.name}\0{orbit.variant}\0".encode())
        for frame in orbit.frames:
            digest.update(frame)
        note = {"name": orbit.name, "variant": orbit.variant, "sha256": digest.hexdigest()}
        with self._writing():
            self._open(split).append(note, self._serialized(orbit))
        self.done.add((orbit.name, orbit.variant))

    def skip(self, name: str, reason: str) -> None:
        """Notes that an object is left out."""
        with self._writing():
            self._skips.add(name, reason)

    def finish(self, order: Iterable[str] = ()) -> Counter[str]:
        """Completes the data set and counts its records by split; UserError if there are none.

        Where objects were left out, `skipped.csv` in the data set says which and why, in the given
        order of names.
        """
        if not self.done:
            shutil.rmtree(self._aside, ignore_errors=True)
            raise errors.UserError("no orbit could be rendered, so nothing was written")
        with self._writing():
            for split in self._splits.values():
                split.finish()
            self._describe()
            self._skips.finish(order)
            self._aside.rename(self._path)
        shutil.rmtree(self._path / _PROGRESS, ignore_errors=True)
        return Counter({name: len(split.records) for name, split in self._splits.items()})

    def _open(self, split: str) -> shards.Shards:
        if split not in self._splits:
            self._splits[split] = shards.Shards(
                self._folder, self._progress, f"{NAME}-{split}{_SHARDS}", RECORDS_PER_SHARD
            )
        return self._splits[split]

    def _begun_splits(self) -> set[str]:
        files = [*self._folder.iterdir(), *self._progress.iterdir()]
        begun = [file.name for file in files if _SHARDS in file.name]
        return {name.rpartition(_SHARDS)[0].removeprefix(f"{NAME}-") for name in begun}

    def _check_begun(self) -> None:
        written = self._progress / "made_from.json"
        if written.exists() and json.loads(written.read_text("utf-8")) != self._made_from:
            raise errors.UserError(
                f"{self._aside} is an unfinished data set of other objects or settings: call it as "
                "before to finish it, or remove it, or choose another --out"
            )
        aside = written.with_suffix(".partial")
        aside.write_text(json.dumps(self._made_from), encoding="utf-8")
        aside.rename(written)

    def _serialized(self, orbit: Orbit) -> bytes:
        from tensorflow_datasets.core import example_serializer

        if self._serializer is None:
            self._serializer = example_serializer.ExampleSerializer(
                self._features.get_serialized_info()
            )
        example = self._features.encode_example(orbit._asdict())
        # The order of a protobuf's map is not the same in every process unless asked for.
        return self._serializer.get_tf_example(example).SerializeToString(deterministic=True)

    def _describe(self) -> None:
        """Writes what TFDS wants to know of the data set."""
        import tensorflow_datasets as tfds

        digest, infos = hashlib.sha256(), []
        for name in sorted(self._splits):
            split = self._splits[name]
            for record in split.records:
                digest.update(f"{name}\0{record.note['sha256']}\0".encode())
            template = tfds.core.ShardedFileTemplate(
                dataset_name=NAME,
                data_dir=self._folder,
                split=name,
                filetype_suffix="array_record",
                template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
            )
            infos.append(
                tfds.core.SplitInfo(
                    name=name,
                    shard_lengths=split.lengths,
                    num_bytes=sum(record.size for record in split.records),
                    filename_template=template,
                )
            )
        info = tfds.core.DatasetInfo(
            builder=tfds.core.dataset_builder.dataset_info.DatasetIdentity(
                name=NAME,
                version=tfds.core.Version(VERSION),
                data_dir=str(self._folder),
                module_name=__name__,
            ),
            description="Objects seen from cameras on a circle around them.",
            features=self._features,
            metadata=tfds.core.MetadataDict(
                views=self._views,
                size=self._size,
                digest=digest.hexdigest(),
                made_from=self._made_from,
            ),
        )
        info.set_file_format("array_record")
        info.set_splits(tfds.core.SplitDict(infos))
        info.write_to_directory(self._folder)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise errors.UserError(
                f"cannot write {self._path}: {error.strerror or error}"
            ) from error


def _features(views: int):
    from tensorflow_datasets import features

    return features.FeaturesDict(
        {
            "name": features.Text(),
            "variant": np.int32,
            # Text holds any bytes; the Image feature would decode every frame on every read.
            "frames": features.Sequence(features.Text()),
            "world_to_camera": features.Tensor(shape=(views, 4, 4), dtype=np.float32),
            "intrinsics": features.Tensor(shape=(views, 3, 3), dtype=np.float32),
            "azimuths": features.Tensor(shape=(views,), dtype=np.float32),
            "elevation": np.float32,
        }
    )


def _folder(path: Path) -> Path:
    return path / NAME / VERSION
