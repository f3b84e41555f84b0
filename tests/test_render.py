"""`python -m v3d_jax.render` on a handful of small meshes, made once for all tests."""

import subprocess
import sys

import numpy as np
import pytest

from v3d_jax import console, errors, render
from v3d_jax.data import finder, orbits, png, turntable
from v3d_jax.mesh import surface

VIEWS, SIZE = 4, 24


def box_obj(width, depth, height):
    """A box in OBJ's axes: y up, front along z."""
    corners = [(x * width, y * height, z * depth) for x in (0, 1) for y in (0, 1) for z in (0, 1)]
    quads = ((1, 2, 4, 3), (5, 7, 8, 6), (1, 5, 6, 2), (3, 4, 8, 7), (1, 3, 7, 5), (2, 6, 8, 4))
    lines = ["v {} {} {}".format(*corner) for corner in corners]
    lines += [f"f {a} {b} {c}\nf {a} {c} {d}" for a, b, c, d in quads]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meshes")
    (folder / "cube.obj").write_text(box_obj(1, 1, 1))
    (folder / "plank.obj").write_text(box_obj(4, 0.4, 1))
    (folder / "tower.obj").write_text(box_obj(1, 1, 4))
    (folder / "broken.obj").write_text("f 1 2 3\n")
    (folder / "heldout.txt").write_text("tower\n\nnot here\n")
    return folder


def arguments(meshes, out, *more):
    return [
        str(meshes), "--out", str(out), "--views", str(VIEWS), "--size", str(SIZE),
        "--heldout", str(meshes / "heldout.txt"), "--elevation-jitter", "20", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def rendered(meshes, tmp_path_factory):
    """The data set of two variants an object, and what the command said."""
    out = tmp_path_factory.mktemp("rendered") / "orbits"
    capture = pytest.MonkeyPatch()
    said = []
    capture.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
    render.main(arguments(meshes, out, "--variants", "2", "--workers", "2"))
    capture.undo()
    return out, said


def load(source):
    return {(o.name, o.variant): o for o in (source[i] for i in range(len(source)))}


def silhouettes(orbit):
    return np.stack([png.decode(frame)[..., 3] > 127 for frame in orbit.frames])


def test_every_object_is_there_in_its_split(rendered):
    out, said = rendered
    train, heldout = orbits.source(out, "train"), orbits.source(out, "heldout")
    assert set(load(train)) == {("cube", 0), ("cube", 1), ("plank", 0), ("plank", 1)}
    assert set(load(heldout)) == {("tower", 0)}
    assert (train.views, train.size) == (VIEWS, SIZE)
    assert said == [
        f"3 objects, 5 orbits (1 in heldout, 4 in train): {out}",
        f"1 objects left out: {out}/skipped.csv",
    ]
    rows = (out / "skipped.csv").read_text().splitlines()
    assert rows == ["object,reason", "broken,unreadable: no triangles"]


def test_held_out_objects_are_plain(rendered):
    orbit = orbits.source(rendered[0], "heldout")[0]
    assert orbit.elevation == 0.0
    np.testing.assert_array_equal(orbit.azimuths, [0, 90, 180, 270])
    shape = silhouettes(orbit)
    # A tower of 1 x 1 x 4: four equal sides, mirrored exactly, taller than wide.
    for view in shape[1:]:
        np.testing.assert_array_equal(view, shape[0])
    assert np.ptp(np.nonzero(shape[0].any(1))) > 2.5 * np.ptp(np.nonzero(shape[0].any(0)))


def test_training_orbits_differ_in_start_and_elevation(rendered):
    train = load(orbits.source(rendered[0]))
    starts = {float(orbit.azimuths[0]) for orbit in train.values()}
    heights = {orbit.elevation for orbit in train.values()}
    assert len(starts) == len(heights) == 4
    assert all(-20 <= height <= 20 for height in heights)
    for orbit in train.values():
        np.testing.assert_allclose(np.diff(orbit.azimuths), 90.0, rtol=1e-5)


def test_cameras_say_where_the_pictures_were_taken(rendered):
    """The object's bounding sphere's centre projects to the middle, at distance 2."""
    for orbit in load(orbits.source(rendered[0])).values():
        turn, offset = orbit.world_to_camera[:, :3, :3], orbit.world_to_camera[:, :3, 3]
        position = -np.einsum("vij,vi->vj", turn, offset)
        angles = np.deg2rad(orbit.azimuths.astype(np.float64)), np.deg2rad(orbit.elevation)
        wanted = 2.0 * np.stack(
            [
                np.cos(angles[1]) * np.cos(angles[0]),
                np.cos(angles[1]) * np.sin(angles[0]),
                np.full(VIEWS, np.sin(angles[1])),
            ],
            axis=-1,
        )
        np.testing.assert_allclose(position, wanted, atol=1e-5)
        focal = SIZE / 2 / np.tan(np.pi / 6)
        np.testing.assert_allclose(orbit.intrinsics[:, 0, 0], focal, rtol=1e-5)
    # A plank seen along its length is narrow, seen from its front wide.
    plank = load(orbits.source(rendered[0]))["plank", 0]
    width = silhouettes(plank).any(1).sum(1)
    across = np.abs(np.sin(np.deg2rad(plank.azimuths)))
    assert np.argmin(width) in (across.argmax(), (across.argmax() + 2) % 4)


def test_background_is_clear_and_pictures_have_content(rendered):
    for orbit in load(orbits.source(rendered[0])).values():
        frames = np.stack([png.decode(frame) for frame in orbit.frames])
        assert frames.shape == (VIEWS, SIZE, SIZE, 4)
        assert (frames[:, 0, 0] == 0).all()
        assert 0.02 < (frames[..., 3] > 127).mean() < 0.9


def test_an_orbit_depends_on_nothing_but_itself(meshes, rendered):
    """The same bytes alone, with another worker count, as inside the whole run."""
    entries = [e for e in finder.find([meshes / "plank.obj"]) if e.name == "plank"]
    config = turntable.TurntableConfig(views=VIEWS, size=SIZE, elevation_jitter=20.0)
    ((split, alone),) = turntable.render(entries, config, lambda *_: None, workers=1)
    whole = load(orbits.source(rendered[0]))["plank", 0]
    assert split == "train"
    assert alone.frames == whole.frames
    assert alone.elevation == pytest.approx(whole.elevation)
    other = turntable.TurntableConfig(views=VIEWS, size=SIZE, elevation_jitter=20.0, seed=1)
    ((_, changed),) = turntable.render(entries, other, lambda *_: None, workers=1)
    assert changed.azimuths[0] != alone.azimuths[0]


@pytest.mark.slow
def test_padding_and_passes_change_no_picture(meshes, monkeypatch):
    entries = finder.find([meshes / "cube.obj"])
    config = turntable.TurntableConfig(views=VIEWS, size=SIZE)
    ((_, whole),) = turntable.render(entries, config, lambda *_: None, workers=1)
    monkeypatch.setattr(turntable, "FACES", (16,))
    monkeypatch.setattr(turntable, "PAIRS_PER_PASS", 32)
    ((_, parts),) = turntable.render(entries, config, lambda *_: None, workers=1)
    assert parts.frames == whole.frames


def test_static_sizes_are_few_and_large_enough():
    numbers = range(1, 500_000, 97)
    sizes = [turntable._static(number, (1 << 11, 1 << 15)) for number in numbers]
    assert set(sizes) == {1 << 11, 1 << 15, 1 << 16, 1 << 17, 1 << 18, 1 << 19}
    assert all(size >= number for size, number in zip(sizes, numbers, strict=True))
    assert turntable._views_per_pass(36, 1 << 11) == 36
    assert turntable._views_per_pass(36, 1 << 17) == 12
    assert turntable._views_per_pass(36, 1 << 24) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--views", "0"], "--views must be at least 1"),
        (["--elevation-jitter", "90"], "below 90"),
        (["--workers", "-1"], "--workers must be at least 0"),
        (["--heldout", "/nowhere.txt"], "--heldout /nowhere.txt cannot be read"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_read(meshes, tmp_path, more, message):
    with pytest.raises(errors.UserError, match=message):
        render.main(arguments(meshes, tmp_path / "out", *more))


def test_programs_are_kept_for_parts_and_for_the_next_run(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(console, "enable_cache", lambda: calls.append("cache"))
    monkeypatch.setattr(render, "_render_meshes", lambda args: calls.append("render"))
    render.main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert calls == ["cache", "render"]


def test_bad_paths_are_refused(meshes, tmp_path):
    with pytest.raises(errors.UserError, match="exists already"):
        render.main([str(meshes), "--out", str(tmp_path)])
    with pytest.raises(errors.UserError, match="does not exist"):
        render.main([str(tmp_path / "absent"), "--out", str(tmp_path / "out")])
    with pytest.raises(errors.UserError, match="in split 'heldout'"):
        render.main([str(meshes), "--out", str(tmp_path / "out"), "--split", "heldout"])
    with pytest.raises(errors.UserError, match="no orbit could be rendered"):
        render.main([str(meshes / "broken.obj"), "--out", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_one_line_and_exits_with_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "v3d_jax.render", "absent.obj", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "error: absent.obj does not exist\n"
    assert done.stdout == ""


@pytest.mark.slow
def test_procedural_objects_are_rendered_beside_the_meshes(meshes, tmp_path):
    out = tmp_path / "out"
    render.main(arguments(meshes, out, "--solids", "2", "--split", "train"))
    found = {name for name, _ in load(orbits.source(out))}
    assert {"solid-000000", "solid-000001"} < found
    assert "plank" in found


def test_meshes_without_faces_for_the_renderer_are_padded():
    mesh = surface.from_geometry(np.zeros((3, 3)), np.asarray([[0, 1, 2]]))
    padded = turntable._padded(mesh)
    assert padded.faces.shape == (turntable.FACES[0], 3)
    assert padded.vertices.shape == (3 * turntable.FACES[0], 3)
    assert padded.atlas.shape == (turntable.TEXTURES[0], 256, 256, 4)
