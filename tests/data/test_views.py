"""Posed views: transforms files in every dialect, our own results, and mp4."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import posed_views
import pytest
from PIL import Image
from posed_views import refused

from v3d_jax import errors
from v3d_jax.data import output, picture, views
from v3d_jax.ops import camera

# In the checkout or beside it.
LEGO = [root / "shared" / "data" / "lego" for root in Path(__file__).parents[2:4]]
FOCAL = 0.5 * posed_views.WIDTH / np.tan(np.deg2rad(25.0))


@pytest.fixture(scope="module")
def scene():
    return posed_views.scene()


@pytest.fixture
def folder(tmp_path, scene):
    """Pictures without cameras."""
    posed_views.write_pictures(tmp_path / "scene" / "images", scene)
    return tmp_path / "scene"


def write(folder, content, name="transforms.json"):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def assert_cameras(read, expected, atol=1e-6):
    for got, want in zip(read.cameras, expected, strict=True):
        assert isinstance(got, jax.Array)
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=atol)


# ---- dialects


def test_nerf_synthetic(folder, scene):
    """One angle for all, paths without extension, straight alpha."""
    posed_views.write_pictures(folder / "images", scene, alpha=True)
    content = {
        "camera_angle_x": np.deg2rad(50.0),
        "frames": posed_views.frames(scene, written=""),
    }
    read = views.read(write(folder, content, "transforms_train.json"))
    np.testing.assert_array_equal(read.images, scene.images)
    np.testing.assert_array_equal(read.alpha, scene.alpha)
    assert read.names == tuple(f"images/{index}" for index in range(posed_views.COUNT))
    assert_cameras(read, scene.cameras)
    assert read.points is None
    assert read.notes == ()
    a = scene.alpha[..., None] / 255.0
    expected = scene.images / 255.0 * a + 1.0 - a
    np.testing.assert_allclose(views.on_white(read.images, read.alpha), expected, atol=1e-6)
    assert views.on_white(read.images, read.alpha).dtype == np.float32


def test_nerf_synthetic_kept_as_lossless_webp(folder, scene):
    """The file of cameras stays as it is: its paths have no extension."""
    for index, (image, alpha) in enumerate(zip(scene.images, scene.alpha, strict=True)):
        pixels = np.concatenate([image, alpha[..., None]], axis=-1)
        name = folder / "images" / f"{index}.png"
        Image.fromarray(pixels).save(name.with_suffix(".webp"), lossless=True, exact=True)
        name.unlink()
    content = {
        "camera_angle_x": np.deg2rad(50.0),
        "frames": posed_views.frames(scene, written=""),
    }
    read = views.read(write(folder, content, "transforms_train.json"))
    np.testing.assert_array_equal(read.images, scene.images)
    np.testing.assert_array_equal(read.alpha, scene.alpha)
    assert_cameras(read, scene.cameras)


def test_nerfstudio_with_shared_intrinsics(folder, scene):
    shared = {"camera_model": "OPENCV", "fl_x": 30.0, "fl_y": 31.0, "cx": 11.5, "cy": 7.25}
    shared |= {"w": posed_views.WIDTH, "h": posed_views.HEIGHT, "k1": 0.0, "k2": 0, "p1": 0.0}
    content = {**shared, "frames": posed_views.frames(scene), "applied_scale": 1.0}
    read = views.read(write(folder, content))
    intrinsics = np.float32([[30, 0, 11.5], [0, 31, 7.25], [0, 0, 1]])
    assert_cameras(read, scene.cameras._replace(intrinsics=jnp.stack([intrinsics] * 4)))
    assert read.alpha is None
    np.testing.assert_array_equal(
        views.on_white(read.images, read.alpha), scene.images / np.float32(255)
    )


def test_intrinsics_of_a_frame_go_before_those_of_the_file(folder, scene):
    frames = posed_views.frames(scene)
    frames[2] |= {"fl_x": 40.0, "fl_y": 42.0, "cx": 10.0}
    content = {"fl_x": 30.0, "cx": 11.0, "cy": 8.0, "frames": frames}
    told = np.asarray(views.read(write(folder, content)).cameras.intrinsics)
    np.testing.assert_array_equal(told[:, 0, 0], [30, 30, 40, 30])
    np.testing.assert_array_equal(told[:, 1, 1], [30, 30, 42, 30])  # square pixels unless told
    np.testing.assert_array_equal(told[:, 0, 2], [11, 11, 10, 11])
    np.testing.assert_array_equal(told[:, 1, 2], [8, 8, 8, 8])


def test_instant_ngp_with_two_angles_and_windows_paths(folder, scene):
    frames = posed_views.frames(scene)
    for frame in frames:
        frame["file_path"] = frame["file_path"].replace("/", "\\")
        frame["transform_matrix"] = frame["transform_matrix"][:3]
    content = {"camera_angle_x": 0.9, "camera_angle_y": 0.5, "aabb_scale": 4, "frames": frames}
    told = np.asarray(views.read(write(folder, content)).cameras.intrinsics)[0]
    expected = [12 / np.tan(0.45), 8 / np.tan(0.25)]
    np.testing.assert_allclose([told[0, 0], told[1, 1]], expected, rtol=1e-6)
    np.testing.assert_array_equal(told[:2, 2], [12, 8])


def test_points_project_as_opengl_matrices_say(folder, scene):
    read = views.read(write(folder, {"fl_x": FOCAL, "frames": posed_views.frames(scene)}))
    points = np.random.default_rng(0).uniform(-0.5, 0.5, (20, 3))
    pixels, _ = camera.project(read.cameras, jnp.asarray(points, jnp.float32))
    for index, pose in enumerate(scene.opengl):
        local = np.linalg.inv(pose) @ np.concatenate([points, np.ones((20, 1))], 1).T
        x = posed_views.WIDTH / 2 + FOCAL * local[0] / -local[2]
        y = posed_views.HEIGHT / 2 - FOCAL * local[1] / -local[2]
        np.testing.assert_allclose(np.stack([x, y], -1), pixels[index], atol=1e-4)


def test_a_transforms_file_may_be_named_itself(folder, scene):
    content = {"fl_x": 30.0, "frames": posed_views.frames(scene)[:2]}
    write(folder, {"fl_x": 30.0, "frames": posed_views.frames(scene)})
    read = views.read(write(folder, content, "transforms_test.json") / "transforms_test.json")
    assert len(read.images) == 2


def test_masks_count_as_alpha(folder, scene):
    frames = posed_views.frames(scene)
    posed_views.write_pictures(
        folder / "masks", scene._replace(images=np.repeat(scene.alpha[..., None], 3, -1))
    )
    for index, frame in enumerate(frames):
        frame["mask_path"] = f"masks/{index}.png"
    read = views.read(write(folder, {"fl_x": 30.0, "frames": frames}))
    np.testing.assert_array_equal(read.alpha, scene.alpha)
    np.testing.assert_array_equal(read.images, scene.images)
    (folder / "masks" / "2.png").unlink()
    refused(folder, "frame images/2.png", "mask_path", "masks/2.png does not exist")
    Image.new("L", (9, 9)).save(folder / "masks" / "2.png")
    refused(folder, "2.png is 9 x 9 but its picture 24 x 16")


def test_a_view_without_alpha_among_others_is_opaque(folder, scene):
    posed_views.write_pictures(folder / "images", scene, alpha=True)
    Image.fromarray(scene.images[1]).save(folder / "images" / "1.png")
    read = views.read(write(folder, {"fl_x": 30.0, "frames": posed_views.frames(scene)}))
    np.testing.assert_array_equal(read.alpha[[0, 2, 3]], scene.alpha[[0, 2, 3]])
    assert (read.alpha[1] == 255).all()


def test_pixels_stay_where_the_camera_saw_them(folder, scene):
    """EXIF asks for a half turn, which camera files never count in."""
    exif = Image.Exif()
    exif[0x0112] = 3
    for index, image in enumerate(scene.images):
        Image.fromarray(image).save(folder / "images" / f"{index}.png", exif=exif)
    assert (picture.read(folder / "images" / "0.png").rgb == scene.images[0, ::-1, ::-1]).all()
    read = views.read(write(folder, {"fl_x": 30.0, "frames": posed_views.frames(scene)}))
    np.testing.assert_array_equal(read.images, scene.images)


def test_large_pictures_are_shrunk_with_their_cameras(folder, scene):
    posed_views.write_pictures(folder / "images", scene, alpha=True)
    write(folder, {"fl_x": 30.0, "fl_y": 32.0, "cx": 10.0, "frames": posed_views.frames(scene)})
    read = views.read(folder, max_side=12)
    assert read.images.shape == (4, 8, 12, 3)
    assert read.notes == ("pictures shrunk from 24 x 16 to 12 x 8",)
    np.testing.assert_array_equal(read.cameras.width, 12)
    np.testing.assert_array_equal(read.cameras.height, 8)
    expected = [[15, 0, 5], [0, 16, 4], [0, 0, 1]]
    np.testing.assert_allclose(read.cameras.intrinsics[3], expected, atol=1e-6)
    # Means of 2 x 2 pixels, colours weighted by alpha.
    alpha = scene.alpha.reshape(4, 8, 2, 12, 2).astype(float)
    np.testing.assert_allclose(read.alpha, alpha.mean((2, 4)), atol=1)
    colour = scene.images.reshape(4, 8, 2, 12, 2, 3) * alpha[..., None]
    colour = colour.sum((2, 4)) / alpha.sum((2, 4))[..., None]
    trusted = alpha.mean((2, 4)) > 100
    np.testing.assert_allclose(read.images[trusted], colour[trusted], atol=3)


def test_lego():
    """NeRF-synthetic's own file and pictures."""
    there = [folder for folder in LEGO if folder.is_dir()]
    if not there:
        pytest.skip(f"NeRF-synthetic lego is neither in {LEGO[0]} nor in {LEGO[1]}")
    read = views.read(there[0], max_side=100)
    assert read.images.shape == (100, 100, 100, 3)
    assert read.alpha.shape == (100, 100, 100)
    np.testing.assert_allclose(read.cameras.intrinsics[0, 0, 0], 1111.1111 / 8, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(camera.position(read.cameras), axis=1), 4.0311, 1e-4)
    assert read.names[7] == "./train/r_7"
    # The machine is about the origin: what every view covers is around its projection, and the
    # upper hemisphere that the cameras are in is up in the pictures.
    pixels, depth = camera.project(read.cameras, jnp.asarray([[0.0, 0.0, 0.0], [0.0, 0.0, 1.5]]))
    assert (depth > 0).all()
    assert (pixels[:, 1, 1] < pixels[:, 0, 1]).all()
    rows, columns = np.meshgrid(np.arange(100) + 0.5, np.arange(100) + 0.5, indexing="ij")
    weight = read.alpha / read.alpha.sum((1, 2), keepdims=True)
    centroid = np.stack([(weight * columns).sum((1, 2)), (weight * rows).sum((1, 2))], -1)
    assert np.abs(centroid - np.asarray(pixels[:, 0])).max() < 20


# ---- our own results


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A folder as `sample` writes it, and its frames."""
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    frames = blocks.repeat(8, axis=1).repeat(8, axis=2)
    rgba = np.full((32, 32, 4), 255, np.uint8)
    folder = tmp_path_factory.mktemp("out") / "chair"
    output.write(folder, rgba, frames, camera.orbit(6, width=32, height=32), {})
    return folder, frames


def test_a_result_of_sample(result):
    folder, frames = result
    read = views.read(folder)
    np.testing.assert_array_equal(read.images, frames)
    assert read.alpha is None
    assert read.names == tuple(f"frames/{index:03d}.png" for index in range(6))
    assert_cameras(read, camera.orbit(6, width=32, height=32))


def test_its_video_has_the_same_cameras(result):
    folder, frames = result
    read = views.read(folder / "orbit.mp4")
    assert read.images.shape == frames.shape
    inner = read.images.reshape(6, 4, 8, 4, 8, 3)[:, :, 3:5, :, 3:5]
    original = frames.reshape(6, 4, 8, 4, 8, 3)[:, :, 3:5, :, 3:5]
    assert np.abs(inner.astype(int) - original).mean() < 12  # 4:2:0 and H.264
    assert_cameras(read, views.read(folder).cameras)
    assert "one turn" in read.notes[-1]


def test_video_of_any_length_and_size(tmp_path):
    ramp = np.linspace(20, 230, 11).astype(np.uint8)
    frames = np.broadcast_to(ramp[:, None, None, None], (11, 20, 48, 3))
    output.write_mp4(tmp_path / "turn.mp4", frames, fps=30)
    read = views.read(tmp_path / "turn.mp4", max_side=24)
    assert read.images.shape == (11, 10, 24, 3)
    np.testing.assert_allclose(read.images[:, 5, 12, 1], ramp, atol=4)  # in order, each once
    assert_cameras(read, camera.orbit(11, width=24, height=10))
    assert "frames shrunk from 48 x 20" in read.notes


@pytest.mark.parametrize("part", [0.3, 0.6, 0.97])
def test_truncated_video(result, tmp_path, part):
    data = (result[0] / "orbit.mp4").read_bytes()
    path = tmp_path / "torn.mp4"
    path.write_bytes(data[: int(part * len(data))])
    refused(path, "torn.mp4 is damaged", "truncated")


def test_video_that_ends_between_two_frames(result, tmp_path):
    """What is there decodes without an error, so only the file's own sizes tell."""
    data = (result[0] / "orbit.mp4").read_bytes()
    table = data.index(b"stsz") + 12  # the number of frames, then their sizes
    sizes = np.frombuffer(data[table : table + 28], ">u4")[1:]
    path = tmp_path / "torn.mp4"
    path.write_bytes(data[: data.index(b"mdat") + 4 + int(sizes[:4].sum())])
    refused(path, "torn.mp4 is damaged", "it is truncated")


def test_video_that_is_none(result, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"")
    refused(path, "a.mp4 is empty")
    path.write_bytes(b"\x89PNG" + bytes(100))
    refused(path, "a.mp4 is not an mp4", "convert")
    data = (result[0] / "orbit.mp4").read_bytes()
    path.write_bytes(data[: int.from_bytes(data[:4])])
    refused(path, "its index is missing")
    mdat = data.index(b"mdat")
    path.write_bytes(data[: mdat + 4] + bytes(len(data) - mdat - 4))
    refused(path, "a.mp4 is damaged and cannot be decoded (", "make it again")
    middle = (mdat + len(data)) // 2
    path.write_bytes(data[:middle] + bytes(400) + data[middle + 400 :])
    refused(path, "a.mp4 is damaged and cannot be decoded (", "make it again")


def test_video_of_a_still(tmp_path):
    output.write_mp4(tmp_path / "still.mp4", np.full((5, 16, 16, 3), 90, np.uint8))
    refused(tmp_path / "still.mp4", "all 5 pictures are identical")
    output.write_mp4(tmp_path / "one.mp4", np.full((1, 16, 16, 3), 90, np.uint8))
    refused(tmp_path / "one.mp4", "has 1 frames", "one whole turn")


def test_a_long_video_is_refused_without_reading_on(result, monkeypatch):
    monkeypatch.setattr(views, "MAX_VIEWS", 3)
    refused(result[0] / "orbit.mp4", "over 3 frames", "cut it down")


def test_video_without_ffmpeg(result, monkeypatch):
    import imageio_ffmpeg

    def none():
        raise RuntimeError("No ffmpeg exe could be found.\nInstall it")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", none)
    refused(result[0] / "orbit.mp4", "pip install", "imageio-ffmpeg")


# ---- refusals


def test_sources_that_are_none(tmp_path):
    refused(tmp_path / "nowhere", "nowhere does not exist", "transforms.json", "COLMAP", "mp4")
    refused(tmp_path, "holds no posed views", "transforms.json")
    (tmp_path / "turn.mp4").write_bytes(b"")
    refused(tmp_path, "holds no posed views", "turn.mp4?")
    (tmp_path / "chair.glb").write_bytes(b"glTF")
    refused(tmp_path / "chair.glb", "not one of the kinds that are read")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("{", ("transforms.json is not JSON",)),
        ("\xff\xfe", ("transforms.json is not JSON",)),
        ("[1, 2]", ("no JSON object",)),
        ({"camera_angle_x": 1.0}, ('no list "frames"',)),
        ({"frames": {"0": 1}}, ('no list "frames"',)),
        ({"frames": [3]}, ('no list "frames"',)),
        ({"frames": []}, ("holds no frames", "two views")),
        ({"frames": [{"filepath": "a.png"}]}, ("frame 0", '"file_path"')),
    ],
)
def test_files_that_hold_no_cameras(folder, content, parts):
    if content == "\xff\xfe":
        (folder / "transforms.json").write_bytes(b"\xff\xfe{}")
        refused(folder, *parts)
    else:
        refused(write(folder, content), *parts)


def without(frame, key):
    return {name: value for name, value in frame.items() if name != key}


def turned(pose, part):
    pose = np.array(pose)
    pose[:3, :3] = pose[:3, :3] @ part
    return pose.tolist()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda f: without(f, "transform_matrix"), ("transform_matrix is missing",)),
        (lambda f: f | {"transform_matrix": [[1, 2], [3]]}, ("no 4 x 4 matrix",)),
        (lambda f: f | {"transform_matrix": [["a"] * 4] * 4}, ("no 4 x 4 matrix",)),
        (lambda f: f | {"transform_matrix": [[np.nan] * 4] * 4}, ("NaN or infinity",)),
        (lambda f: f | {"transform_matrix": [[np.inf] * 4] * 4}, ("NaN or infinity",)),
        (
            lambda f: f | {"transform_matrix": np.transpose(f["transform_matrix"]).tolist()},
            ("last row must be 0 0 0 1", "transposed"),
        ),
        (
            lambda f: f | {"transform_matrix": turned(f["transform_matrix"], 2 * np.eye(3))},
            ("no rotation", "3 off the identity", "without scale"),
        ),
        (
            lambda f: (
                f | {"transform_matrix": turned(f["transform_matrix"], np.diag([1.0, 1.0, -1.0]))}
            ),
            ("mirrors", "right-handed"),
        ),
        (lambda f: f | {"w": 48}, ("its picture is 24 x 16", '"w" is 48')),
        (lambda f: f | {"h": "16"}, ("\"h\" is '16': a finite number",)),
        (lambda f: f | {"fl_x": 0.0}, ("focal length 0 0", "positive")),
        (lambda f: f | {"fl_x": np.nan}, ('"fl_x" is nan', "finite")),
        (lambda f: f | {"fl_x": None, "camera_angle_x": 4.0}, ('"camera_angle_x" is 4', "radians")),
        (lambda f: f | {"fl_x": None}, ("has no focal length", "fl_x", "camera_angle_x")),
        (lambda f: f | {"k4": 0.01}, ("k4 = 0.01 means in OPENCV cameras", "undistort")),
        (
            lambda f: f | {"is_fisheye": True, "p1": 0.1},
            ("p1 = 0.1 means in OPENCV_FISHEYE cameras",),
        ),
        (lambda f: f | {"k1": -900.0}, ("no whole picture", "undistort")),
        (lambda f: f | {"camera_model": "EQUIRECTANGULAR"}, ("EQUIRECTANGULAR",)),
        (lambda f: f | {"camera_model": ["OPENCV"]}, ("cameras are not supported",)),
    ],
)
def test_frames_that_cannot_be_used(folder, scene, change, parts):
    frames = posed_views.frames(scene)
    write(folder, {"fl_x": 30.0, "frames": frames})
    assert len(views.read(folder).images) == 4
    frames[2] = change(frames[2])
    where = frames[2]["file_path"]
    refused(write(folder, {"fl_x": 30.0, "frames": frames}), "transforms.json", where, *parts)


def test_pictures_that_do_not_exist_are_left_out(folder, scene):
    frames = posed_views.frames(scene)
    whole = views.read(write(folder, {"fl_x": 30.0, "frames": frames}))
    frames[2] |= {"file_path": "images/9.png"}
    found = views.read(write(folder, {"fl_x": 30.0, "frames": frames}))
    assert found.names == tuple(whole.names[i] for i in (0, 1, 3))
    np.testing.assert_array_equal(found.images, whole.images[[0, 1, 3]])
    np.testing.assert_array_equal(
        found.cameras.world_to_camera, whole.cameras.world_to_camera[np.asarray([0, 1, 3])]
    )
    told = "names 1 of 4 pictures that do not exist, the first is images/9.png: they are left out"
    assert [note for note in found.notes if told in note]
    for frame in frames[:2]:
        frame |= {"file_path": "images/8.png"}
    refused(
        write(folder, {"fl_x": 30.0, "frames": frames}),
        "names 3 of 4 pictures that do not exist, the first is images/8.png: put them there",
    )


def test_rounded_rotations_are_made_exact(folder, scene):
    frames = posed_views.frames(scene)
    for frame in frames:
        frame["transform_matrix"] = np.round(frame["transform_matrix"], 3).tolist()
    read = views.read(write(folder, {"fl_x": FOCAL, "frames": frames}))
    rotation = np.asarray(read.cameras.world_to_camera, np.float64)[:, :3, :3]
    np.testing.assert_allclose(rotation @ rotation.swapaxes(1, 2), [np.eye(3)] * 4, atol=1e-6)
    assert_cameras(read, scene.cameras, atol=5e-3)


def test_views_without_parallax(folder, scene):
    frames = posed_views.frames(scene)
    refused(write(folder, {"fl_x": 30.0, "frames": frames[:1]}), "holds 1 view", "at least two")
    still = [frame | {"transform_matrix": frames[0]["transform_matrix"]} for frame in frames]
    refused(write(folder, {"fl_x": 30.0, "frames": still}), "all 4 cameras are at the same place")
    same = [frame | {"file_path": "images/0.png"} for frame in frames]
    refused(write(folder, {"fl_x": 30.0, "frames": same}), "all 4 pictures are identical")


def test_pictures_that_do_not_fit(folder, scene):
    write(folder, {"fl_x": 30.0, "frames": posed_views.frames(scene)})
    Image.new("RGB", (16, 16)).save(folder / "images" / "3.png")
    refused(folder, "images/3.png is 16 x 16 and images/0.png 24 x 16", "one size")
    (folder / "images" / "3.png").write_bytes(b"no picture")
    refused(folder, "3.png is not a picture")
    data = (folder / "images" / "2.png").read_bytes()
    (folder / "images" / "3.png").write_bytes(data[: len(data) // 2])
    refused(folder, "3.png is damaged")
    for index in range(4):
        Image.new("RGBA", (24, 16)).save(folder / "images" / f"{index}.png")
    refused(folder, "every view is transparent everywhere")


def test_the_cli_shows_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        errors.run(lambda: views.read(tmp_path / "nowhere"))
    assert caught.value.code == errors.USER_ERROR_STATUS
    assert capsys.readouterr().err.count("\n") == 1


def test_translucent_regions_become_solid_in_their_colour_on_white_and_outlines_stay():
    alpha = np.zeros((1, 12, 12), np.uint8)
    alpha[0, 2:10, 2:10] = 128
    alpha[0, 2:10, 7:10] = 255
    alpha[0, 2:10, 10] = 64  # an outline: part of a pixel
    images = np.full((1, 12, 12, 3), 100, np.uint8)
    shown, solid = views.opaque(images, alpha)
    inner = np.zeros_like(alpha, bool)
    inner[0, 3:9, 3:6] = True  # those beside something else are outlines
    np.testing.assert_array_equal(solid[inner], 255)
    np.testing.assert_array_equal(solid[~inner], alpha[~inner])
    before, after = views.on_white(images, alpha), views.on_white(shown, solid)
    np.testing.assert_allclose(after, before, atol=0.5 / 255)
    np.testing.assert_array_equal(shown[~inner], images[~inner])
    assert (images == 100).all()


def test_feathered_masks_are_outlines():
    alpha = np.broadcast_to(np.uint8(np.linspace(0, 255, 16)), (1, 8, 16))
    images = np.zeros((1, 8, 16, 3), np.uint8)
    np.testing.assert_array_equal(views.opaque(images, alpha)[1], alpha)
