import json
import os
import re
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from v3d_jax import errors
from v3d_jax.data import output
from v3d_jax.ops import camera
from v3d_jax.splat import gaussians, start

COUNT, SIZE = 6, 32


@pytest.fixture(scope="module")
def frames():
    """A red square that moves to the right over white."""
    frames = np.full((COUNT, SIZE, SIZE, 3), 255, np.uint8)
    for index in range(COUNT):
        frames[index, 8:24, 2 + 3 * index : 14 + 3 * index] = (220, 30, 40)
    return frames


@pytest.fixture(scope="module")
def rgba():
    rgba = np.zeros((SIZE, SIZE, 4), np.uint8)
    rgba[8:24, 8:24] = (220, 30, 40, 255)
    return rgba


@pytest.fixture
def cameras():
    return camera.orbit(COUNT, width=SIZE, height=SIZE)


def decode(path: Path, size: tuple[int, int]) -> np.ndarray:
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(path)]
    raw = subprocess.run(
        [*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True
    )
    return np.frombuffer(raw.stdout, np.uint8).reshape(-1, *size, 3)


def test_all_files_of_an_orbit(tmp_path, rgba, frames, cameras):
    output.write(tmp_path / "out" / "chair", rgba, frames, cameras, {"seed": 3})
    folder = tmp_path / "out" / "chair"
    assert sorted(path.name for path in folder.iterdir()) == [
        "frames", "input.png", "orbit.mp4", "preview.png", "report.json", "transforms.json",
    ]  # fmt: skip
    names = sorted(path.name for path in (folder / "frames").iterdir())
    assert names == [f"{index:03d}.png" for index in range(COUNT)]
    for name, frame in zip(names, frames, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(folder / "frames" / name)), frame)
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "input.png")), rgba)
    report = json.loads((folder / "report.json").read_text())
    assert report == {"program": "v3d_jax", "seed": 3}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["chair"]


@pytest.mark.parametrize("size", [(32, 32), (33, 47)])
def test_mp4_is_h264_yuv420p_with_its_index_in_front(tmp_path, frames, size):
    import imageio_ffmpeg

    path = tmp_path / "orbit.mp4"
    grown = np.pad(frames, ((0, 0), (0, size[0] - SIZE), (0, size[1] - SIZE), (0, 0)), "edge")
    output.write_mp4(path, grown)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    told = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path)], capture_output=True, text=True
    ).stderr
    assert re.search(r"Video: h264.*yuv420p\(.*bt709", told)
    assert re.search(rf"\b{output.FPS} fps", told)
    even = (size[0] + size[0] % 2, size[1] + size[1] % 2)
    seen = decode(path, even)[:, : size[0], : size[1]]
    assert seen.shape == grown.shape
    error = np.abs(seen.astype(int) - grown)
    assert error.mean() < 3
    # Flat regions keep their colour: the conversion's matrix and range are the declared ones.
    np.testing.assert_allclose(seen[0, 14:18, 6:10], grown[0, 14:18, 6:10], atol=8)


def test_transforms_project_like_the_cameras(cameras):
    told = output.transforms(cameras, [f"{index}.png" for index in range(COUNT)])
    points = np.random.default_rng(0).uniform(-0.5, 0.5, (20, 3))
    pixels, _ = camera.project(cameras, jnp.asarray(points, jnp.float32))
    for index, frame in enumerate(told["frames"]):
        pose = np.asarray(frame["transform_matrix"])
        local = np.linalg.inv(pose) @ np.concatenate([points, np.ones((20, 1))], axis=1).T
        # OpenGL: looks along -z, y up; image rows run downwards.
        x = told["cx"] + told["fl_x"] * local[0] / -local[2]
        y = told["cy"] - told["fl_y"] * local[1] / -local[2]
        np.testing.assert_allclose(np.stack([x, y], -1), pixels[index], atol=1e-3)
    assert told["camera_angle_x"] == pytest.approx(np.deg2rad(60), rel=1e-6)
    assert (told["w"], told["h"], len(told["frames"])) == (SIZE, SIZE, COUNT)
    np.testing.assert_allclose(np.asarray(told["frames"][0]["transform_matrix"])[:3, 3], (2, 0, 0))


def test_contact_sheet_shows_input_and_every_frame(rgba):
    colours = np.random.default_rng(0).integers(0, 200, (18, 1, 1, 3), dtype=np.uint8)
    frames = np.broadcast_to(colours, (18, 16, 16, 3)).copy()
    image = np.full((64, 64, 3), (1, 2, 3), np.uint8)
    sheet = output.contact_sheet(image, frames)
    flat = {tuple(pixel) for pixel in sheet.reshape(-1, 3)}
    assert {(1, 2, 3), *(tuple(colour) for colour in colours[:, 0, 0])} <= flat
    assert (sheet[:, 0] == 255).all()
    assert output.contact_sheet(image, frames[:1]).shape[0] < sheet.shape[0]
    large = np.zeros((18, 512, 512, 3), np.uint8)
    assert output.contact_sheet(image, large).shape[1] < 1600


def test_contact_sheet_shows_renders_below_their_frames():
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 200, (2, 4, 1, 1, 3), dtype=np.uint8)
    frames, renders = np.broadcast_to(colors, (2, 4, 16, 20, 3)).copy()
    sheet = output.contact_sheet(np.zeros((16, 20, 3), np.uint8), frames, renders)
    for frame, render in zip(*colors[:, :, 0, 0], strict=True):
        rows, columns = np.nonzero((sheet == frame).all(axis=-1))
        below, same = np.nonzero((sheet == render).all(axis=-1))
        assert (len(rows), sorted(columns)) == (16 * 20, sorted(same))
        assert below.min() > rows.max()


def test_splats_lie_beside_the_orbit_and_alone(tmp_path, rgba, frames, cameras):
    rng = np.random.default_rng(0)
    points = jnp.asarray(rng.normal(size=(7, 3)), jnp.float32)
    made = start.from_points(points, jnp.abs(points))
    turn = np.full((12, SIZE, SIZE, 3), 90, np.uint8)
    splats = output.Splats(made, frames[::-1], turn)
    output.write(tmp_path / "a", rgba, frames, cameras, {}, splats)
    output.write_reconstruction(tmp_path / "b", frames, {"seed": 3}, splats)
    alone = {"splats.ply", "splats.mp4", "preview.png", "report.json"}
    assert {path.name for path in (tmp_path / "b").iterdir()} == alone
    assert {path.name for path in (tmp_path / "a").iterdir()} == alone | {
        "frames", "input.png", "orbit.mp4", "transforms.json",
    }  # fmt: skip
    for folder in (tmp_path / "a", tmp_path / "b"):
        again = gaussians.load_ply(folder / "splats.ply")
        np.testing.assert_array_equal(again.means, made.means)
        film = decode(folder / "splats.mp4", (SIZE, SIZE))
        assert len(film) == 12
        assert np.abs(film.astype(int) - 90).max() <= 3
    # A later run without splats leaves none behind.
    output.write(tmp_path / "a", rgba, frames, cameras, {})
    assert not (tmp_path / "a" / "splats.ply").exists()
    assert json.loads((tmp_path / "b" / "report.json").read_text())["seed"] == 3


def test_a_result_of_ours_is_replaced_whole(tmp_path, rgba, frames, cameras):
    folder = tmp_path / "chair"
    output.write(folder, rgba, frames, cameras, {"run": 1})
    (folder / "left_over.txt").write_text("x")
    output.write(folder, rgba, frames[:4], _first(cameras, 4), {"run": 2})
    assert json.loads((folder / "report.json").read_text())["run"] == 2
    assert len(list((folder / "frames").iterdir())) == 4
    assert not (folder / "left_over.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["chair"]


def _first(cameras, count):
    return camera.Camera(*(field[:count] for field in cameras))


def test_what_is_not_ours_is_never_touched(tmp_path, rgba, frames, cameras):
    folder = tmp_path / "chair"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    for act in (
        lambda: output.plan([Path("chair.png")], tmp_path),
        lambda: output.write(folder, rgba, frames, cameras, {}),
    ):
        with pytest.raises(errors.UserError, match="not an earlier result"):
            act()
    assert (folder / "thesis.txt").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["chair"]


def test_a_failure_leaves_nothing_and_keeps_the_old(tmp_path, rgba, frames, cameras, monkeypatch):
    folder = tmp_path / "chair"
    output.write(folder, rgba, frames, cameras, {"run": 1})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output, "write_mp4", full)
    with pytest.raises(errors.UserError, match="No space left"):
        output.write(folder, rgba, frames, cameras, {"run": 2})
    assert json.loads((folder / "report.json").read_text())["run"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["chair"]


def test_missing_ffmpeg_is_one_line(tmp_path, frames, monkeypatch):
    import imageio_ffmpeg

    def none():
        raise RuntimeError("No ffmpeg exe could be found.\nInstall it")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", none)
    with pytest.raises(errors.UserError, match="imageio-ffmpeg") as caught:
        output.write_mp4(tmp_path / "a.mp4", frames)
    assert "\n" not in str(caught.value)


def test_plan_gives_a_folder_a_picture_and_writes_nothing(tmp_path):
    pictures = [Path("a/chair.png"), Path("b/table.jpg")]
    out = tmp_path / "deep" / "out"
    assert output.plan(pictures, out) == [out / "chair", out / "table"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("second", ["b/chair.jpg", "b/Chair.png", "a/chair.png"])
def test_two_pictures_of_one_name_are_refused(tmp_path, second):
    with pytest.raises(errors.UserError, match="would both be written"):
        output.plan([Path("a/chair.png"), Path(second)], tmp_path)


def test_out_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(errors.UserError, match="is a file"):
        output.plan([Path("a.png")], tmp_path / "file" / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "a").write_text("x")
    with pytest.raises(errors.UserError, match="not an earlier result"):
        output.plan([Path("a.png")], tmp_path / "taken")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_out_without_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(errors.UserError, match="permission denied"):
        output.plan([Path("a.png")], tmp_path / "locked" / "out")
