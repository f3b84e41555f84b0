"""Whether the picture moves as the camera turns: the measurement on frames that are known."""

import csv
import functools
import json

import corner_views
import fixtures
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic_scenes
import tiny_scene

from v3d_jax import errors, evaluate, pipeline, scene_pipeline
from v3d_jax.data import paths, poses, shots, warps
from v3d_jax.diffusion.sampler import SamplingConfig
from v3d_jax.evaluation import corners, rotation, scenes
from v3d_jax.mesh import shade
from v3d_jax.ops import camera

SIDE, FRAMES = corner_views.SIDE, tiny_scene.CONFIG.num_frames
LENS = np.asarray(camera.pinhole(60.0, SIDE, SIDE), np.float64)
MIDDLE = np.asarray([0.3, 0.3, 0.0])
PATH = paths.orbit(
    paths.look_at(np.asarray([1.7, 1.3, 0.6]), MIDDLE), MIDDLE, np.asarray([0.0, 0.0, 1.0]), 20.0, 6
)
SAMPLING = SamplingConfig(steps=1, guidance_min=1.0, guidance_max=1.0)
SETTINGS = pipeline.Settings(tiny_scene.CONFIG, SAMPLING)
EVERYWHERE = tuple(rotation.DIRECTIONS)


@functools.cache
def drawn(degrees: float) -> np.ndarray:
    """The textured corner by our renderer: as it is, then from cameras turned in each direction."""
    start = PATH[0]
    path = [start, *(rotation.turn(direction, degrees) @ start for direction in EVERYWHERE)]
    size = jnp.full(len(path), SIDE, jnp.int32)
    lens = jnp.broadcast_to(jnp.asarray(LENS, jnp.float32), (len(path), 3, 3))
    cameras = camera.Camera(jnp.asarray(np.stack(path), jnp.float32), lens, size, size)
    white = shade.Lights(jnp.ones(3), jnp.asarray([[0.0, 0.0, 1.0]]), jnp.zeros((1, 3)))
    draw = fixtures.jit(
        lambda cameras: shade.render(
            corner_views.corner(), cameras, white, corner_views.RASTER, alpha=False
        )
    )
    found = draw(cameras)
    assert not bool(found.overflow(corner_views.RASTER))
    rgba = np.asarray(found.rgba)
    return (255.0 * (rgba[..., :3] * rgba[..., 3:] + 1.0 - rgba[..., 3:]) + 0.5).astype(np.uint8)


def summary(frames: dict[str, tuple[np.ndarray, np.ndarray]]) -> rotation.Summary:
    """Of pairs of frames by direction, as they should be 10 degrees apart."""
    return rotation.summary(
        [
            rotation.Tracks(
                "corner", rotation.TARGET, direction, 1,
                corners.follow(before, after, rotation.homography(LENS, direction)),
            )
            for direction, (before, after) in frames.items()
        ]
    )  # fmt: skip


def turned(degrees: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    start, *others = drawn(degrees)
    return {direction: (start, one) for direction, one in zip(EVERYWHERE, others, strict=True)}


def test_frames_from_turned_cameras_are_right_to_a_third_of_a_pixel():
    found = summary(turned(10.0))
    assert found.corners > 40
    assert found.tracked > 0.9
    assert found.median < 0.3
    assert found.percentile_90 < 0.6
    assert found.within > 0.9


def test_frames_turned_too_little_are_off_by_the_rest():
    found = summary(turned(7.0))
    # In the middle of the picture tan(10) - tan(7) degrees of the focal length; more at its edges.
    rest = LENS[0, 0] * (np.tan(np.deg2rad(10.0)) - np.tan(np.deg2rad(7.0)))
    assert rest == pytest.approx(4.45, abs=0.01)
    assert rest - 0.3 < found.median < rest + 1.0
    assert found.tracked > 0.8
    assert found.within < 0.05


def test_frames_that_stay_are_off_by_all_of_it():
    start = drawn(10.0)[0]
    found = summary(dict.fromkeys(EVERYWHERE, (start, start)))
    assert found.still == pytest.approx(LENS[0, 0] * np.tan(np.deg2rad(10.0)), rel=0.1)
    assert found.median == pytest.approx(found.still, abs=0.5)
    assert found.within == 0.0


def test_frames_turned_the_other_way_are_off_by_twice_as_much():
    frames = turned(10.0)
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    found = summary({one: (frames[one][0], frames[opposite[one]][1]) for one in EVERYWHERE})
    # Of the corners that stay in the picture when it moves the right way, some leave it now.
    assert found.tracked > 0.4
    assert found.median == pytest.approx(2.0 * found.still, rel=0.1)


@pytest.mark.parametrize("grey", [0, 200, 255])
def test_blank_frames_have_no_corners(grey):
    blank = np.full((SIDE, SIDE, 3), grey, np.uint8)
    found = summary({"left": (blank, blank)})
    assert found == rotation.Summary(0, None, None, None, None, None)
    rounding = np.clip(
        blank.astype(int) + (np.random.default_rng(0).random(blank.shape) < 0.1), 0, 255
    )
    rounding = rounding.astype(np.uint8)
    assert summary({"left": (rounding, rounding)}).corners == 0


def test_corners_are_not_found_in_a_blank_frame():
    start = drawn(10.0)[0]
    found = summary(dict.fromkeys(EVERYWHERE, (start, np.full_like(start, 127))))
    assert found.corners > 40
    assert (found.tracked, found.median, found.within) == (0.0, None, 0.0)


def test_edges_and_repeated_corners_do_not_count():
    """Nothing tells which of a chessboard's corners is which."""
    row, column = np.mgrid[:96, :96]
    board = np.where((row // 12 + column // 12) % 2, 255, 0).astype(np.uint8)
    assert len(corners.detect(board[..., None].repeat(3, axis=2), 6)) == 0
    # Faint, against the strong response that the edge of the picture itself would have.
    one = np.where((row > 40) & (column > 40), 200, 190).astype(np.uint8)
    found = corners.detect(one[..., None].repeat(3, axis=2), 6)
    np.testing.assert_allclose(found, [[41.0, 41.0]], atol=1.0)


def test_a_motion_between_pixels_is_found():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:96, :96] + 0.5
    waves = (
        rng.normal(0.0, 0.12, (30, 2)),
        rng.uniform(0.0, 6.0, 30),
        rng.uniform(0.0, 1.0, (30, 3)),
    )

    def picture(by):
        turns = np.stack([x - by[0], y - by[1]], axis=-1) @ waves[0].T + waves[1]
        return (127.5 + 60.0 * np.tanh(np.sin(turns) @ (waves[2] - 0.5))).astype(np.uint8)

    by = np.asarray([3.3, -1.6])
    near = np.asarray([[1.0, 0.0, 3.0], [0.0, 1.0, -2.0], [0.0, 0.0, 1.0]])
    found = corners.follow(picture([0.0, 0.0]), picture(by), near)
    assert len(found.start) > 10
    assert found.tracked.all()
    moved = found.found - found.start
    # Where the best pixel is the last that a patch fits at, it stays whole.
    off = np.abs(moved - by).max(axis=1)
    assert np.median(off) < 0.04
    assert np.percentile(off, 90) < 0.12
    assert np.median(found.error) == pytest.approx(0.5, abs=0.02)


def source() -> scenes.Source:
    """The corner as a scene to evaluate on, of whose frames only the first may matter."""
    images = np.zeros((len(PATH), SIDE, SIDE, 3), np.uint8)
    images[0] = drawn(10.0)[0]
    given = shots.Shots("corner", images, PATH, LENS[None].repeat(len(PATH), axis=0), (0,))
    return scenes.Source("corner", lambda count: given)


def warping(settings, params, views, targets, key, *, told=True):
    """A model of nothing but rotations: the input view warped from its camera to the targets'.

    If not `told`, it takes the first target's camera for that of the input view.
    """
    picture = np.asarray(127.5 * (views.images[0, 0] + 1.0) + 0.5).astype(np.uint8)
    known = views.cameras if told else targets
    lens = np.asarray(views.cameras.intrinsics[0, 0], np.float64)
    np.testing.assert_allclose(targets.intrinsics[0], lens[None].repeat(FRAMES, axis=0))
    pose = np.asarray(known.world_to_camera[0, 0], np.float64)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    rays = np.stack([x, y, np.ones_like(x)], axis=-1) @ np.linalg.inv(lens).T
    frames = []
    for target in np.asarray(targets.world_to_camera[0], np.float64):
        motion = pose @ poses.inverse(target)
        np.testing.assert_allclose(motion[:3, 3], 0.0, atol=1e-6)
        image = rays @ motion[:3, :3].T @ lens.T
        frames.append(warps.sample(picture, image[..., :2] / image[..., 2:]) / 255.0)
    return jnp.asarray(np.stack(frames), jnp.float32)[None]


def judged(monkeypatch, model):
    monkeypatch.setattr(scenes, "_views_to_frames", model)
    return rotation.summaries(rotation.evaluate(SETTINGS, None, [source()], 0))


def test_a_model_that_turns_is_right_about_both_cameras(monkeypatch):
    rows = judged(monkeypatch, warping)["corner"]
    for what in rotation.MEASURED:
        assert rows[what].corners > 30, what
        assert rows[what].tracked > 0.9, what
        assert rows[what].median < 0.3, what
        assert rows[what].still == pytest.approx(15.0, abs=1.5), what


def test_a_model_that_is_not_told_of_the_input_camera_fails_there_alone(monkeypatch):
    rows = judged(monkeypatch, functools.partial(warping, told=False))["corner"]
    assert rows[rotation.TARGET].median < 0.3
    assert rows[rotation.INPUT].median == pytest.approx(rows[rotation.INPUT].still, abs=0.1)
    assert rows[rotation.INPUT].within == 0.0


def test_a_model_that_repeats_its_input_fails_everywhere(monkeypatch):
    def repeating(settings, params, views, targets, key):
        return (0.5 * views.images[:, :1] + 0.5).repeat(FRAMES, axis=1)

    rows = judged(monkeypatch, repeating)["corner"]
    for what in (rotation.TARGET, rotation.INPUT):
        assert rows[what].median == pytest.approx(rows[what].still, abs=0.5)
        assert rows[what].within == 0.0
    assert rows[rotation.WARPED].median < 0.3


def test_a_blank_model_gives_rows_of_dashes(monkeypatch):
    def blank(settings, params, views, targets, key):
        return jnp.ones((1, FRAMES, SIDE, SIDE, 3))

    monkeypatch.setattr(scenes, "_views_to_frames", blank)
    lines = rotation.report(rotation.evaluate(SETTINGS, None, [source()], 0)).splitlines()
    assert [line.split()[-6:] for line in lines[1:]] == [["0", "-", "-", "-", "-", "-"]] * 6


def test_the_path_lies_where_the_scenes_own_clip_does(monkeypatch):
    seen = []

    def looking(settings, params, views, targets, key):
        seen.append((views, targets))
        return warping(settings, params, views, targets, key)

    judged(monkeypatch, looking)
    one = source().read(1)
    own, _ = scenes.prepare(one, tuple(range(FRAMES)), FRAMES)
    for (first, targets), (other, same) in zip(seen[::2], seen[1::2], strict=True):
        pose = first.cameras.world_to_camera[0, 0]
        np.testing.assert_allclose(pose, own.cameras.world_to_camera[0, 0], atol=1e-6)
        np.testing.assert_array_equal(pose, targets.world_to_camera[0, 0])
        np.testing.assert_array_equal(targets.world_to_camera, same.world_to_camera)
        np.testing.assert_array_equal(first.images, other.images)
        angle = np.trace(pose[:3, :3].T @ other.cameras.world_to_camera[0, 0, :3, :3])
        assert np.rad2deg(np.arccos((angle - 1.0) / 2.0)) == pytest.approx(10.0, abs=0.01)
    assert len(seen) == 2 * len(EVERYWHERE)


def test_cameras_at_one_place_are_refused():
    still = source().read(1)
    still = still._replace(world_to_camera=still.world_to_camera[:1].repeat(6, axis=0))
    with pytest.raises(errors.UserError, match="corner: all cameras are at one place"):
        rotation.evaluate(SETTINGS, None, [scenes.Source("corner", lambda count: still)], 0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny_scene.save_models(tmp_path_factory.mktemp("models"), SAMPLING)


def test_a_model_on_rendered_scenes_by_the_command(models, tmp_path, monkeypatch, capsys):
    fast = fixtures.jit(scene_pipeline.views_to_frames, static_argnums=0)
    monkeypatch.setattr(scenes, "_views_to_frames", fast)
    data = synthetic_scenes.build(tmp_path / "set", train=1, heldout=3, size=24)
    out = tmp_path / "out"
    evaluate.main(
        ["--protocol", "rotation", "--model", str(models / "scene"), "--data-dir", str(data),
         "--limit", "2", "--out", str(out)]
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("heldout: 2 scenes, cameras turned by 10 degrees")
    assert lines[1].split() == " ".join(rotation.HEADINGS).split()
    names = [line.split("  ")[0] for line in lines[2:11:3]]
    assert names == ["sky-1", "sky-2", "all"]
    assert lines[-1] == f"written: {out}"
    content = json.loads((out / "rotation.json").read_text())
    assert (content["protocol"], content["degrees"], content["split"]) == (
        "rotation", 10.0, "heldout",
    )  # fmt: skip
    with (out / "corners.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for what in rotation.MEASURED:
        mine = [row for row in rows if row["measured"] == what]
        assert content["scenes"]["all"][what]["corners"] == len(mine)
    assert len(list((out / "sheets").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--model", "{models}/object"], "is no scene model"),
        (["--model", "{models}/scene", "somewhere"], "name it by --data-dir"),
        (["--model", "{models}/scene", "--views", "1"], "for --protocol scenes and co3d"),
        (["--model", "{models}/scene", "--data-dir", "/nowhere"], "python -m v3d_jax.render"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(models, arguments, part):
    filled = [text.format(models=models) for text in arguments]
    with pytest.raises(errors.UserError, match=part) as caught:
        evaluate.main(["--protocol", "rotation", *filled])
    assert "\n" not in str(caught.value)
