"""Reads other people's mesh files in processes of their own, several at a time.

A file may hang its parser, take all memory or crash it: then a process ends that did nothing else,
and the object counts as unreadable. The processes are this module run as a program; they are
started when needed and hold no accelerator.
"""

import contextlib
import functools
import math
import os
import pickle
import queue
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from v3d_jax.data import finder, objects, quality
from v3d_jax.mesh import surface

GIB = 2**30


@dataclass(frozen=True)
class ReadConfig:
    """What reading one object may cost."""

    read_seconds: float = 120.0
    """Longest time to read one mesh file."""
    read_gigabytes: float = 16.0
    """Most memory (address space) for it."""


class Readers:
    """Guards the loading of entries; a context, which ends its processes.

    `guarded` entries load what `quality` accepts and raise `objects.UnreadableMesh` for the rest,
    whatever becomes of the process that reads. They may be loaded in any number of threads.
    """

    def __init__(self, config: ReadConfig, accepts: quality.QualityConfig):
        self._config, self._accepts = config, accepts
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()

    def __enter__(self) -> "Readers":
        return self

    def __exit__(self, *exception: object) -> None:
        while not self._idle.empty():
            _end(self._idle.get())

    def guarded(self, entry: finder.Entry) -> finder.Entry:
        """The same object; packed ones and solids are read in this process."""
        return entry._replace(load=functools.partial(self._load, entry))

    def _load(self, entry: finder.Entry) -> surface.Mesh:
        if entry.file is not None:
            quality.check_file(entry.name, entry.file, self._accepts)
            mesh = self._elsewhere(entry)
        else:
            mesh = entry.load()
        quality.check_mesh(entry.name, mesh, self._accepts)
        return mesh

    def _elsewhere(self, entry: finder.Entry) -> surface.Mesh:
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            process = _start(self._config)
        try:
            pickle.dump(entry.load, process.stdin)
            process.stdin.flush()
            found = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise objects.UnreadableMesh(entry.name, self._what_ended(process)) from None
        except BaseException:  # of this thread: the answer would be taken for the next one's
            process.kill()
            _end(process)
            raise
        self._idle.put(process)
        if isinstance(found, objects.UnreadableMesh):
            raise found
        return found

    def _what_ended(self, process: subprocess.Popen) -> str:
        _end(process)
        if process.returncode == -signal.SIGALRM:
            return f"reading it took more than {self._config.read_seconds:g} s"
        if process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            return f"reading it ended the process ({name})"
        return f"reading it ended the process (status {process.returncode})"


def _start(config: ReadConfig) -> subprocess.Popen:
    limits = [str(config.read_seconds), str(config.read_gigabytes)]
    return subprocess.Popen(
        [sys.executable, "-m", __name__, *limits],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Whoever stops the rendering by Ctrl-C stops the reading by closing its input.
        start_new_session=True,
    )


def _end(process: subprocess.Popen) -> None:
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            pipe.close()
    process.wait()


def _main(seconds: float, gigabytes: float) -> None:
    """Answers every load function on stdin by the mesh, or by why there is none."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a parser prints must not get in between
    limit = int(gigabytes * GIB)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses a limit: it sets none
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    while True:
        try:
            load: Callable[[], surface.Mesh] = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        # Not caught: it ends the process wherever it is.
        signal.alarm(math.ceil(seconds))
        try:
            found = load()
        except objects.UnreadableMesh as error:
            found = error
        except MemoryError:
            found = objects.UnreadableMesh("", f"reading it takes more than {gigabytes:g} GB")
        signal.alarm(0)
        pickle.dump(found, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    _main(*(float(text) for text in sys.argv[1:]))
