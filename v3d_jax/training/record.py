"""What a run leaves behind and shows: log.csv, previews.csv, sample grids, a bar; and when to stop.

Metrics are handed over as device arrays and fetched together, so that the loop does not wait.
"""

import csv
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from v3d_jax import errors
from v3d_jax.parallel import multihost

MAX_COLUMNS = 9


class StopRequest:
    """Whether the run should save and end: after `time_limit` seconds, on SIGTERM or on Ctrl-C.

    As a context it takes the signals over; a second one ends the program at once.
    """

    def __init__(self, time_limit: float | None):
        self._deadline = None if time_limit is None else time.monotonic() + time_limit
        self._signalled = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def requested(self, *, ask: bool) -> bool:
        """The same answer in all processes; several agree only where `ask` is set."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        own = self._signalled or late
        if jax.process_count() == 1:
            return own
        return ask and multihost.any_process(own)

    def _receive(self, number: int, frame: object) -> None:
        del number, frame
        self._signalled = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class Trace:
    """A profile of some `steps` of a run, by the main process; TensorBoard and Perfetto read it.

    The first steps are left out: they compile.
    """

    FIRST = 10

    def __init__(self, folder: Path, steps: int):
        self._folder, self._end = folder, self.FIRST + steps
        self._wanted, self._tracing = steps > 0 and multihost.is_main(), False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def advance(self, count: int, state: Any) -> None:
        """Tells that the step after `count` others comes next; `state` is what they made."""
        if self._wanted and count == self.FIRST:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        elif self._tracing and count == self._end:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()


class Record:
    """Writes a run's tables and grids and shows its progress; only the main process does.

    `names` gives the name of an orbit by its index, `rate` the learning rate of an update.
    """

    def __init__(
        self,
        folder: Path,
        *,
        start: int,
        steps: int,
        batch_size: int,
        names: Callable[[int], str],
        rate: Callable[[int], float],
    ):
        from tqdm import tqdm

        self._folder, self._steps, self._batch_size = folder, steps, batch_size
        self._names, self._rate = names, rate
        self._main = multihost.is_main()
        self._log = Table(folder / "log.csv", start)
        self._previews = Table(folder / "previews.csv", start)
        self._pending: list[tuple[int, dict[str, Any], np.ndarray]] = []
        self._clock = time.monotonic()
        self._timed = 0
        self._bar = tqdm(
            total=steps,
            initial=start,
            disable=not self._main,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {elapsed}{postfix}",
        )

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def add(self, step: int, metrics: dict[str, Any], orbits: np.ndarray) -> None:
        """Takes a step's metrics without waiting for them, and the indices of its orbits."""
        self._pending.append((step, metrics, orbits))
        self._timed += 1

    def restart_clock(self) -> None:
        """Leaves what happened since the last flush out of the speed."""
        self._clock, self._timed = time.monotonic(), 0

    def flush(self) -> None:
        """Waits for the pending steps, writes their means and shows them.

        Raises `UserError` naming the first step whose loss or gradient is not finite.
        """
        if not self._pending:
            return
        fetched = jax.device_get([metrics for _, metrics, _ in self._pending])
        for (step, _, orbits), metrics in zip(self._pending, fetched, strict=True):
            bad = [name for name in ("loss", "grad_norm") if not np.isfinite(metrics[name])]
            if bad:
                raise errors.UserError(self._diverged(step, bad[0], metrics, orbits))
        step = self._pending[-1][0]
        names = ["loss", "grad_norm", *sorted(set(fetched[0]) - {"loss", "grad_norm"})]
        means = {name: float(np.mean([m[name] for m in fetched])) for name in names}
        seconds = time.monotonic() - self._clock
        speed = self._timed / seconds if self._timed else 0.0
        row = {"step": step, **means, "lr": self._rate(step - 1)}
        row["clips_per_s"] = speed * self._batch_size
        if self._main:
            self._log.append(row)
        self._bar.set_postfix_str(self._status(row, speed), refresh=False)
        self._bar.update(step - self._bar.n)
        self._pending = []
        self.restart_clock()

    def preview(self, step: int, images: Any, scores: dict[str, Any], heldout: int) -> None:
        """Writes samples/<step>.png and the mean scores of the shown clips of either split."""
        images, scores = jax.device_get((images, scores))
        if self._main:
            write_grid(self._folder / "samples" / f"{step:07d}.png", images)
            row: dict[str, Any] = {"step": step}
            for name, values in scores.items():
                train, held = np.split(values, [len(values) - heldout])
                row |= {f"{name}_train": float(np.mean(train))} if len(train) else {}
                row |= {f"{name}_heldout": float(np.mean(held))} if len(held) else {}
            self._previews.append(row)
        self.restart_clock()

    def _status(self, row: dict[str, Any], speed: float) -> str:
        left = f"{(self._steps - row['step']) / speed:.0f} s left" if speed else "..."
        return f"loss {row['loss']:.4f}, {row['clips_per_s']:.1f} clips/s, {left}"

    def _diverged(self, step: int, what: str, metrics: dict[str, Any], orbits: np.ndarray) -> str:
        names = ", ".join(f"{int(i)} {self._names(int(i))}" for i in orbits)
        return (
            f"{what} is {metrics[what]} at step {step}, batch of orbits [{names}]: stopped; the "
            f"checkpoints in {self._folder} are of earlier steps; lower the learning rate or look "
            "at these orbits"
        )


class Table:
    """A CSV file of one row a step; rows after `start`, of a longer run before, are dropped."""

    def __init__(self, path: Path, start: int):
        self._path = path
        self._rows: list[dict[str, Any]] = []
        self._columns: list[str] = []
        if path.exists() and multihost.is_main():
            with path.open(newline="", encoding="utf-8") as file:
                self._rows = [row for row in csv.DictReader(file) if int(row["step"]) <= start]
            self._columns = list(self._rows[0]) if self._rows else []
            self._rewrite()

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row, and its columns if they are new."""
        row = {name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()}
        self._rows.append(row)
        new = [name for name in row if name not in self._columns]
        if new:
            self._columns += new
            self._rewrite()
            return
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)

    def _rewrite(self) -> None:
        aside = self._path.with_name(f".{self._path.name}.partial")
        with aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            if self._columns:
                writer.writeheader()
            writer.writerows(self._rows)
        aside.replace(self._path)


def write_grid(path: Path, images: Float[np.ndarray, "r n h w 3"]) -> None:
    """One PNG of rows of images in [0, 1]; of more than nine columns every second is kept."""
    from PIL import Image

    if images.shape[1] > MAX_COLUMNS:
        images = images[:, ::2]
    rows, columns, height, width, _ = images.shape
    tiled = images.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
    pixels = np.round(255.0 * np.clip(tiled, 0.0, 1.0)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    Image.fromarray(pixels).save(aside, format="png")
    aside.replace(path)
