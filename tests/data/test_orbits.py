import pickle
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from v3d_jax import errors
from v3d_jax.data import orbits, png


def test_records_come_back_exactly(orbit_folder, noise_orbits):
    source = orbits.source(orbit_folder, "train")
    assert (len(source), source.views, source.size) == (5, 6, 16)
    for index, wanted in enumerate(noise_orbits):
        found = source[index]
        assert found.frames == wanted.frames
        assert (found.name, found.variant) == (wanted.name, wanted.variant)
        assert found.elevation == pytest.approx(wanted.elevation)
        for field in ("world_to_camera", "intrinsics", "azimuths"):
            np.testing.assert_array_equal(getattr(found, field), getattr(wanted, field))
            assert getattr(found, field).dtype == np.float32


def test_splits_are_apart(orbit_folder, noise_orbits):
    assert orbits.splits(orbit_folder) == {"train": 5, "heldout": 1}
    assert orbits.source(orbit_folder, "heldout")[0].name == noise_orbits[3].name


def test_a_source_can_be_sent_to_another_process(orbit_folder, noise_orbits):
    copy = pickle.loads(pickle.dumps(orbits.source(orbit_folder)))
    assert copy[4].frames == noise_orbits[4].frames


def test_a_record_is_read_once_for_all_that_a_thread_wants_of_it(orbit_folder, monkeypatch):
    source = orbits.source(orbit_folder)
    records, read = source._records, []

    class Counted:
        def __getitem__(self, index):
            read.append(index)
            return records[index]

    monkeypatch.setattr(source, "_records", Counted())
    first = source[0]
    assert source[0] is first
    assert source[1].frames != first.frames
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: source[1].frames).result() == source[1].frames
    assert read == [0, 1, 1]


def test_more_records_than_a_shard_holds(tmp_path, monkeypatch, noise_orbits):
    monkeypatch.setattr(orbits, "RECORDS_PER_SHARD", 2)
    path = tmp_path / "set"
    records = [("train", orbit) for orbit in noise_orbits]
    assert orbits.build(path, records, views=6, size=16) == {"train": 5}
    shards = list(path.rglob("*.array_record*"))
    assert len(shards) == 3
    source = orbits.source(path)
    assert [source[i].name for i in range(5)] == [orbit.name for orbit in noise_orbits]


def test_the_digest_follows_every_frame(tmp_path, orbit_folder, noise_orbits):
    changed = noise_orbits[0]._replace(frames=noise_orbits[0].frames[::-1])
    digests = {orbits.source(orbit_folder).digest}
    for name, orbit in (("same", noise_orbits[0]), ("again", noise_orbits[0]), ("turned", changed)):
        orbits.build(tmp_path / name, [("train", orbit)], views=6, size=16)
        digests.add(orbits.source(tmp_path / name).digest)
    assert len(digests) == 3


def test_nothing_is_left_behind_by_a_failed_build(tmp_path, noise_orbits):
    def records():
        yield "train", noise_orbits[0]
        raise RuntimeError("the renderer broke")

    with pytest.raises(RuntimeError, match="broke"):
        orbits.build(tmp_path / "set", records(), views=6, size=16)
    with pytest.raises(errors.UserError, match="no orbit could be rendered"):
        orbits.build(tmp_path / "set", [], views=6, size=16)
    short = noise_orbits[0]._replace(frames=noise_orbits[0].frames[:2])
    with pytest.raises(ValueError, match="has 2 frames, not 6"):
        orbits.build(tmp_path / "set", [("train", short)], views=6, size=16)
    assert list(tmp_path.iterdir()) == []


def test_wrong_places_are_refused_in_one_line(tmp_path, orbit_folder):
    with pytest.raises(errors.UserError, match="is no orbit data set"):
        orbits.source(tmp_path)
    with pytest.raises(errors.UserError, match="no split 'test'; it has: heldout, train"):
        orbits.source(orbit_folder, "test")
    with pytest.raises(errors.UserError, match="exists already"):
        orbits.check_destination(orbit_folder)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(errors.UserError, match="cannot write to"):
        orbits.check_destination(file / "set")


def test_a_damaged_record_is_one_line(tmp_path, noise_orbits):
    path = tmp_path / "set"
    torn = noise_orbits[1]._replace(frames=[b"no picture", *noise_orbits[1].frames[1:]])
    orbits.build(path, [("train", noise_orbits[0]), ("train", torn)], views=6, size=16)
    with pytest.raises(errors.UserError, match=f"a frame of '{torn.name}' is damaged"):
        orbits.pixels(orbits.source(path)[1], [1, 0])
    shard = next(path.rglob("*.array_record-00000"))
    data = bytearray(shard.read_bytes())
    data[300:364] = bytes(64)  # inside the first record
    shard.write_bytes(data)
    with pytest.raises(errors.UserError, match=r"record 0 of 'train' in .* is damaged") as caught:
        orbits.source(path)[0]
    assert "\n" not in str(caught.value)


PROGRAM = """
    import sys
    from pathlib import Path
    import numpy as np
    import tensorflow_datasets as tfds
    from v3d_jax.data import loader, orbits, png

    out = Path(sys.argv[1])
    frame = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    matrices = np.zeros((2, 4, 4), np.float32), np.zeros((2, 3, 3), np.float32)
    orbit = orbits.Orbit("x", 0, [png.encode(frame)] * 2, *matrices, np.zeros(2, np.float32), 0.0)
    orbits.build(out, [("train", orbit)] * 2, views=2, size=8)
    records = tfds.data_source("orbits", data_dir=out, split="train")
    assert (png.decode(records[1]["frames"][0]) == frame).all()
    stream = loader.batches(
        loader.FrameClips(orbits.source(out)), loader.LoaderConfig(2, num_frames=1, threads=1)
    )
    next(stream)
    stream.close()
    assert "tensorflow" not in sys.modules
    print("done")
"""


def test_tfds_reads_it_by_name_and_nothing_imports_tensorflow(tmp_path):
    program = textwrap.dedent(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "set")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "done"


def test_frames_decode_to_pictures(orbit_folder):
    frame = orbits.source(orbit_folder)[2].frames[1]
    wanted = np.random.default_rng(2).integers(0, 256, (6, 16, 16, 4), dtype=np.uint8)[1]
    np.testing.assert_array_equal(png.decode(frame), wanted)
