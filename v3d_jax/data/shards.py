"""One split's records as array_record shards that grow a record at a time and outlive a crash.

An array_record file is worth nothing until it is closed. So the records of the shard in progress
stand in a journal, each with its length and checksum, until there are enough of them for a shard:
what a killed process loses is the record that it was writing. Beside every finished shard an index
says what is in it, which spares reading the shard when the work goes on.
"""

import contextlib
import fcntl
import json
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from v3d_jax import errors

# A shard without groups: every record can be read alone. PNG is not compressed again.
OPTIONS = "group_size:1,uncompressed"


class Stored(NamedTuple):
    """A record that is safe: `note` describes it (JSON), `size` is its bytes."""

    note: dict[str, Any]
    size: int


class Shards:
    """The files `<prefix>-00000`, `<prefix>-00001`, ... of `per_shard` records in `folder`.

    `records` tells what is there, in order; opening takes up what an earlier process left.
    Journals and indices lie in `progress`. Errors of the disk are `OSError`s, after which the same
    folders can be opened again.
    """

    def __init__(self, folder: Path, progress: Path, prefix: str, per_shard: int):
        self._folder, self._progress, self._prefix = folder, progress, prefix
        self._per_shard = per_shard
        self._finished: list[list[Stored]] = []
        self._waiting: list[Stored] = []
        while self._shard(len(self._finished)).exists():
            index = json.loads(self._index(len(self._finished)).read_text("utf-8"))
            self._finished.append([Stored(*row) for row in index])
            # Of a process that was killed after it had made the shard.
            self._journal(len(self._finished) - 1).unlink(missing_ok=True)
        self._file = self._take_up(self._journal(len(self._finished)))
        if len(self._waiting) >= per_shard:  # the disk was full when it should become a shard
            self._close_shard()

    @property
    def records(self) -> list[Stored]:
        """All records, in order."""
        return [record for shard in [*self._finished, self._waiting] for record in shard]

    @property
    def lengths(self) -> list[int]:
        """Records of every finished shard."""
        return [len(shard) for shard in self._finished]

    def append(self, note: dict[str, Any], data: bytes) -> None:
        """Adds a record; once this returns, it outlives this process."""
        _write(self._file, note, data)
        self._waiting.append(Stored(note, len(data)))
        if len(self._waiting) == self._per_shard:
            self._close_shard()

    def finish(self) -> None:
        """Makes a shard of what still waits."""
        if self._waiting:
            self._close_shard()

    def close(self) -> None:
        """Ends writing for now."""
        with contextlib.suppress(OSError):  # of a full disk, which `append` has told already
            self._file.close()

    def _close_shard(self) -> None:
        from array_record.python import array_record_module

        number = len(self._finished)
        final, aside = self._shard(number), self._progress / "shard.partial"
        self._file.close()
        try:
            writer = array_record_module.ArrayRecordWriter(str(aside), OPTIONS)
            with self._journal(number).open("rb") as file:
                while (record := _read(file)) is not None:
                    writer.write(record[1])
            writer.close()
            reader = array_record_module.ArrayRecordReader(str(aside))
            written = reader.num_records()
            reader.close()
        except (RuntimeError, ValueError, IndexError) as error:  # what its C++ raises
            raise OSError(str(error)) from error
        if written != len(self._waiting):
            raise OSError(f"{aside} holds {written} of {len(self._waiting)} records")
        # The journal may go only when shard and index are on the disk.
        index = self._index(number)
        index.write_text(json.dumps(self._waiting), encoding="utf-8")
        for path in (index, aside):
            _sync(path)
        aside.rename(final)
        self._journal(number).unlink()
        self._finished.append(self._waiting)
        self._waiting = []
        self._file = self._journal(number + 1).open("ab")

    def _take_up(self, journal: Path) -> BinaryIO:
        """Opens a journal behind its last whole record, and counts those before."""
        file = journal.open("a+b")
        file.seek(0)
        end = 0
        while (record := _read(file)) is not None:
            self._waiting.append(Stored(record[0], len(record[1])))
            end = file.tell()
        file.truncate(end)
        return file

    def _shard(self, number: int) -> Path:
        return self._folder / f"{self._prefix}-{number:05d}"

    def _index(self, number: int) -> Path:
        return self._progress / f"{self._prefix}-{number:05d}.json"

    def _journal(self, number: int) -> Path:
        return self._progress / f"{self._prefix}-{number:05d}.journal"


def lock(path: Path) -> BinaryIO:
    """Holds a file until it is closed or the process ends; UserError if another process does."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise errors.UserError(f"another process writes into {path.parent}: wait for it") from None
    return file


def _write(file: BinaryIO, note: dict[str, Any], data: bytes) -> None:
    """One record of a journal: a line of JSON about it, then its bytes."""
    header = json.dumps([note, len(data), zlib.crc32(data)]).encode()
    file.write(header + b"\n" + data)
    file.flush()


def _read(file: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """The next record of a journal; None at its end, or where it was cut off."""
    try:
        note, size, check = json.loads(file.readline())
    except ValueError:
        return None
    data = file.read(size)
    if len(data) != size or zlib.crc32(data) != check:
        return None
    return note, data


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
