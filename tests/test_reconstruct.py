import json
import math
import subprocess
import sys

import fixtures
import jax.numpy as jnp
import numpy as np
import pytest
import trimesh
from PIL import Image

from v3d_jax import errors, meshing, reconstruct, splatting, surfacing
from v3d_jax.data import output
from v3d_jax.ops import camera
from v3d_jax.splat import gaussians, path, rasterize, start
from v3d_jax.weights import lpips as lpips_weights

SIZE, VIEWS = 32, 6
FILES = {"splats.ply", "splats.mp4", "preview.png", "report.json"}
DRAW = fixtures.jit(rasterize.rasterize, static_argnums=2)
SPLATS = splatting.SplatArgs(gaussians=150, fit_steps=40, fit_views=2)


@pytest.fixture(scope="module")
def frames():
    """Six views of a coloured ball of Gaussians on white."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(400, 3))
    points *= 0.5 / np.linalg.norm(points, axis=1, keepdims=True)
    ball = start.from_points(
        jnp.asarray(points, jnp.float32),
        jnp.asarray(0.1 + 0.7 * (points > 0), jnp.float32),
        opacity=0.95,
    )
    cameras = camera.orbit(VIEWS, width=SIZE, height=SIZE)
    config = rasterize.RasterConfig(width=SIZE, height=SIZE, slots=1 << 15)
    color = DRAW(ball, cameras, config, jnp.ones(3)).color
    return (np.clip(np.asarray(color), 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8), cameras


@pytest.fixture
def source(tmp_path, frames):
    """A folder with the files that `sample` writes, in nerfstudio's convention."""
    folder = tmp_path / "source"
    (folder / "frames").mkdir(parents=True)
    names = [f"frames/{index:03d}.png" for index in range(VIEWS)]
    for name, frame in zip(names, frames[0], strict=True):
        Image.fromarray(frame).save(folder / name)
    (folder / "transforms.json").write_text(json.dumps(output.transforms(frames[1], names)))
    return folder


def arguments(source, out, **changes):
    changes.setdefault("splats", SPLATS)
    return reconstruct.ReconstructArgs(source=source, out=out, cache=False, **changes)


def fails(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["reconstruct", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        reconstruct.cli()
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    assert all(line.startswith(("note: ", "error: ")) for line in lines)
    return lines[-1]


@pytest.mark.slow
def test_views_become_gaussians(tmp_path, source, frames, capsys, monkeypatch):
    def unavailable(net):
        raise lpips_weights.LPIPSUnavailable(f"no weights of {net}")

    path = reconstruct.run(arguments(source, tmp_path / "out"))
    captured = capsys.readouterr()
    for stage, total in (("carve", 1), ("fit", 40), ("render", VIEWS + splatting.TURN_FRAMES)):
        assert f"{stage:7}" in captured.err
        assert f"{total}/{total}" in captured.err
    assert "150 Gaussians" in captured.out
    assert {file.name for file in path.iterdir()} == FILES
    made = gaussians.load_ply(path / "splats.ply")
    assert made.means.shape == (150, 3)
    report = json.loads((path / "report.json").read_text())
    assert set(report["seconds"]) == {"load", "carve", "fit", "render"}
    assert report["splats"]["carved"] is True
    assert report["splats"]["fit"]["steps"] == 40
    assert 0.0 < report["splats"]["lpips"] < 1.0
    config = rasterize.RasterConfig(width=SIZE, height=SIZE, slots=1 << 15)
    found = DRAW(made, frames[1], config, jnp.ones(3)).color
    squares = np.square(np.clip(found, 0.0, 1.0) - frames[0] / 255.0)
    psnr = np.mean([-10.0 * math.log10(square.mean()) for square in squares])
    assert report["splats"]["psnr"] == pytest.approx(psnr, abs=0.1)
    white = np.mean([-10.0 * math.log10(np.square(1 - f / 255.0).mean()) for f in frames[0]])
    assert psnr > white + 4.0
    # Again, in place of the first: the same Gaussians.
    before = (path / "splats.ply").read_bytes()
    monkeypatch.setattr(lpips_weights, "load", unavailable)
    reconstruct.run(arguments(source, path))
    assert (path / "splats.ply").read_bytes() == before
    assert "no weights of alex; without them the report has no" in capsys.readouterr().err
    assert json.loads((path / "report.json").read_text())["splats"]["lpips"] is None
    assert not [file for file in tmp_path.iterdir() if "partial" in file.name]


@pytest.mark.slow
def test_views_become_a_mesh(tmp_path, source, frames, capsys):
    args = meshing.MeshArgs(
        faces=500, colours="vertices", texture_steps=20, mesh_resolution=64, mesh_formats="ply"
    )
    surface = surfacing.SurfaceArgs("preview", surface_steps=60)
    path = reconstruct.run(
        arguments(source, tmp_path / "out", stages="mesh", mesh=args, surface=surface)
    )
    captured = capsys.readouterr()
    for stage in ("hull", "surface", "extract", "texture"):
        assert f"{stage:7}" in captured.err
    names = {"mesh.glb", "mesh.ply", "preview.png", "report.json"}
    assert {file.name for file in path.iterdir()} == names
    report = json.loads((path / "report.json").read_text())
    assert report["mesh"]["watertight"] is True
    assert report["mesh"]["field"]["carved"] is True
    assert f"{report['mesh']['faces']} faces" in captured.out
    ball = trimesh.load(path / "mesh.ply")
    assert ball.is_watertight
    # 0.5 and the outermost Gaussians' blur, give or take two of the pictures' coarse pixels.
    np.testing.assert_allclose(ball.bounds, [[-0.6] * 3, [0.6] * 3], atol=0.15)
    white = np.mean([-10.0 * math.log10(np.square(1 - f / 255.0).mean()) for f in frames[0]])
    assert report["mesh"]["psnr"] > white + 4.0


@pytest.mark.slow
def test_without_weights_the_recipe_goes_on(monkeypatch, frames, capsys):
    class StoppedError(Exception):
        pass

    def unavailable(net):
        raise lpips_weights.LPIPSUnavailable(f"no weights of {net}")

    def fit_run(config, *given, **more):
        assert (config.loss.lpips, more["perceptual"]) == (0.0, None)
        assert config.loss.l1 > 0
        assert config.loss.dssim == 1.0
        raise StoppedError

    monkeypatch.setattr(lpips_weights, "load", unavailable)
    monkeypatch.setattr(splatting.fit, "run", fit_run)
    for recipe in ("v3d", "faithful"):
        args = splatting.SplatArgs(fit=recipe, gaussians=150)
        with pytest.raises(StoppedError):
            splatting.reconstruct(args, splatting.Frames(frames[0], None, frames[1]), 0, {})
        lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("note: ")]
        assert lines == ["note: no weights of vgg; without them the fit goes on with L1 and DSSIM"]


def test_what_a_user_can_get_wrong_is_one_line(tmp_path, source, frames, monkeypatch, capsys):
    out = tmp_path / "out"

    def line(*given):
        return fails(monkeypatch, capsys, *given, "--out", out, "--no-cache")

    def changed(pictures):
        for index, picture in enumerate(pictures):
            Image.fromarray(picture).save(source / "frames" / f"{index:03d}.png")
        return line(source)

    assert "does not exist" in line(tmp_path / "absent")
    assert "holds no posed views" in line(tmp_path)
    assert "--stages" in line(source, "--stages", "splats,cake")
    assert "--seed" in line(source, "--seed", "-1")
    assert "--tolerated" in line(source, "--tolerated", "-1")
    assert "--max-side" in line(source, "--max-side", "4")
    assert "--fit-steps 0" in line(source, "--fit-steps", "0")
    assert "--mesh-resolution 9" in line(source, "--mesh-resolution", "9")
    white = np.full((VIEWS, SIZE, SIZE, 3), 255, np.uint8)
    white[:, 0, 0] -= np.arange(VIEWS, dtype=np.uint8)[:, None]
    assert "show no object" in changed(white)
    assert "identical" in changed(frames[0][:1].repeat(VIEWS, 0))
    assert "holds the source" in fails(monkeypatch, capsys, source, "--out", source)
    assert "holds the source" in fails(monkeypatch, capsys, source, "--out", tmp_path)
    transforms = json.loads((source / "transforms.json").read_text())
    for index in range(1 + VIEWS // 2):
        (source / "frames" / f"{index:03d}.png").unlink()
    assert "do not exist" in line(source)
    transforms["frames"][0]["transform_matrix"][0][0] = 3.0
    (source / "transforms.json").write_text(json.dumps(transforms))
    assert "transform_matrix" in changed(frames[0])
    (source / "transforms.json").write_text("{")
    assert "is not JSON" in line(source)
    clip = tmp_path / "orbit.mp4"
    output.write_mp4(clip, frames[0])
    clip.write_bytes(clip.read_bytes()[:-200])
    assert "damaged" in line(clip)
    assert not out.exists()


def test_sizes_that_do_not_fit(tmp_path, source, frames, monkeypatch, capsys):
    Image.fromarray(frames[0][0][:, :16]).save(source / "frames" / "000.png")
    assert '"w" is 32' in fails(monkeypatch, capsys, source, "--out", tmp_path / "out")
    small = frames[0][:, :8]
    with pytest.raises(errors.UserError, match="32 x 8: at least 16"):
        splatting.reconstruct(SPLATS, splatting.Frames(small, None, frames[1]), 0, {})
    same = frames[0][:1].repeat(VIEWS, 0)
    with pytest.raises(errors.UserError, match="all frames are identical"):
        splatting.reconstruct(SPLATS, splatting.Frames(same, None, frames[1]), 0, {})


def test_turn_goes_round_what_the_cameras_look_at():
    """In a world whose up is x and whose object is away from the origin."""
    told = camera.orbit(7, width=8, height=8, elevation=20.0, radius=3.0)
    shift = jnp.asarray([1.0, -2.0, 0.5])
    swap = jnp.asarray([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])  # new to old axes
    pose = jnp.eye(4).at[:3, :3].set(swap).at[:3, 3].set(-swap @ shift)
    moved = told._replace(world_to_camera=told.world_to_camera @ pose[None])
    turn = path.turn(moved, 12)
    expected = camera.orbit(12, width=8, height=8, elevation=20.0, radius=3.0)
    np.testing.assert_allclose(
        turn.world_to_camera, expected.world_to_camera @ pose[None], atol=2e-3
    )
    np.testing.assert_array_equal(turn.intrinsics, expected.intrinsics)


def test_recipes_follow_the_command_line():
    whole = splatting.configure(splatting.SplatArgs())
    assert whole == splatting.fit.MINI  # tests run on the CPU
    args = splatting.SplatArgs(fit="v3d", gaussians=5, fit_steps=400, degree=2, view_gain=True)
    config = splatting.configure(args)
    assert (config.count, config.steps, config.degree, config.view_gain) == (5, 400, 2, True)
    assert (config.densify.start, config.densify.stop) == (50, 340)
    assert config.loss == splatting.fit.V3D.loss


def test_module_runs_as_a_program(tmp_path):
    command = [sys.executable, "-m", "v3d_jax.reconstruct", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
