"""What becomes of a mesh whose reading hangs, dies or takes too much memory."""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from v3d_jax.data import finder, objects, quality, reading
from v3d_jax.mesh import surface


def load_box():
    return surface.from_geometry(np.eye(3), np.asarray([[0, 1, 2]]))


def hang():
    time.sleep(60)


def die():
    os.kill(os.getpid(), signal.SIGSEGV)


def chatter():
    print("a parser that says something on stdout", file=sys.stdout)
    raise objects.UnreadableMesh("chatter", "no mesh")


def grow():
    return np.ones(2**34)


@pytest.fixture(scope="module")
def readers():
    # The processes must find this file.
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
    config = reading.ReadConfig(read_seconds=1.0, read_gigabytes=4.0)
    with reading.Readers(config, quality.QualityConfig(max_faces=10)) as readers:
        yield readers
    patch.undo()


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (hang, "reading it took more than 1 s"),
        (die, r"reading it ended the process \(SIGSEGV\)"),
        (chatter, "no mesh"),
        (grow, "reading it takes more than 4 GB"),
    ],
)
def test_it_is_unreadable_and_the_next_is_read(readers, load, reason):
    entry = finder.Entry("odd", "train", load, Path("odd.sh3f"))
    with pytest.raises(objects.UnreadableMesh, match=reason):
        readers.guarded(entry).load()
    good = entry._replace(load=load_box)
    np.testing.assert_array_equal(readers.guarded(good).load().vertices, load_box().vertices)


def test_what_no_parser_reads_is_loaded_here_and_looked_at_as_well(readers):
    entry = finder.Entry("solid", "train", lambda: load_box()._replace(faces=np.zeros((11, 3))))
    with pytest.raises(quality.Refused, match="solid: it has 11 faces"):
        readers.guarded(entry).load()
