"""COLMAP's models in both encodings."""

import jax
import numpy as np
import posed_views
import pytest
from colmap_files import WRITERS, quaternion, write_binary, write_text
from PIL import Image
from posed_views import refused

from v3d_jax.data import colmap, distortion, views

NAMES = ("b 1.png", "a.png", "sub/c.png", "d.png")  # neither sorted nor free of spaces
SIZE = (posed_views.WIDTH, posed_views.HEIGHT)
PINHOLE = ("PINHOLE", *SIZE, (30.0, 31.0, 11.5, 7.25))
POINTS = [
    (7, (0.1, -2.5, 3.0), (255, 0, 9), 0.5, [(3, 0), (5, 1)]),
    (2, (1e-3, 4.0, -1.0 / 3.0), (1, 2, 3), 1.5, []),
]


@pytest.fixture(scope="module")
def scene():
    return posed_views.scene()


def images_of(scene, camera=1):
    """(id, quaternion and translation, camera, name, points in the picture) of every view."""
    poses = np.asarray(scene.cameras.world_to_camera, np.float64)
    return [
        (10 - index, (*quaternion(pose[:3, :3]), *pose[:3, 3]), camera, name,
         [(1.5, 2.5, 7), (3.25, 4.0, -1)][: index % 3])
        for index, (pose, name) in enumerate(zip(poses, NAMES, strict=True))
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path, scene):
    """COLMAP's layout: pictures, and an empty folder for a model."""
    root = tmp_path / "scene"
    (root / "sparse" / "0").mkdir(parents=True)
    (root / "images" / "sub").mkdir(parents=True)
    for image, name in zip(scene.images, NAMES, strict=True):
        Image.fromarray(image).save(root / "images" / name)
    return root


def test_both_encodings_give_the_same(folder, scene):
    read = {}
    for kind, write in WRITERS.items():
        model = folder / kind / "sparse" / "0"
        model.mkdir(parents=True)
        (folder / kind / "images").symlink_to(folder / "images")
        write(model, {1: PINHOLE}, images_of(scene), POINTS)
        read[kind] = views.read(folder / kind)
    leaves = [jax.tree.leaves(one._replace(notes=())) for one in read.values()]
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_array_equal(a, b)
    one = read["txt"]
    assert one.names == ("a.png", "b 1.png", "d.png", "sub/c.png")
    order = [1, 0, 3, 2]
    np.testing.assert_array_equal(one.images, scene.images[order])
    assert one.alpha is None
    pose = np.asarray(scene.cameras.world_to_camera)[order]
    np.testing.assert_allclose(one.cameras.world_to_camera, pose, atol=1e-6)
    intrinsics = [[30, 0, 11.5], [0, 31, 7.25], [0, 0, 1]]
    np.testing.assert_array_equal(one.cameras.intrinsics, [intrinsics] * 4)
    np.testing.assert_array_equal(one.cameras.width, 24)
    np.testing.assert_array_equal(one.cameras.height, 16)
    expected = np.float32([point[1] for point in POINTS])
    np.testing.assert_array_equal(one.points.positions, expected)
    assert one.points.positions.dtype == np.float32
    np.testing.assert_array_equal(one.points.colours, [point[2] for point in POINTS])
    assert one.points.colours.dtype == np.uint8


def test_binary_goes_before_text(folder, scene):
    write_text(folder / "sparse/0", {1: PINHOLE}, images_of(scene))
    write_binary(
        folder / "sparse/0", {1: ("SIMPLE_PINHOLE", *SIZE, (50.0, 12.0, 8.0))}, images_of(scene)
    )
    told = views.read(folder)
    assert float(told.cameras.intrinsics[0, 1, 1]) == 50.0
    assert told.points is None


@pytest.mark.parametrize("place", [".", "sparse", "sparse/0", "colmap/sparse/0"])
def test_layouts(tmp_path, folder, scene, place):
    root = tmp_path / "other"
    model = root / place
    model.mkdir(parents=True)
    (root / "images").symlink_to(folder / "images")
    write_text(model, {1: PINHOLE}, images_of(scene))
    (model / "points3D.txt").unlink()
    read = views.read(root)
    np.testing.assert_array_equal(read.images, scene.images[[1, 0, 3, 2]])
    assert read.points is None
    np.testing.assert_array_equal(views.read(model).images, read.images)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    ("model", "parameters", "focal"),
    [
        ("SIMPLE_PINHOLE", (30.0, 12.0, 8.0), (30, 30)),
        ("SIMPLE_RADIAL", (30.0, 12.0, 8.0, 0.0), (30, 30)),
        ("RADIAL", (30.0, 12.0, 8.0, 0.0, 0.0), (30, 30)),
        ("OPENCV", (30.0, 33.0, 12.0, 8.0, 0.0, 0.0, 0.0, 0.0), (30, 33)),
        ("FULL_OPENCV", (30.0, 33.0, 12.0, 8.0, *[0.0] * 8), (30, 33)),
        ("SIMPLE_DIVISION", (30.0, 12.0, 8.0, 0.0), (30, 30)),
    ],
)
def test_undistorted_models(folder, scene, kind, model, parameters, focal):
    cameras = {4: (model, *SIZE, parameters), 1: PINHOLE}
    images = images_of(scene, camera=4)
    images[0] = (*images[0][:2], 1, *images[0][3:])
    WRITERS[kind](folder / "sparse/0", cameras, images)
    told = np.asarray(views.read(folder).cameras.intrinsics)
    np.testing.assert_array_equal(told[0, [0, 1], [0, 1]], focal)
    np.testing.assert_array_equal(told[0, :2, 2], (12, 8))
    np.testing.assert_array_equal(told[1, [0, 1], [0, 1]], (30, 31))  # "b 1.png"


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    ("model", "parameters", "told"),
    [
        ("SIMPLE_DIVISION", (30.0, 12.0, 8.0, 0.01), "SIMPLE_DIVISION with distortion"),
        ("DIVISION", (30.0, 33.0, 12.0, 8.0, -0.1), "DIVISION with distortion"),
        ("FOV", (30.0, 33.0, 12.0, 8.0, 0.01), "FOV"),
        ("EUCM", (30.0, 33.0, 12.0, 8.0, 0.0, 1.0), "EUCM"),
    ],
)
def test_lenses_that_are_not_read_are_named(folder, scene, kind, model, parameters, told):
    cameras = {1: PINHOLE, 3: (model, *SIZE, parameters)}
    WRITERS[kind](folder / "sparse/0", cameras, images_of(scene))
    refused(folder, f"cameras.{kind}: camera 3 is {told}, which", "image_undistorter")


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    ("model", "parameters", "lens"),
    [
        ("SIMPLE_RADIAL", (30, 12, 8, -0.1), (30, 30, -0.1, 0, 0, 0, 0, 0, 0, 0)),
        ("RADIAL", (30, 12, 8, -0.1, 0.02), (30, 30, -0.1, 0.02, 0, 0, 0, 0, 0, 0)),
        ("OPENCV", (30, 33, 12, 8, 0.1, 0.2, 0.3, 0.4), (30, 33, 0.1, 0.2, 0, 0, 0, 0, 0.3, 0.4)),
        (
            "FULL_OPENCV",
            (30, 33, 12, 8, 0.1, 0.2, 0.03, 0.04, 0.5, 0.6, 0.7, 0.8),
            (30, 33, 0.1, 0.2, 0.5, 0.6, 0.7, 0.8, 0.03, 0.04),
        ),
    ],
)
def test_lenses_of_brown(folder, scene, kind, model, parameters, lens):
    path = folder / "sparse/0"
    WRITERS[kind](
        path, {3: (model, *SIZE, tuple(map(float, parameters)))}, images_of(scene, camera=3)
    )
    found = colmap.read(path)[0][0]
    assert (*found.lens.focal, *found.lens.radial, *found.lens.tangential) == lens
    assert found.lens.centre == (12, 8)
    assert not found.lens.fisheye
    zoom = found.intrinsics[[0, 1], [0, 1]] / lens[:2]
    assert zoom[0] == pytest.approx(zoom[1])
    assert zoom[0] != pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("model", "parameters", "radial"),
    [
        ("SIMPLE_FISHEYE", (30, 12, 8), (0, 0, 0, 0)),
        ("FISHEYE", (30, 30, 12, 8), (0, 0, 0, 0)),
        ("SIMPLE_RADIAL_FISHEYE", (30, 12, 8, 0.1), (0.1, 0, 0, 0)),
        ("RADIAL_FISHEYE", (30, 12, 8, 0.1, 0.2), (0.1, 0.2, 0, 0)),
        ("OPENCV_FISHEYE", (30, 30, 12, 8, 0.1, 0.2, 0.3, 0.4), (0.1, 0.2, 0.3, 0.4)),
    ],
)
def test_fisheyes(folder, scene, model, parameters, radial):
    path = folder / "sparse/0"
    cameras = {3: (model, *SIZE, tuple(map(float, parameters)))}
    write_binary(path, cameras, images_of(scene, camera=3))
    lens = colmap.read(path)[0][0].lens
    assert lens == distortion.Lens((30, 30), (12, 8), radial, fisheye=True)


def test_a_model_of_the_future(folder, scene):
    cameras = {3: ("NEW", *SIZE, (30.0,))}
    write_binary(folder / "sparse/0", cameras, images_of(scene))
    refused(folder, "camera 3 is model 77, which is not supported")


def test_masks_are_alpha(folder, scene):
    write_binary(folder / "sparse/0", {1: PINHOLE}, images_of(scene))
    (folder / "masks" / "sub").mkdir(parents=True)
    for alpha, name in zip(scene.alpha, NAMES, strict=True):
        Image.fromarray(alpha).save(folder / "masks" / f"{name}.png")
    np.testing.assert_array_equal(views.read(folder).alpha, scene.alpha[[1, 0, 3, 2]])
    (folder / "masks" / "d.png.png").unlink()
    refused(folder, "3 masks for 4 pictures", "d.png.png is missing")


@pytest.mark.parametrize("kind", WRITERS)
def test_pictures_that_are_missing(folder, scene, kind):
    WRITERS[kind](folder / "sparse/0", {1: PINHOLE}, images_of(scene))
    (folder / "images" / "sub" / "c.png").unlink()
    refused(folder, "lacks 1 of 4 pictures", "sub/c.png", "put them there")
    (folder / "images").rename(folder / "photos")
    refused(folder, "no picture of the COLMAP model", "images/", "b 1.png")


@pytest.mark.parametrize("kind", WRITERS)
def test_models_that_cannot_be_used(folder, scene, kind):
    model, write, images = folder / "sparse/0", WRITERS[kind], images_of(scene)
    write(model, {1: PINHOLE}, [])
    refused(folder, f"images.{kind} holds no images")
    write(model, {2: PINHOLE}, images)
    refused(folder, "image a.png is of camera 1, which", f"cameras.{kind} lacks")
    write(model, {1: PINHOLE}, images[:1])
    refused(folder, "holds 1 view", "at least two")
    for pose in ((0.0,) * 7, (np.nan,) * 7, (1.0, 0.0, 0.0, 0.0, np.inf, 0.0, 0.0)):
        write(model, {1: PINHOLE}, [(1, pose, *images[0][2:]), *images[1:]])
        refused(folder, "image b 1.png has no pose")
    still = [(*image[:1], images[0][1], *image[2:]) for image in images]
    write(model, {1: PINHOLE}, still)
    refused(folder, "all 4 cameras are at the same place")
    write(model, {1: ("PINHOLE", *SIZE, (30.0, np.nan, 12.0, 8.0))}, images)
    refused(folder, "camera 1: focal length 30 nan")
    write(model, {1: ("PINHOLE", 48, 32, PINHOLE[3])}, images)
    refused(folder, "a.png is 24 x 16 but its camera is for 48 x 32")
    mixed = [*images[:3], (*images[3][:2], 2, *images[3][3:])]
    write(model, {1: PINHOLE, 2: ("PINHOLE", 48, 32, PINHOLE[3])}, mixed)
    refused(folder, "d.png is 48 x 32 and a.png 24 x 16", "one size")


@pytest.mark.parametrize("name", ["cameras", "images", "points3D"])
@pytest.mark.parametrize("kind", WRITERS)
def test_damaged_files(folder, scene, name, kind):
    model = folder / "sparse/0"
    WRITERS[kind](model, {1: PINHOLE}, images_of(scene), POINTS)
    path = model / f"{name}.{kind}"
    data = path.read_bytes()
    path.write_bytes(data[:-9] if kind == "bin" else data.rstrip().rsplit(b" ", 5)[0])
    refused(folder, f"{name}.{kind} is truncated or damaged", "export")
    path.write_bytes(b"\xff" * 40)
    refused(folder, f"{name}.{kind} is truncated or damaged")
    path.unlink()
    if name == "cameras":
        refused(folder, "holds no posed views")
    elif name == "images":
        refused(folder, f"cannot read {path}", "No such file")


@pytest.mark.parity
def test_what_pycolmap_writes(folder, scene):
    pycolmap = pytest.importorskip("pycolmap")
    options = pycolmap.SyntheticDatasetOptions(
        num_rigs=1,
        num_cameras_per_rig=1,
        num_frames_per_rig=5,
        num_points3D=20,
        camera_model_id=pycolmap.CameraModelId.PINHOLE,
        camera_params=[30.0, 31.0, 12.0, 8.0],
        camera_width=posed_views.WIDTH,
        camera_height=posed_views.HEIGHT,
    )
    model = pycolmap.synthesize_dataset(options)
    rng = np.random.default_rng(0)
    images = sorted(model.images.values(), key=lambda image: image.name)
    for image in images:
        pixels = rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / image.name)
    for write in (model.write_text, model.write_binary):
        write(str(folder / "sparse/0"))
        read = views.read(folder)
        assert read.names == tuple(image.name for image in images)
        points = np.stack([model.points3D[number].xyz for number in sorted(model.points3D)])
        np.testing.assert_allclose(read.points.positions, points, atol=1e-6)
        for index, image in enumerate(images):
            pose = image.cam_from_world().matrix()
            told = np.asarray(read.cameras.world_to_camera)[index, :3]
            np.testing.assert_allclose(told, pose, atol=1e-5)
            expected = np.stack([image.project_point(point) for point in points])
            local = points @ told[:, :3].T + told[:, 3]
            pixels = local @ np.asarray(read.cameras.intrinsics)[index].T
            np.testing.assert_allclose(pixels[:, :2] / pixels[:, 2:], expected, atol=1e-3)
