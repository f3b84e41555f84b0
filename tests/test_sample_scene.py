"""`python -m v3d_jax.sample --scene`: paths through places, what is written, what is refused."""

import json
import shutil
import sys

import fixtures
import jax
import numpy as np
import pytest
import synthetic_scenes
import tiny_generator
import tiny_scene
from flax import nnx
from PIL import Image

from v3d_jax import errors, pipeline, sample, scene_pipeline, scenes, splatting
from v3d_jax.data import clips, output, scene_views, transforms
from v3d_jax.diffusion.sampler import SamplingConfig
from v3d_jax.ops import camera
from v3d_jax.weights import folder

FILES = {"input.png", "frames", "path.mp4", "transforms.json", "preview.png", "report.json"}
SIZE = 24


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    sampling = SamplingConfig(steps=2, guidance_min=1.0, guidance_max=2.0)
    folder.save(path / "scene", tiny_scene.CONFIG, sampling, tiny_scene.params())
    params = nnx.to_pure_dict(tiny_generator.params())
    folder.save(path / "object", tiny_generator.CONFIG, sampling, params)
    return path


@pytest.fixture(autouse=True)
def fast_compile(monkeypatch):
    for name, function in (
        ("_encode_scene", sample._encode_scene.__wrapped__),
        ("_advance", pipeline.advance),
        ("_decode", pipeline.decode),
    ):
        monkeypatch.setattr(sample, name, fixtures.jit(function, static_argnums=0))


@pytest.fixture
def place(tmp_path):
    """Three views of a painted sky, ten degrees apart, with transforms.json."""
    return write_views(tmp_path / "kitchen", [0, 1, 2])


def write_views(path, chosen):
    path.mkdir()
    record, seen = synthetic_scenes.scene(1, SIZE), synthetic_scenes.cameras(1, SIZE)
    for index in chosen:
        (path / f"{index}.png").write_bytes(record.frames[index])
    seen = camera.Camera(*(field[np.asarray(chosen)] for field in seen))
    content = output.transforms(seen, [f"{index}.png" for index in chosen])
    (path / "transforms.json").write_text(json.dumps(content))
    return path


def rewrite(place, change):
    content = json.loads((place / "transforms.json").read_text())
    change(content)
    (place / "transforms.json").write_text(json.dumps(content))


def run(models, place, out, **changes):
    given = scenes.SceneArgs(scene=place, **changes)
    args = sample.SampleArgs(out=out, model=str(models / "scene"), cache=False, tour=given)
    return sample.run(args)[0]


def frames(path):
    return np.stack([np.asarray(Image.open(file)) for file in sorted((path / "frames").iterdir())])


def fails(monkeypatch, capsys, out, *arguments):
    """The one line on stderr of a run that ends with status 2 and leaves nothing."""
    monkeypatch.setattr(sys, "argv", ["sample", "--out", str(out), *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        sample.cli()
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert not out.exists()
    return lines[0]


def test_an_orbit_from_three_views(models, place, tmp_path, capsys):
    made = run(models, place, tmp_path / "out", arc=30.0)
    assert made == tmp_path / "out" / "kitchen"
    assert {file.name for file in made.iterdir()} == FILES
    assert f"{made}: 3 frames" in capsys.readouterr().out
    assert frames(made).shape == (3, 16, 16, 3)
    report = json.loads((made / "report.json").read_text())
    assert report["views"] == ["0.png", "1.png", "2.png"]
    assert (report["path"], report["arc"]) == ("orbit", 30.0)
    assert {"prepare", "load", "encode", "sample", "decode"} == set(report["seconds"])
    # Written in the world of the views: the first camera is the first view's, and the arc goes on
    # about what they look at, which is the origin.
    written, _ = transforms.read(made / "transforms.json")
    given, _ = transforms.read(place / "transforms.json")
    np.testing.assert_allclose(written[0].world_to_camera, given[0].world_to_camera, atol=1e-5)
    places = [np.linalg.inv(view.world_to_camera)[:3, 3] for view in (*written, *given)]
    np.testing.assert_allclose(np.linalg.norm(places, axis=1), 2.0, atol=1e-5)
    cosine = np.dot(places[0], places[2]) / 4.0
    np.testing.assert_allclose(np.rad2deg(np.arccos(cosine)), 30.0, atol=1e-2)
    # The lens is that of the views, at the frames' size.
    np.testing.assert_allclose(written[0].intrinsics[0, 0] / 16, given[0].intrinsics[0, 0] / SIZE)
    with Image.open(made / "input.png") as picture:
        assert picture.size == (16, 16)


def test_places_are_for_the_packaged_scene_model_unless_another_is_named(
    place, tmp_path, monkeypatch
):
    asked = []

    def opened(name):
        asked.append(name)
        raise errors.UserError("enough")

    monkeypatch.setattr(sample.packaged, "open_model", opened)
    for tour in (scenes.SceneArgs(scene=place), scenes.SceneArgs()):
        with pytest.raises(errors.UserError, match="enough"):
            sample.run(sample.SampleArgs(out=tmp_path / "out", cache=False, tour=tour))
    assert asked == ["scene_mini", "mini"]


def test_frames_are_those_of_the_pipeline(models, place, tmp_path):
    made = run(models, place, tmp_path / "out", path="spiral", arc=-40.0)
    loaded = folder.load(models / "scene")
    settings = pipeline.Settings(loaded.generator, loaded.sampling)
    prepared = scenes.prepare(scenes.SceneArgs(place, "spiral", -40.0), loaded.generator)
    reach = np.linalg.norm(np.asarray(camera.position(prepared.targets)), axis=-1).max()
    assert reach <= clips.RADIUS + 1e-5
    whole = fixtures.jit(scene_pipeline.views_to_frames, static_argnums=0)
    given = loaded.params, prepared.views, prepared.targets, jax.random.key(0)
    expected = np.asarray(whole(settings, *given))[0]
    assert np.abs(frames(made) - 255.0 * expected).max() <= 0.6


def test_cameras_of_a_file_after_the_first_views(models, place, tmp_path):
    """One camera and so two frames, of a model that makes three."""
    asked = write_views(tmp_path / "asked", [4]) / "transforms.json"
    (tmp_path / "asked" / "4.png").unlink()
    made = run(models, place, tmp_path / "out", path=str(asked))
    assert frames(made).shape == (2, 16, 16, 3)
    written, _ = transforms.read(made / "transforms.json")
    wanted = synthetic_scenes.cameras(1, SIZE).world_to_camera[4]
    np.testing.assert_allclose(written[1].world_to_camera, wanted, atol=1e-5)


def test_a_picture_alone_is_told_its_field_of_view(models, place, tmp_path, capsys):
    (place / "transforms.json").unlink()
    for name in ("1.png", "2.png"):
        (place / name).unlink()
    made = run(models, place, tmp_path / "out", fov=75.0)
    assert (
        "has no camera: a field of view of 75 degrees is taken (--fov)" in capsys.readouterr().err
    )
    written, _ = transforms.read(made / "transforms.json")
    angle = 2.0 * np.rad2deg(np.arctan(8.0 / written[0].intrinsics[0, 0]))
    np.testing.assert_allclose(angle, 75.0, atol=1e-4)


def test_a_posed_picture_without_focal_length(place):
    for name in ("1.png", "2.png"):
        (place / name).unlink()

    def strip(content):
        content["frames"] = content["frames"][:1]
        for key in ("fl_x", "fl_y", "camera_angle_x", "camera_angle_y", "cx", "cy"):
            del content[key]

    rewrite(place, strip)
    found = scene_views.read(place, 16, 50.0)
    assert any("no focal length: a field of view of 50 degrees" in note for note in found.notes)
    np.testing.assert_allclose(found.intrinsics[0, 0, 0], 8.0 / np.tan(np.deg2rad(25.0)))
    wanted = synthetic_scenes.cameras(1, SIZE).world_to_camera[0]
    np.testing.assert_allclose(found.world_to_camera[0], wanted, atol=1e-5)


def test_wide_pictures_are_cut_to_their_middle_and_many_thinned(tmp_path):
    path = tmp_path / "many"
    path.mkdir()
    seen = camera.orbit(40, width=48, height=24, radius=2.0)
    seen = camera.Camera(*(field[:20] for field in seen))
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (20, 24, 48, 3), np.uint8)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(path / f"{index}.png")
    content = output.transforms(seen, [f"{index}.png" for index in range(20)])
    (path / "transforms.json").write_text(json.dumps(content))
    found = scene_views.read(path, 24, 60.0)
    assert len(found.images) == scene_views.MOST
    assert (found.names[0], found.names[-1]) == ("0.png", "19.png")
    np.testing.assert_array_equal(found.images[0], pictures[0][:, 12:36])
    np.testing.assert_allclose(found.intrinsics[0, :2, 2], [12.0, 12.0])
    np.testing.assert_allclose(found.intrinsics[0, 0, 0], float(seen.intrinsics[0, 0, 0]))
    assert {"8 of 20 views are used, evenly", "the middle squares of the pictures are used"} <= set(
        found.notes
    )


def turn_away(content):
    for index, frame in enumerate(content["frames"]):
        pose = np.eye(4)
        pose[:3, :3] = (
            [[0, 0, 1], [1, 0, 0], [0, 1, 0]] if index else [[0, 0, -1], [-1, 0, 0], [0, 1, 0]]
        )
        pose[0, 3] = -1.0 if index else 1.0
        frame["transform_matrix"] = pose.tolist()


def bare(content):
    for frame in content["frames"]:
        del frame["transform_matrix"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (turn_away, "the cameras look away from each other"),
        (bare, "transform_matrix is missing or no 4 x 4 matrix"),
        (lambda content: content.pop("frames"), 'has no list "frames" of cameras'),
    ],
)
def test_cameras_that_cannot_be_used(models, place, tmp_path, monkeypatch, capsys, change, message):
    rewrite(place, change)
    given = "--scene", place, "--model", models / "scene"
    assert message in fails(monkeypatch, capsys, tmp_path / "out", *given)


def sample_splats(models, place, out):
    given = scenes.SceneArgs(scene=place)
    args = sample.SampleArgs(
        out=out,
        model=str(models / "scene"),
        cache=False,
        tour=given,
        stages="video,splats",
        splats=splatting.SplatArgs(gaussians=60, fit_steps=4),
    )
    return sample.run(args)[0]


@pytest.mark.slow
def test_splats_lie_in_the_world_of_the_views(models, place, tmp_path, capsys):
    made = sample_splats(models, place, tmp_path / "out")
    assert {file.name for file in made.iterdir()} == FILES | {"splats.ply", "splats.mp4"}
    report = json.loads((made / "report.json").read_text())
    assert {"sample", "sweep", "fit", "render"} < set(report["seconds"])
    assert report["splats"]["fit"]["contract"]
    assert "60 Gaussians in" in capsys.readouterr().out
    # The cameras are 2 from what they look at, and hardly apart: the extent is theirs.
    written, _ = transforms.read(made / "transforms.json")
    places = np.stack([np.linalg.inv(view.world_to_camera)[:3, 3] for view in written])
    reach = np.linalg.norm(places - places.mean(axis=0), axis=1).max()
    np.testing.assert_allclose(report["splats"]["extent"], 1.1 * reach, rtol=1e-3)


def test_a_scene_without_splats_keeps_its_frames(models, place, tmp_path, monkeypatch):
    def refuse(*_):
        raise errors.UserError("no two cameras look at the same place")

    monkeypatch.setattr(splatting, "reconstruct", refuse)
    with pytest.raises(errors.UserError, match="kitchen has no splats: no two cameras"):
        sample_splats(models, place, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out" / "kitchen").iterdir()} == FILES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arc", "0"), "--arc 0: degrees up to 360 are needed, and not 0"),
        (("--arc", "400"), "--arc 400"),
        (("--fov", "180"), "--fov 180: degrees from 1 to 170"),
        (("--path", "nowhere.json"), "--path nowhere.json is no file: give orbit, spiral or"),
        (("--stages", "video,mesh"), "--stages: a mesh is made of objects, and this is a scene"),
        (("--stages", "video,splats", "--fit", "faithful"), "--fit faithful is for objects"),
        (("--model", "mini"), "mini is no scene model: name one by --model"),
        (("picture.png",), "--scene takes its pictures from a folder: leave IMAGE out"),
    ],
)
def test_settings_that_cannot_be_used(
    models, place, tmp_path, monkeypatch, capsys, arguments, message
):
    given = ("--scene", place, "--model", models / "scene", *arguments)
    assert message in fails(monkeypatch, capsys, tmp_path / "out", *given)


def test_paths_that_cannot_be_gone(models, place, tmp_path, monkeypatch, capsys):
    given = "--scene", place, "--model", models / "scene", "--path"
    asked = write_views(tmp_path / "asked", [3, 4, 5]) / "transforms.json"
    told = fails(monkeypatch, capsys, tmp_path / "out", *given, asked)
    assert "has 3 cameras and the model makes 2 new views at once" in told
    rewrite(tmp_path / "asked", lambda content: content.update(frames=[]))
    told = fails(monkeypatch, capsys, tmp_path / "out", *given, asked)
    assert "give at least one camera" in told

    def elsewhere(content):
        content["frames"] = [{"transform_matrix": np.eye(4).tolist()}]
        content["frames"][0]["transform_matrix"][0][3] = 50.0
        content["frames"][0]["transform_matrix"][2][3] = -50.0

    rewrite(tmp_path / "asked", elsewhere)
    told = fails(monkeypatch, capsys, tmp_path / "out", *given, asked)
    assert "none of its cameras sees anything of what the views show" in told
    # A view alone, and a path that stays there.
    for name in ("1.png", "2.png"):
        (place / name).unlink()
    rewrite(place, lambda content: content.update(frames=content["frames"][:1]))
    shutil.copy(place / "transforms.json", asked)
    told = fails(monkeypatch, capsys, tmp_path / "out", *given, asked)
    assert "all cameras are where the view is: give a path that moves" in told


def test_folders_without_cameras(models, place, tmp_path, monkeypatch, capsys):
    model = "--model", models / "scene", "--scene"
    (place / "transforms.json").unlink()
    told = fails(monkeypatch, capsys, tmp_path / "out", *model, place)
    assert "kitchen holds 3 pictures without cameras: give transforms.json" in told
    (tmp_path / "empty").mkdir()
    told = fails(monkeypatch, capsys, tmp_path / "out", *model, tmp_path / "empty")
    assert "empty holds no pictures with cameras" in told
    told = fails(monkeypatch, capsys, tmp_path / "out", *model, tmp_path / "gone")
    assert "gone does not exist: give a folder of views" in told
    told = fails(monkeypatch, capsys, tmp_path / "out", "--path", "spiral")
    assert "--path, --arc and --fov are for a scene" in told
    Image.new("RGB", (32, 32), "red").save(tmp_path / "toy.png")
    told = fails(
        monkeypatch, capsys, tmp_path / "out", tmp_path / "toy.png", "--model", models / "scene"
    )
    assert "scene is a scene model: give it views by --scene" in told


def test_views_are_not_replaced_by_their_own_frames(models, place, tmp_path, capsys):
    run(models, place, tmp_path / "out")
    given = scenes.SceneArgs(scene=tmp_path / "out" / "kitchen")
    args = sample.SampleArgs(
        out=tmp_path / "out", model=str(models / "scene"), cache=False, tour=given
    )
    with pytest.raises(Exception, match="holds the views and would replace them"):
        sample.run(args)
    assert (tmp_path / "out" / "kitchen" / "report.json").is_file()
