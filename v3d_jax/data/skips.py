"""What was left out of a data set and why: a table of one line an object, safe at every moment."""

import contextlib
import csv
from collections.abc import Iterable
from pathlib import Path

COLUMNS = ("object", "reason")


class Skips:
    """The table at `path`, which outlives this process row by row; `reasons` by object."""

    def __init__(self, path: Path):
        self._path = path
        self.reasons: dict[str, str] = {}
        if path.exists():
            # A process that was killed may have left half a line.
            whole = path.read_text("utf-8").rpartition("\n")[0].splitlines()[1:]
            self.reasons = dict(row for row in csv.reader(whole) if len(row) == len(COLUMNS))
        self._rewrite(self.reasons)
        self._file = path.open("a", newline="", encoding="utf-8")

    def add(self, name: str, reason: str) -> None:
        """Adds an object; once this returns, the row outlives this process."""
        self.reasons[name] = _line(reason)
        csv.writer(self._file).writerow([_line(name), self.reasons[name]])
        self._file.flush()

    def finish(self, order: Iterable[str] = ()) -> None:
        """Puts the objects of `order` first, in that order, and removes a table without rows."""
        self.close()
        places = {name: place for place, name in enumerate(order)}
        names = sorted(self.reasons, key=lambda name: places.get(name, len(places)))
        self._rewrite(names)
        if not names:
            self._path.unlink()

    def close(self) -> None:
        """Ends writing."""
        with contextlib.suppress(OSError):  # of a full disk, which `add` has told already
            self._file.close()

    def _rewrite(self, names: Iterable[str]) -> None:
        aside = self._path.with_name(f".{self._path.name}.partial")
        with aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows((_line(name), self.reasons[name]) for name in names)
        aside.replace(self._path)


def _line(text: str) -> str:
    return " ".join(text.split())
