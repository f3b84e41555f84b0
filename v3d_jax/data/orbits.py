"""Orbit data sets: TFDS builders stored as array_record, written and read without TensorFlow.

A record is one object seen from v equally spaced cameras. Frames stay encoded (PNG, RGBA with
unmultiplied alpha) until somebody wants them: a clip needs only some of them. A data set lies in
`DIR/orbits/1.0.0`, so that `tfds.data_source("orbits", data_dir=DIR, split=...)` reads it too.

Records go through TFDS's sequential writer: a `GeneratorBasedBuilder` shuffles through memory up to
1 GB and needs TensorFlow's files beyond that.
"""

import hashlib
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from v3d_jax import errors

NAME = "orbits"
VERSION = "1.0.0"
RECORDS_PER_SHARD = 256
# Every call of the writer rewrites the data set's description, which takes longer than a record.
RECORDS_PER_CALL = 16


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

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Orbit:
        record = self._records[int(index)]
        return Orbit(
            name=record["name"].decode(),
            variant=int(record["variant"]),
            frames=list(record["frames"]),
            world_to_camera=record["world_to_camera"],
            intrinsics=record["intrinsics"],
            azimuths=record["azimuths"],
            elevation=float(record["elevation"]),
        )


def source(path: str | Path, split: str = "train") -> Source:
    """Opens one split of an orbit data set; see `Source`."""
    return Source(path, split)


def splits(path: str | Path) -> dict[str, int]:
    """The number of records of every split of an orbit data set."""
    import tensorflow_datasets as tfds

    info = tfds.builder_from_directory(_folder(Path(path))).info
    return {name: split.num_examples for name, split in info.splits.items()}


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

    A few records are in memory at a time. The data set is written aside and renamed when it is
    complete; on any failure nothing is left behind. Raises UserError if `path` exists, cannot be
    written, or if there are no records.
    """
    path = Path(path)
    check_destination(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        _folder(aside).mkdir(parents=True)
        counts = _write(_folder(aside), records, views, size)
        if not counts:
            raise errors.UserError("no orbit could be rendered, so nothing was written")
        aside.rename(path)
    except OSError as error:
        raise errors.UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return counts


def _write(
    folder: Path, records: Iterable[tuple[str, Orbit]], views: int, size: int
) -> Counter[str]:
    import tensorflow_datasets as tfds

    metadata = tfds.core.MetadataDict(views=views, size=size, digest="")
    info = tfds.core.DatasetInfo(
        builder=tfds.core.dataset_builder.dataset_info.DatasetIdentity(
            name=NAME,
            version=tfds.core.Version(VERSION),
            data_dir=str(folder),
            module_name=__name__,
        ),
        description="Objects seen from cameras on a circle around them.",
        features=_features(views),
        metadata=metadata,
    )
    writer = tfds.core.SequentialWriter(
        info, max_examples_per_shard=RECORDS_PER_SHARD, file_format="array_record"
    )
    digest, counts, waiting = hashlib.sha256(), Counter(), defaultdict(list)
    for split, orbit in records:
        if len(orbit.frames) != views:
            raise ValueError(f"{orbit.name} has {len(orbit.frames)} frames, not {views}")
        if split not in counts:
            writer.initialize_splits([split])
        counts[split] += 1
        waiting[split].append(orbit._asdict())
        if len(waiting[split]) == RECORDS_PER_CALL:
            writer.add_examples({split: waiting.pop(split)})
        digest.update(f"{split}\0{orbit.name}\0{orbit.variant}\0".encode())
        for frame in orbit.frames:
            digest.update(frame)
    writer.add_examples(waiting)
    metadata["digest"] = digest.hexdigest()
    writer.close_all()
    return counts


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
