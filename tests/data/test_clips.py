"""Which frames a clip has, its scale, its input views, and cameras of what was cut out."""

import ball_scene
import numpy as np
import pytest

from v3d_jax.data import clips, paths
from v3d_jax.ops import camera

CONFIG = clips.ClipConfig(num_frames=4, size=32, min_sources=2, max_sources=3)


def arc(num_frames):
    return clips.ClipConfig(num_frames=num_frames, arc_length=True)


def line(places):
    """Camera centres on a straight line."""
    return np.stack([places, 0.0 * np.asarray(places), 1.0 + 0.0 * np.asarray(places)], axis=-1)


def test_frames_are_even_in_order_and_have_both_ends():
    for total in (4, 5, 7, 100):
        chosen = clips.choose(line(np.arange(total) ** 2.0), CONFIG)
        assert chosen.dtype == np.int32
        assert (chosen[0], chosen[-1]) == (0, total - 1)
        assert np.ptp(np.diff(chosen)) <= 1


def test_frames_are_even_in_distance_travelled():
    """Of a camera that gets faster, against the walk itself; on a curve distance is its length."""
    walk = np.linspace(0.0, 1.0, 200) ** 3
    for path in (line(walk), np.stack([np.cos(walk), np.sin(walk), 0.3 * walk], axis=-1)):
        chosen = clips.choose(path, arc(6))
        np.testing.assert_allclose(walk[chosen], np.linspace(0.0, 1.0, 6), atol=0.01)
    assert clips.choose(line(walk), clips.ClipConfig(num_frames=6))[1] == 40


def test_frames_differ_where_the_camera_stands_still_or_leaps():
    rng = np.random.default_rng(0)
    for _ in range(50):
        count = int(rng.integers(2, 12))
        total = int(rng.integers(count, 30))
        steps = rng.exponential(size=total) ** 3 * (rng.random(total) < 0.5)
        chosen = clips.choose(line(np.cumsum(steps)), arc(count))
        assert len(chosen) == count
        assert np.all(np.diff(chosen) > 0)
        assert chosen.min() >= 0
        assert chosen.max() < total
    assert clips.choose(line([0.0, 0.0, 0.0, 0.0, 9.0]), arc(3)).tolist() == [0, 1, 4]
    np.testing.assert_array_equal(clips.choose(line(np.zeros(5)), arc(5)), np.arange(5))


def test_scale_puts_what_is_looked_at_a_radius_ahead_and_moves_no_pixel():
    shot = ball_scene.Shots(None, None, some_poses(), None)
    old, points = ball_scene.in_world(shot, ball_scene.moved_world())
    new, scale, centre = clips.normalise(old)
    places = np.stack([np.linalg.inv(pose)[:3, 3] for pose in new])
    np.testing.assert_allclose(places.mean(axis=0), 0.0, atol=1e-9)
    looked_at = paths.common_point(new)
    np.testing.assert_allclose(new[0, 2, :3] @ looked_at + new[0, 2, 3], clips.RADIUS)
    intrinsics = ball_scene.INTRINSICS[ball_scene.LANDSCAPE]
    for one, other in zip(old, new, strict=True):
        moved = scale * (points - centre)
        depth = [(pose[2, :3] @ p.T + pose[2, 3]) for pose, p in ((one, points), (other, moved))]
        np.testing.assert_allclose(scale * depth[0], depth[1], rtol=1e-6)
        before = ball_scene.projected(one, intrinsics, points)
        np.testing.assert_allclose(
            ball_scene.projected(other, intrinsics, moved), before, rtol=1e-5
        )


def test_scale_of_paths_whose_cameras_look_at_nothing_near():
    first = paths.look_at(np.asarray([2.0, 1.0, 1.5]), np.zeros(3))
    parallel = paths.dolly(first, np.asarray([0.5, -0.2, 0.1]), 5)
    found, _, _ = clips.normalise(parallel)
    assert paths.width(found) == pytest.approx(0.5 * clips.RADIUS)
    # Axes that meet just ahead of the first camera, of which the others are far behind.
    target = np.asarray([0.01, 1.0, 0.0])
    places = [np.asarray([-x, 1.0 + x, 0.0]) for x in (0.0, 1.0, 2.0)]
    meeting = np.stack([paths.look_at(place, target) for place in places])
    assert paths.depth(meeting, 0) < 0.1
    found, _, _ = clips.normalise(meeting)
    assert paths.width(found) == pytest.approx(2.0 * clips.RADIUS)


def some_poses(count=5):
    cameras = camera.orbit(count, width=8, height=8, radius=3.0, elevation=20.0)
    return np.asarray(cameras.world_to_camera, np.float64)


def test_sources_begin_with_the_reference_and_their_number_is_random():
    rng = np.random.default_rng(0)
    config = clips.ClipConfig(num_frames=6, min_sources=2, max_sources=4)
    numbers, others = np.zeros(5, int), np.zeros(6, int)
    for _ in range(600):
        sources, valid = clips.draw_sources(rng, config)
        number = valid.sum()
        assert valid.tolist() == [True] * number + [False] * (4 - number)
        assert sources[0] == 0
        assert not sources[number:].any()
        assert len(set(sources[:number])) == number
        numbers[number] += 1
        others[sources[1:number]] += 1
    assert numbers[:2].tolist() == [0, 0]
    assert numbers[2:].min() > 150
    assert others[0] == 0
    assert others[1:].min() > 180  # 240 expected
    again = [clips.draw_sources(np.random.default_rng(7), config) for _ in range(2)]
    np.testing.assert_array_equal(again[0][0], again[1][0])
    one = clips.ClipConfig(num_frames=2)
    assert [x.tolist() for x in clips.draw_sources(rng, one)] == [[0], [True]]
    every = clips.ClipConfig(num_frames=3, min_sources=3, max_sources=3)
    assert sorted(clips.draw_sources(rng, every)[0]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("box", "side", "size"),
    [
        ((10, 5, 74, 37), 32, (32, 16)),  # shrunk
        ((10, 5, 41, 37), 64, (62, 64)),  # enlarged
        ((0, 0, 80, 57), 40, (40, 28)),  # a side of 28.5 rounded
        ((3, 4, 43, 44), 40, (40, 40)),
    ],
)
def test_cameras_follow_what_is_cut_out(box, side, size):
    """Pixels of two ramps tell where in the whole picture they came from."""
    y, x = np.mgrid[:60, :80]
    rgb = np.stack([3 * x, 4 * y, 0 * x], axis=-1).astype(np.uint8)
    mask = np.full((60, 80), 200, np.uint8)
    intrinsics = np.asarray([[90.0, 0.0, 37.0], [0.0, 85.0, 31.0], [0.0, 0.0, 1.0]])
    cut = clips.cut(rgb, mask, intrinsics, box, side)
    assert cut.size == size
    width, height = size
    j, i = np.mgrid[2 : height - 2, 2 : width - 2] + 0.5  # away from edges, where ramps end
    # Through the old camera, pixels along rays of the new one.
    back = intrinsics @ np.linalg.inv(cut.intrinsics)
    u, v = back[0, 0] * i + back[0, 2], back[1, 1] * j + back[1, 2]
    found = np.float64(cut.rgb[2 : height - 2, 2 : width - 2])
    np.testing.assert_allclose(found[..., 0] / 3 + 0.5, u, atol=0.35)
    np.testing.assert_allclose(found[..., 1] / 4 + 0.5, v, atol=0.3)
    assert cut.rgb.shape == (side, side, 3)
    inside = np.zeros((side, side), bool)
    inside[:height, :width] = True
    np.testing.assert_array_equal(cut.mask, np.where(inside, 200, 0))
    assert not cut.rgb[~inside].any()
    whole = clips.cut(rgb, None, intrinsics, box, side).mask
    np.testing.assert_array_equal(whole, np.where(inside, 255, 0))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_frames": 1},
        {"size": 0},
        {"min_sources": 0},
        {"min_sources": 3, "max_sources": 2},
        {"num_frames": 4, "max_sources": 5},
    ],
)
def test_settings_that_make_no_clip(settings):
    with pytest.raises(ValueError, match=r"make no clip|cannot be taken"):
        clips.ClipConfig(**settings)
