"""`python -m v3d_jax.render --mvimgnet` and `--co3d`: records of clips, and what is left out."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import ball_scene
import numpy as np
import pytest
from co3d_files import write_sequence
from co3d_walks import write_annotations, write_list
from mvimgnet_files import write_object

from v3d_jax import errors, render
from v3d_jax.data import clips, co3d, mvimgnet, orbits, posed

VIEWS, SIZE = 4, 32
KILLED = """
import os, signal, sys
from v3d_jax import render
from v3d_jax.data import orbits

add = orbits.Writer.add

def add_and_die(self, split, orbit):
    add(self, split, orbit)
    os.kill(os.getpid(), signal.SIGKILL)

orbits.Writer.add = add_and_die
render.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Three objects of MVImgNet that make clips, and three that do not."""
    root = tmp_path_factory.mktemp("mvimgnet")
    for name in ("7/a", "7/b", "12/c", "12/damaged"):
        write_object(root / name)
    write_object(root / "12/short", count=3)
    (root / "7/empty/images").mkdir(parents=True)
    picture = root / "12/damaged/images/008.jpg"
    picture.write_bytes(picture.read_bytes()[:200])
    (root / "heldout.txt").write_text("7/b\n")
    return root


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    """Two categories of CO3D, one of them with nothing that can be used."""
    root = tmp_path_factory.mktemp("co3d")
    for category, names in (("hydrant", ("a", "b")), ("vase", ("bad",))):
        rows = [row for name in names for row in write_sequence(root, category, name)[0]]
        if category == "vase":
            rows = rows[:3]
        write_annotations(root, category, rows, {"a": 0.9, "b": 0.4, "bad": 0.9})
        write_list(root, category, rows[: len(rows) // 2 + 4], "fewview_train", "train")
    return root


def arguments(kind, root, out, *more):
    return [
        f"--{kind}", str(root), "--out", str(out), "--views", str(VIEWS), "--size", str(SIZE),
        "--workers", "2", *more,
    ]  # fmt: skip


def names(out, split="train"):
    source = orbits.source(out, split)
    return [source[place].name for place in range(len(source))]


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_objects_of_mvimgnet_become_records(objects, tmp_path, capsys):
    out = tmp_path / "set"
    render.main(arguments("mvimgnet", objects, out, "--heldout", str(objects / "heldout.txt")))
    assert capsys.readouterr().out.splitlines() == [
        f"3 clips (1 in heldout, 2 in train): {out}",
        f"3 clips left out: {out / 'skipped.csv'}",
    ]
    assert (names(out), names(out, "heldout")) == (["12/c", "7/a"], ["7/b"])
    rows = (out / "skipped.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["object", "12/damaged", "12/short", "7/empty"]
    assert "008.jpg" in rows[1]
    assert rows[2] == '12/short,"has 3 frames, 4 are needed"'
    assert "holds no COLMAP model" in rows[3]
    config = mvimgnet.MVImgNetConfig(clip=clips.ClipConfig(num_frames=VIEWS, size=SIZE))
    wanted = posed.record(mvimgnet.read(objects / "12/c", config, np.random.default_rng(0)))
    found = orbits.source(out)[0]
    assert found.frames == wanted.frames
    np.testing.assert_array_equal(found.world_to_camera, wanted.world_to_camera)
    np.testing.assert_array_equal(found.intrinsics, wanted.intrinsics)
    # Called again it does nothing; what else was asked for is no going on.
    render.main(arguments("mvimgnet", objects, out, "--heldout", str(objects / "heldout.txt")))
    assert capsys.readouterr().out == f"{out} is complete already\n"
    with pytest.raises(errors.UserError, match="exists already"):
        render.main(arguments("mvimgnet", objects, out))


def test_sequences_of_co3d_become_records(sequences, tmp_path):
    out = tmp_path / "set"
    render.main(arguments("co3d", sequences, out))
    assert names(out) == ["hydrant/a", "hydrant/b"]
    rows = (out / "skipped.csv").read_text().splitlines()
    assert rows[1:] == ['vase/bad,"has 3 frames, 4 are needed"']
    config = co3d.CO3DConfig(clip=clips.ClipConfig(num_frames=VIEWS, size=SIZE))
    found = co3d.sequences(sequences, "hydrant", config, lambda *_: None)
    wanted = posed.record(co3d.read(found[0], config, np.random.default_rng(0)))
    assert orbits.source(out)[0].frames == wanted.frames


def test_settings_of_co3d_choose_sequences_and_frames(sequences, tmp_path):
    out = tmp_path / "quality"
    render.main(arguments("co3d", sequences, out, "--min-quality", "0.5"))
    assert names(out) == ["hydrant/a"]
    assert "hydrant/b" in (out / "skipped.csv").read_text()
    out = tmp_path / "list"
    render.main(
        arguments("co3d", sequences, out, "--subset", "fewview_train", "--categories", "hydrant")
    )
    whole, listed = co3d.sequences(
        sequences,
        "hydrant",
        co3d.CO3DConfig(clip=clips.ClipConfig(num_frames=VIEWS, size=SIZE)),
        lambda *_: None,
        subset="fewview_train",
    )
    assert (len(whole.posed), len(listed.posed)) == (ball_scene.VIEWS, 4)
    config = co3d.CO3DConfig(clip=clips.ClipConfig(num_frames=VIEWS, size=SIZE))
    wanted = posed.record(co3d.read(listed, config, np.random.default_rng(0)))
    assert orbits.source(out)[1].frames == wanted.frames
    assert not (out / "skipped.csv").exists()


def test_parts_are_the_whole(objects, tmp_path):
    found = []
    for part in ("1/2", "2/2"):
        out = tmp_path / part[0]
        render.main(arguments("mvimgnet", objects, out, "--part", part))
        found.append(names(out))
    # Of 12/c, 12/damaged, 12/short, 7/a, 7/b and 7/empty every other one.
    assert found == [["12/c", "7/b"], ["7/a"]]


def test_a_killed_recording_goes_on_and_ends_with_the_same_files(objects, tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "set"
    render.main(arguments("mvimgnet", objects, whole))
    command = [sys.executable, "-c", KILLED, *arguments("mvimgnet", objects, out)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    capsys.readouterr()
    render.main(arguments("mvimgnet", objects, out))
    assert capsys.readouterr().out.splitlines()[0] == "going on: 1 clips are there"
    assert contents(out) == contents(whole)
    with pytest.raises(errors.UserError, match="exists already"):
        render.main(arguments("mvimgnet", objects, out, "--arc-length"))


def test_what_fits_nothing_is_refused_and_leaves_nothing(objects, sequences, tmp_path):
    out = tmp_path / "set"

    def refused(told, *given):
        with pytest.raises(errors.UserError, match=told) as caught:
            render.main([*given, "--out", str(out)])
        assert "\n" not in str(caught.value)

    mv, co = ("--mvimgnet", str(objects)), ("--co3d", str(sequences))
    refused("give one of them", *mv, *co)
    refused("need no meshes", str(objects), *mv)
    refused("need no meshes", *co, "--scenes", "3")
    refused("are for --co3d", *mv, "--min-quality", "0.5")
    refused("are for --mvimgnet and --co3d", str(objects), "--categories", "7")
    refused("has no category 'chair'", *co, "--categories", "chair")
    refused("does not exist", "--co3d", str(objects / "nowhere"))
    refused("holds no CATEGORY/frame_annotations", "--co3d", str(objects))
    refused("holds no objects", "--mvimgnet", str(objects / "7" / "a" / "images"))
    refused("at least 2 for clips", *mv, "--views", "1")
    refused("could be rendered", *mv, "--views", "30")
    assert list(Path(tmp_path).iterdir()) == []
