"""Scoring a scene model on records and on CO3D's folders, by its command."""

import csv
import json

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic_scenes
import tiny_scene
from co3d_walks import write_annotations, write_list, write_walk

from v3d_jax import errors, evaluate, pipeline, scene_pipeline
from v3d_jax.data import clips, co3d_protocol, orbits, shots, warps
from v3d_jax.diffusion.sampler import SamplingConfig
from v3d_jax.evaluation import measure, scenes
from v3d_jax.nn import pixelnerf
from v3d_jax.ops import image, metrics
from v3d_jax.ops.camera import Camera
from v3d_jax.weights import lpips as lpips_weights

SIZE, FRAMES = tiny_scene.CONFIG.image_size, tiny_scene.CONFIG.num_frames
SAMPLING = SamplingConfig(steps=2, guidance_min=1.0, guidance_max=2.0)
SETTINGS = pipeline.Settings(tiny_scene.CONFIG, SAMPLING)


@pytest.fixture(autouse=True)
def fast_compile_without_lpips(monkeypatch):
    fast = fixtures.jit(scene_pipeline.views_to_frames, static_argnums=0)
    monkeypatch.setattr(scenes, "_views_to_frames", fast)

    def load(net):
        raise lpips_weights.LPIPSUnavailable(f"no weights of {net}")

    monkeypatch.setattr(lpips_weights, "load", load)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny_scene.save_models(tmp_path_factory.mktemp("models"), SAMPLING)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    return synthetic_scenes.build(tmp_path_factory.mktemp("rooms") / "set", heldout=2, size=24)


@pytest.fixture(scope="module")
def co3d(tmp_path_factory):
    root = tmp_path_factory.mktemp("co3d")
    for category, names in (("hydrant", ("a", "b")), ("plant", ("c",))):
        rows = [row for name in names for row in write_walk(root, category, name, 12)]
        write_annotations(root, category, rows, dict.fromkeys(names, 0.9))
        write_list(root, category, rows)
    return root


def given(views=1, frames=synthetic_scenes.VIEWS):
    record = synthetic_scenes.scene(1, SIZE)
    found = shots.of_record(record, SIZE, SIZE, 1)
    cut = found._replace(**{n: getattr(found, n)[:frames] for n in ("images", "world_to_camera")})
    return cut._replace(intrinsics=found.intrinsics[:frames], inputs=shots.even(frames, views))


def psnr(baseline, one):
    """Of a baseline's frames against the unseen ones, averaged."""
    found, truth = baseline(one), one.images[list(one.unseen)]
    a, b = (jnp.asarray(frames, jnp.float32) / 255.0 for frames in (found, truth))
    return float(metrics.psnr(a, b).mean())


def test_a_clip_of_the_models_length_is_the_pipelines(key):
    """With normalised cameras and the input first, as a training clip has it."""
    one = given(frames=FRAMES)
    found = scenes.generate(SETTINGS, tiny_scene.params(), one, key)
    moved, _, _ = clips.normalise(one.world_to_camera)
    size = jnp.full((1, FRAMES), SIZE, jnp.int32)
    targets = Camera(
        jnp.asarray(moved[None], jnp.float32), jnp.asarray(one.intrinsics[None], jnp.float32),
        size, size,
    )  # fmt: skip
    pictures = image.to_network(jnp.asarray(one.images[:1], jnp.float32) / 255.0)[None]
    views = pixelnerf.Views(
        pictures, jax.tree.map(lambda x: x[:, :1], targets), jnp.ones((1, 1), bool)
    )
    wanted = scenes._views_to_frames(
        SETTINGS, tiny_scene.params(), views, targets, jax.random.fold_in(key, 0)
    )
    np.testing.assert_allclose(found, 255.0 * np.asarray(wanted[0, 1:]), atol=0.51)
    assert found.std() > 1.0


def test_cameras_of_a_clip_are_the_frames_own_and_short_clips_repeat_the_last():
    one = given(views=3)
    zoom = np.linspace(1.0, 1.5, len(one.images))[:, None, None]
    one = one._replace(intrinsics=one.intrinsics * np.where([[1], [1], [0]], zoom, 1.0))
    assert one.inputs == (0, 2, 5)
    views, targets = scenes.prepare(one, (0, 4), FRAMES)
    assert views.images.shape == (1, 3, SIZE, SIZE, 3)
    assert targets.world_to_camera.shape == (1, FRAMES, 4, 4)
    np.testing.assert_array_equal(targets.world_to_camera[0, 1], targets.world_to_camera[0, 2])
    np.testing.assert_array_equal(
        targets.world_to_camera[0, 0], views.cameras.world_to_camera[0, 0]
    )
    moved, _, _ = clips.normalise(one.world_to_camera[[0, 4, 2, 5]])
    np.testing.assert_allclose(targets.world_to_camera[0, 1], moved[1], atol=1e-6)
    np.testing.assert_allclose(views.cameras.world_to_camera[0, 1:], moved[2:], atol=1e-6)
    np.testing.assert_allclose(targets.intrinsics[0], one.intrinsics[[0, 4, 4]], rtol=1e-6)
    np.testing.assert_allclose(views.cameras.intrinsics[0], one.intrinsics[[0, 2, 5]], rtol=1e-6)
    np.testing.assert_allclose(
        views.images[0, 2], 2.0 * one.images[5].astype(np.float32) / 255.0 - 1.0, atol=1e-6
    )


def test_unseen_pictures_are_not_looked_at(key):
    one = given(views=2)
    blind = one.images.copy()
    blind[list(one.unseen)] = 0
    params = tiny_scene.params()
    found = scenes.generate(SETTINGS, params, one, key)
    assert found.shape == (4, SIZE, SIZE, 3)
    again = scenes.generate(SETTINGS, params, one._replace(images=blind), key)
    np.testing.assert_array_equal(found, again)
    other = scenes.generate(SETTINGS, params, one, jax.random.key(1))
    assert (found != other).any()


def test_rendered_scenes_are_scored_with_one_and_three_views(models, rooms, tmp_path, capsys):
    out = tmp_path / "out"
    evaluate.main(
        ["--protocol", "scenes", "--model", str(models / "scene"), "--data-dir", str(rooms),
         "--out", str(out)]
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    heads = [place for place, line in enumerate(lines) if "input views" in line]
    assert [lines[place].rpartition(": ")[2] for place in heads] == [
        "2 scenes, 1 input views", "2 scenes, 3 input views",
    ]  # fmt: skip
    for place in heads:
        rows = [line[:21].strip() for line in lines[place + 2 : place + 5]]
        assert rows == ["model", *scenes.BASELINES]
        assert lines[place + 5].startswith("PSNR is ")
    records = orbits.source(rooms, "heldout")
    for views in (1, 3):
        content = json.loads((out / f"views_{views}" / "scores.json").read_text())
        assert (content["input_views"], content["split"]) == (views, "heldout")
        one = shots.of_record(records[0], 24, SIZE, views)
        # Shrunk from 24 pixels to 16, intrinsics with the frames.
        np.testing.assert_allclose(one.intrinsics[0, :2], records[0].intrinsics[0, :2] * 16 / 24)
        for name, baseline in zip(
            scenes.BASELINES, (warps.nearest_view, warps.plane_warp), strict=True
        ):
            found = content["objects"][0]["scores"][name]["psnr"]
            assert found == pytest.approx(psnr(baseline, one), rel=1e-4)
        means = content["means"]
        best = max(means[name]["psnr"] for name in scenes.BASELINES)
        gain = content["against_better_baseline"]["psnr_gain"]
        assert gain == pytest.approx(means["model"]["psnr"] - best)
        assert len(list((out / f"views_{views}" / "sheets").iterdir())) == 2


def test_co3d_is_scored_with_two_and_three_views_by_category(models, co3d, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [
        "--protocol", "co3d", str(co3d), "--model", str(models / "scene"), "--categories",
        "plant", "hydrant",
    ]  # fmt: skip
    evaluate.main([*arguments, "--out", str(out)])
    printed = capsys.readouterr()
    assert "256 pixels a side, the model's frames 16" in printed.err
    assert "no weights of vgg" in printed.err
    assert "3 scenes, 2 input views" in printed.out
    assert "fewview_dev/test" in printed.out
    for views in (2, 3):
        content = json.loads((out / f"views_{views}" / "scores.json").read_text())
        assert [one["name"] for one in content["objects"]] == ["plant/c", "hydrant/a", "hydrant/b"]
        assert content["co3d"]["background"] == "black"
        scored = [one["scores"]["model"]["psnr"] for one in content["objects"]]
        assert content["by_category"]["plant"]["psnr"] == pytest.approx(scored[0])
        assert content["by_category"]["hydrant"]["psnr"] == pytest.approx(np.mean(scored[1:]))
    args = co3d_protocol.Co3dArgs(("hydrant",))
    found = co3d_protocol.find(co3d, args, lambda *_: None)
    one = co3d_protocol.read(found[1], SIZE, 3, "black")
    with (out / "views_3" / "scores.csv").open(newline="") as file:
        rows = {(row["object"], row["predictor"]): row for row in csv.DictReader(file)}
    found = float(rows["hydrant/b", scenes.PLANE]["psnr"])
    assert found == pytest.approx(psnr(warps.plane_warp, one), rel=1e-4)


def test_a_damaged_sequence_is_left_out_and_told(models, co3d, tmp_path, capsys):
    picture = co3d / "hydrant" / "a" / "images" / "frame000004.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:60])
    arguments = ["--protocol", "co3d", str(co3d), "--model", str(models / "scene")]
    try:
        evaluate.main([*arguments, "--categories", "hydrant", "--views", "2"])
        printed = capsys.readouterr()
        assert "1 scenes, 2 input views, 1 left out" in printed.out
        assert "left out: hydrant/a: " in printed.err
        picture.write_bytes(b"")
        with pytest.raises(errors.UserError, match="no sequence could be read"):
            evaluate.main([*arguments, "--categories", "hydrant", "--limit", "1"])
    finally:
        picture.write_bytes(whole)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--protocol", "scenes", "--model", "{models}/object"], "is no scene model"),
        (["--model", "{models}/scene"], "add --protocol scenes"),
        (["--protocol", "co3d"], "give the folder of CO3D"),
        (["--protocol", "scenes", "somewhere"], "name it by --data-dir"),
        (["--protocol", "scenes", "--views", "0"], "numbers from 1"),
        (["--views", "2"], "for --protocol scenes and co3d"),
        (["--background", "kept"], "are for --protocol co3d"),
        (["--two-view-tracks"], "is for --protocol points"),
        (["--protocol", "co3d", "x", "--sequences", "-1"], "--sequences must be at least 0"),
        (["--protocol", "scenes", "--model", "{models}/scene", "--data-dir", "{rooms}",
          "--views", "6"], "leave none unseen"),
        (["--protocol", "co3d", "/nowhere", "--model", "{models}/scene"], "does not exist"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_in_one_line(models, rooms, arguments, part):
    filled = [text.format(models=models, rooms=rooms) for text in arguments]
    with pytest.raises(errors.UserError, match=part) as caught:
        evaluate.main(filled)
    assert "\n" not in str(caught.value)


def test_records_smaller_than_the_models_frames_are_refused(tmp_path):
    data = synthetic_scenes.build(tmp_path / "set", train=1, heldout=1, size=8)
    with pytest.raises(errors.UserError, match="render them at the model's size"):
        scenes.of_records(orbits.source(data, "heldout"), SIZE, None)


def test_exact_frames_score_the_cap():
    same = jnp.asarray(given().images[:2])
    assert float(measure.frames(None, same, same)["psnr"]) == pytest.approx(measure.MAX_PSNR)
