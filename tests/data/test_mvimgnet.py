"""MVImgNet's folders, written here: where cameras and pictures agree, and what is left out."""

import ball_scene
import colmap_files
import grain
import jax
import numpy as np
import pytest
from mvimgnet_files import write_object
from PIL import Image

from v3d_jax.data import clips, mvimgnet, paths, skips
from v3d_jax.errors import UserError

CLIP = clips.ClipConfig(num_frames=5, size=64, min_sources=1, max_sources=3)
CONFIG = mvimgnet.MVImgNetConfig(clip=CLIP)


def read(folder, config=CONFIG, seed=0):
    return mvimgnet.read(folder, config, np.random.default_rng(seed))


@pytest.mark.parametrize("size", ball_scene.INTRINSICS)
@pytest.mark.parametrize("random_crop", [False, True])
@pytest.mark.parametrize("side", [64, 110])
def test_points_are_where_the_cameras_say(tmp_path, size, random_crop, side):
    folder = tmp_path / "7" / "0a1b2c3d"
    points = write_object(folder, size)
    clip_config = clips.ClipConfig(num_frames=5, size=side)
    config = mvimgnet.MVImgNetConfig(clip=clip_config, random_crop=random_crop)
    clip = read(folder, config)
    assert clip.images.shape == (5, side, side, 3)
    assert clip.images.dtype == np.uint8
    assert np.all(clip.sizes == side)
    assert np.all(clip.mask == 255)
    ball_scene.check_clip(clip, points, least=4)
    corners = {tuple(intrinsics[:2, 2].tolist()) for intrinsics in clip.intrinsics}
    assert (len(corners) > 1) == random_crop


def test_frames_are_those_along_the_path_and_the_first_is_the_reference(tmp_path):
    folder = tmp_path / "7" / "0a1b2c3d"
    write_object(folder)
    clip = read(folder)
    assert clip.frames.tolist() == [0, 2, 3, 5, 7]
    assert clip.names.tolist() == ["001.jpg", "003.jpg", "004.jpg", "006.jpg", "008.jpg"]
    assert clip.name == "7/0a1b2c3d"
    cameras = clips.cameras(clip)
    places = np.linalg.inv(np.asarray(cameras.world_to_camera, np.float64))[:, :3, 3]
    np.testing.assert_allclose(places.mean(axis=0), 0.0, atol=1e-6)
    looked_at = paths.depth(np.asarray(cameras.world_to_camera, np.float64), 0)
    np.testing.assert_allclose(looked_at, 1.5, rtol=1e-6)
    # The walk gets faster, so that evenly spaced places are later frames.
    even = mvimgnet.MVImgNetConfig(clip=clips.ClipConfig(num_frames=5, size=64, arc_length=True))
    assert read(folder, even).frames[1] > 2


def test_masks_of_version_two_are_cut_as_the_pictures_are(tmp_path):
    folder = tmp_path / "7" / "a"
    write_object(folder, ball_scene.LANDSCAPE, masks=True)
    clip = read(folder)
    # The balls are whole colours, the wall is grey.
    colourful = np.ptp(clip.images.astype(int), axis=-1)
    assert np.corrcoef(colourful.ravel(), clip.mask.ravel())[0, 1] > 0.98
    assert np.all(clip.mask[:, 0] == 0)


def test_clips_can_be_batched(tmp_path):
    folders = [tmp_path / "7" / name for name in "ab"]
    for folder, size in zip(folders, ball_scene.INTRINSICS, strict=True):
        write_object(folder, size)
    found = mvimgnet.objects(tmp_path, CONFIG, {}.__setitem__)
    assert found == folders
    data = grain.MapDataset.source(found).seed(3)
    data = data.random_map(lambda folder, rng: mvimgnet.read(folder, CONFIG, rng)).batch(2)
    batch = data[0]
    assert batch.images.shape == (2, 5, 64, 64, 3)
    assert batch.sources.shape == batch.valid.shape == (2, 3)
    assert batch.name.tolist() == ["7/a", "7/b"]
    cameras = clips.cameras(batch)
    assert jax.tree.map(np.shape, cameras) == ((2, 5, 4, 4), (2, 5, 3, 3), (2, 5), (2, 5))
    for one, other in zip(batch, data[0], strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_left_out_has_a_reason(tmp_path):
    good = tmp_path / "103" / "good"
    write_object(good)
    write_object(tmp_path / "103" / "short", count=4)
    write_object(tmp_path / "7" / "missing")
    (tmp_path / "7" / "missing" / "images" / "003.jpg").unlink()
    write_object(tmp_path / "7" / "distorted", distortion=-900.0)
    write_object(tmp_path / "7" / "failed")
    for path in (tmp_path / "7" / "failed" / "sparse" / "0").iterdir():
        path.unlink()
    write_object(tmp_path / "7" / "damaged")
    damaged = tmp_path / "7" / "damaged" / "sparse" / "0" / "images.bin"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    table = skips.Skips(tmp_path / "skipped.csv")
    assert mvimgnet.objects(tmp_path, CONFIG, table.add) == [good]
    table.finish()
    told = {
        "103/short": "has 4 frames, 5 are needed",
        "7/missing": "lacks 1 of 8 pictures",
        "7/distorted": "the lens shows no whole picture",
        "7/failed": "holds no COLMAP model",
        "7/damaged": "images.bin is truncated or damaged",
    }
    assert set(table.reasons) == set(told)
    for name, part in told.items():
        assert part in table.reasons[name]
        with pytest.raises(UserError) as caught:
            read(tmp_path / name)
        assert part in str(caught.value)
        assert "\n" not in str(caught.value)


def test_cameras_at_one_place_show_no_depth(tmp_path):
    folder = tmp_path / "7" / "still"
    write_object(folder)
    model = folder / "sparse" / "0"
    rows = [(k, (1.0, 0, 0, 0, 1.0, 2.0, 3.0), 1, f"{k:03d}.jpg", []) for k in range(1, 9)]
    lens = ("PINHOLE", *ball_scene.LANDSCAPE, (80.0, 80.0, 48.0, 36.0))
    colmap_files.write_binary(model, {1: lens}, rows)
    reasons = {}
    with pytest.raises(UserError, match=r"none of 1 objects .* seen from one place only"):
        mvimgnet.objects(tmp_path, CONFIG, reasons.__setitem__)
    assert reasons == {"7/still": "was seen from one place only, which shows no depth"}


def test_pictures_that_do_not_fit(tmp_path):
    folder = tmp_path / "7" / "a"
    write_object(folder, ball_scene.LANDSCAPE)
    path = folder / "images" / "001.jpg"
    Image.new("RGB", (48, 36)).save(path)
    with pytest.raises(UserError, match=r"001\.jpg is 48 x 36 but its camera is for 96 x 72"):
        read(folder)
    path.write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UserError, match=r"001\.jpg"):
        read(folder)
    with pytest.raises(UserError, match="holds no objects"):
        mvimgnet.objects(tmp_path / "nowhere", CONFIG, {}.__setitem__)
