"""The command line on scenes: what is told apart, what is refused, and what is written."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import room_views

from v3d_jax import errors, reconstruct, splatting, unbounded
from v3d_jax.data import colmap, video, walls
from v3d_jax.ops import camera
from v3d_jax.splat import gaussians, recipe, sweep

SPLATS = splatting.SplatArgs(gaussians=400, fit_steps=40)


@pytest.fixture
def source(tmp_path):
    room_views.write(tmp_path / "room", *room_views.shots(), absent=3)
    return tmp_path / "room"


def fails(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["reconstruct", *map(str, arguments), "--no-cache"])
    with pytest.raises(SystemExit) as caught:
        reconstruct.cli()
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    return lines[-1]


def test_objects_are_told_from_scenes():
    room = room_views.shots().images
    assert unbounded.kind(room, None) == "unbounded"
    assert unbounded.kind(room, np.full(room.shape[:3], 255, np.uint8)) == "object"
    on_white = np.full_like(room, 255)
    on_white[:, 10:30, 10:30] = room[:, 10:30, 10:30]
    assert unbounded.kind(on_white, None) == "object"
    assert unbounded.kind(on_white - np.uint8(40), None) == "unbounded"
    cut_off = on_white.copy()
    cut_off[:, 24:] = room[:, 24:]
    assert unbounded.kind(cut_off, None) == "object"
    # A sky that is too bright fills the upper border only.
    sky = room.copy()
    sky[:, :16] = 255
    assert unbounded.kind(sky, None) == "unbounded"


def test_points_that_are_given_come_first(key):
    images, lenses = room_views.shots()
    rng = np.random.default_rng(0)
    points = rng.uniform(-1.0, 1.0, (150, 3)) * [0.3, 2.5, 1.6] + [2.7, 0.0, 0.0]
    points[:10] *= 1e6
    told = colmap.Points(points.astype(np.float32), rng.integers(0, 256, (150, 3), dtype=np.uint8))
    config = splatting.configure(SPLATS, unbounded.Scene())
    begun = unbounded.begin(config, images, lenses, told, key)
    assert begun.given == 140
    assert begun.gaussians.means.shape == (400, 3)
    world = begun.place.origin[None] + begun.place.size * begun.gaussians.means[:140]
    gap = np.abs(np.asarray(world)[:, None] - points[None, 10:]).max(axis=2)
    assert (gap.min(axis=1) < 1e-4).all()
    assert len(set(gap.argmin(axis=1))) == 140
    shown = told.colours[10:][gap.argmin(axis=1)] / 255.0
    np.testing.assert_allclose(
        0.5 + gaussians.SH_C0 * begun.gaussians.sh[:140, 0], shown, atol=1e-5
    )
    far = np.linalg.norm(begun.gaussians.means, axis=1) > 0.9 * sweep.SweepConfig().far
    assert 20 <= far.sum() < 130
    # More of them than the budget has room for: the shell stays.
    few = unbounded.begin(
        splatting.configure(splatting.SplatArgs(gaussians=50), unbounded.Scene()),
        images, lenses, told, key,
    )  # fmt: skip
    assert few.given == 48
    length = np.linalg.norm(few.gaussians.means, axis=1)
    np.testing.assert_allclose(length[48:], sweep.SweepConfig().far, atol=1.0)


def test_recipes_of_scenes():
    mini = splatting.configure(splatting.SplatArgs(), unbounded.Scene(background="white"))
    assert mini.background == "white"
    assert mini.contract
    whole = splatting.configure(splatting.SplatArgs(fit="v3d", degree=1), unbounded.Scene())
    assert (whole.count, whole.degree) == (recipe.SCENE.count, 1)
    assert whole.loss.lpips == 0.0
    assert splatting.configure(splatting.SplatArgs()) == splatting.fit.MINI
    with pytest.raises(errors.UserError, match="faithful is for objects: give --fit v3d or mini"):
        splatting.configure(splatting.SplatArgs(fit="faithful"), unbounded.Scene())


def test_what_a_user_can_get_wrong_is_one_line(tmp_path, source, monkeypatch, capsys):
    out = tmp_path / "out"

    def line(*given):
        return fails(monkeypatch, capsys, *given, "--out", out)

    assert "unbounded scene: give --stages splats" in line(source, "--stages", "splats,mesh")
    assert "--fit faithful" in line(source, "--fit", "faithful")
    assert "--hold-out 1:" in line(source, "--hold-out", "1")
    images, lenses = room_views.shots()
    room_views.write(tmp_path / "two", images[:2], room_views.part(lenses, np.arange(2)))
    assert "leaves 1 of 2 views to fit and 1 to score" in line(tmp_path / "two", "--hold-out", "2")
    same = room_views.part(lenses, np.zeros(4, int))
    room_views.write(tmp_path / "same", images[:4], same)
    assert "at the same place" in line(tmp_path / "same")
    # Back to back, a step apart.
    back = jnp.diag(jnp.asarray([-1.0, 1.0, -1.0, 1.0]))
    poses = jnp.stack([jnp.eye(4).at[2, 3].set(-0.3), back.at[2, 3].set(-0.3)])
    apart = room_views.batch(poses)
    drawn = walls.draw(walls.room(0), apart, (room_views.HEIGHT, room_views.WIDTH), 1)
    room_views.write(tmp_path / "apart", (drawn * 255.0).astype(np.uint8), apart)
    assert "no two cameras look at the same place" in line(tmp_path / "apart")
    assert not out.exists()
    assert not [file for file in tmp_path.iterdir() if "partial" in file.name]


@pytest.mark.slow
def test_pictures_of_a_room_become_gaussians(tmp_path, source, capsys):
    args = reconstruct.ReconstructArgs(
        source, tmp_path / "out", splats=SPLATS, hold_out=4, cache=False
    )
    path = reconstruct.run(args)
    told = capsys.readouterr()
    assert "names 3 of 19 pictures that do not exist" in told.err
    assert "dB on 4 views held out), of 12 views" in told.out
    report = json.loads((path / "report.json").read_text())
    assert report["scene"] == "unbounded"
    assert report["views"] == 16
    assert "3 of 19" in report["notes"][0]
    found = report["splats"]
    assert found["held_out"]["views"] == 4
    assert found["held_out"]["psnr"] > 17.0
    assert found["psnr"] > 18.0
    frames = list(video.frames(path / "splats.mp4"))
    assert len(frames) == splatting.TURN_FRAMES
    assert frames[0].shape == (room_views.HEIGHT, room_views.WIDTH, 3)
    # The file's world is that of the cameras.
    made = gaussians.load_ply(path / "splats.ply")
    inside = (np.abs(np.asarray(made.means)) < 1.3 * walls.room(0).half).all(axis=1)
    assert inside.mean() > 0.6
    place = np.asarray(camera.position(room_views.shots().cameras)).mean(axis=0)
    far = np.linalg.norm(np.asarray(made.means) - place, axis=1)
    assert far.max() > 0.9 * sweep.SweepConfig().far * found["extent"]
    assert jax.tree.all(jax.tree.map(lambda leaf: bool(jnp.isfinite(leaf).all()), made))
