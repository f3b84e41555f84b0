"""A rendering that is killed goes on where it was, and what is not worth rendering is left out."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_generator
import trimesh
from flax import nnx
from PIL import Image

from v3d_jax import errors, render
from v3d_jax.data import orbits, turntable
from v3d_jax.diffusion.sampler import SamplingConfig
from v3d_jax.weights import folder

PROGRAM = """
import os, signal, sys
from v3d_jax import render
from v3d_jax.data import orbits

records, killed_after = int(sys.argv[1]), int(sys.argv[2])
orbits.RECORDS_PER_SHARD = records
add = orbits.Writer.add

def add_and_die(self, split, orbit):
    global killed_after
    add(self, split, orbit)
    killed_after -= 1
    if not killed_after:
        os.kill(os.getpid(), signal.SIGKILL)

orbits.Writer.add = add_and_die
render.main(sys.argv[3:])
"""


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Nested GLB files: six boxes in colours, one with a texture, and three that are no use."""
    folder = tmp_path_factory.mktemp("objects")
    rng = np.random.default_rng(0)
    for number in range(6):
        mesh = trimesh.creation.box(extents=rng.uniform(0.3, 1.0, 3))
        mesh.visual.face_colors = rng.integers(0, 256, (12, 4)) | [0, 0, 0, 255]
        path = folder / f"{number % 2:03d}" / f"box{number}.glb"
        path.parent.mkdir(exist_ok=True)
        mesh.export(path)
    texture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    mesh = trimesh.creation.box()
    uv = rng.uniform(size=(len(mesh.vertices), 2))
    mesh.visual = trimesh.visual.TextureVisuals(uv=uv, image=texture)
    mesh.export(folder / "textured.glb")
    (folder / "001" / "cut.glb").write_bytes((folder / "textured.glb").read_bytes()[:300])
    (folder / "empty.glb").write_bytes(b"")
    trimesh.creation.cylinder(1e-4, 2.0).export(folder / "needle.glb")
    return folder


def arguments(objects, out, *more):
    return [
        str(objects), "--out", str(out), "--views", "3", "--size", "16", "--variants", "2",
        "--workers", "2", *more,
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(orbits, "RECORDS_PER_SHARD", 3)


@pytest.fixture(scope="module")
def unbroken(objects, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "set"
    patch = pytest.MonkeyPatch()
    patch.setattr(orbits, "RECORDS_PER_SHARD", 3)
    render.main(arguments(objects, out))
    patch.undo()
    return out


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_what_is_no_use_is_listed_with_its_reason(unbroken):
    rows = (unbroken / "skipped.csv").read_text().splitlines()
    assert rows[0] == "object,reason"
    assert [row.split(",")[0] for row in rows[1:]] == ["001/cut", "empty", "needle"]
    assert "unreadable: " in rows[1]
    assert re.fullmatch(r"needle,it covers 0\.\d+% of its frames|.*frames are empty", rows[3])
    names = {source.name for source in map(orbits.source(unbroken).__getitem__, range(14))}
    assert names == {*(f"{n % 2:03d}/box{n}" for n in range(6)), "textured"}


@pytest.mark.slow
def test_a_killed_rendering_goes_on_and_ends_with_the_same_files(
    objects, unbroken, tmp_path, capsys, monkeypatch
):
    """Killed in the middle of the second shard; no orbit is made twice."""
    out = tmp_path / "set"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(jax.device_count()),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }
    command = [sys.executable, "-c", PROGRAM, "3", "5", *arguments(objects, out)]
    killed = subprocess.run(command, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    render.main(arguments(objects, out))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "going on: 5 orbits are there, 20 wanted"
    assert said[1] == f"7 objects, 14 orbits (14 in train): {out}"
    assert contents(out) == contents(unbroken)
    assert list(tmp_path.iterdir()) == [out]

    monkeypatch.setattr(turntable, "render", None)  # it would fail if it rendered anything
    render.main(arguments(objects, out))
    assert capsys.readouterr().out == f"{out} is complete already\n"


def test_a_half_written_record_is_written_again(unbroken, tmp_path):
    """Cut anywhere, a journal gives the records before the cut, and the data end the same."""
    source = orbits.source(unbroken)
    records = [source[index] for index in range(5)]
    for share in (0.1, 0.5, 1.0):
        out = tmp_path / str(share)
        with orbits.Writer(out, views=3, size=16) as writer:
            for record in records[:4]:
                writer.add("train", record)
            writer.add("heldout", records[4])
        journal = next(orbits.unfinished(out).rglob("*train*.journal"))
        with journal.open("r+b") as file:
            file.truncate(int(share * (journal.stat().st_size - 1)))
        with orbits.Writer(out, views=3, size=16) as writer:
            assert len(writer.done) == 4
            writer.add("train", records[3])
            assert writer.finish() == {"train": 4, "heldout": 1}
        assert orbits.source(out)[3].frames == records[3].frames
    assert len({orbits.source(tmp_path / str(share)).digest for share in (0.1, 0.5, 1.0)}) == 1


def test_other_settings_do_not_go_on(objects, tmp_path):
    out = tmp_path / "set"
    orbits.Writer(out, views=3, size=16, made_from={"objects": "other"}).__exit__()
    with pytest.raises(errors.UserError, match="unfinished data set of other objects or settings"):
        render.main(arguments(objects, out))


@pytest.mark.parametrize("size", [1000, 8000])
def test_a_full_disk_is_one_line_and_loses_nothing(unbroken, tmp_path, size):
    """No file may grow beyond so many bytes: then a journal fails, or a shard."""
    source, out = orbits.source(unbroken), tmp_path / "set"
    records = [source[index] for index in range(len(source))]

    def write():
        with orbits.Writer(out, views=3, size=16) as writer:
            for record in records:
                writer.add("train", record)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(errors.UserError, match=f"cannot write {out}: .") as caught:
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    with orbits.Writer(out, views=3, size=16) as writer:
        kept = set(writer.done)
        for record in records:
            if (record.name, record.variant) not in kept:
                writer.add("train", record)
        writer.finish()
    assert len(kept) == (0 if size == 1000 else 3)
    files = "orbits/1.0.0/*array_record*"
    for found, wanted in zip(sorted(out.glob(files)), sorted(unbroken.glob(files)), strict=True):
        assert found.read_bytes() == wanted.read_bytes()


def test_a_part_is_what_it_is_in_the_whole(objects, unbroken, tmp_path):
    out = tmp_path / "part"
    render.main(arguments(objects, out, "--part", "2/2"))
    part, whole = orbits.source(out), orbits.source(unbroken)
    wanted = {(o.name, o.variant): o.frames for o in map(whole.__getitem__, range(len(whole)))}
    assert 0 < len(part) < len(whole)
    for orbit in map(part.__getitem__, range(len(part))):
        assert wanted[orbit.name, orbit.variant] == orbit.frames
    with pytest.raises(errors.UserError, match="--part 3/2: write which part of how many"):
        render.main(arguments(objects, tmp_path / "none", "--part", "3/2"))


def test_latents_are_written_beside_a_complete_data_set(objects, unbroken, tmp_path, capsys):
    out, model = tmp_path / "set", tmp_path / "model"
    shutil.copytree(unbroken, out)
    params = nnx.to_pure_dict(tiny_generator.params())
    folder.save(model, tiny_generator.CONFIG, SamplingConfig(steps=1), params)
    render.main(arguments(objects, out, "--latents", str(model), "--dtype", "float32"))
    assert capsys.readouterr().out == f"{out} is complete already\n"
    (latents,) = out.glob("latents-*/latents.npy")
    assert np.load(latents).shape == (14, 3, 8, 8, 4)
    (tokens,) = out.glob("tokens-*/tokens.npy")
    assert np.load(tokens).shape == (14, 3, 1, 8)
    with pytest.raises(errors.UserError, match="nowhere is no autoencoder"):
        render.main(arguments(objects, out, "--latents", str(tmp_path / "nowhere")))


def test_two_commands_do_not_write_the_same_data_set(tmp_path):
    with orbits.Writer(tmp_path / "set", views=2, size=8):  # noqa: SIM117
        with pytest.raises(errors.UserError, match="another process writes into"):
            orbits.Writer(tmp_path / "set", views=2, size=8)
