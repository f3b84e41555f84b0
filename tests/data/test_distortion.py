"""Lenses that bend lines: OpenCV's formulas, the zoom that leaves nothing blank, pictures."""

import ball_scene
import colmap_files
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from v3d_jax.data import clips, distortion, mvimgnet
from v3d_jax.errors import UserError

SIZE = (96, 64)
BROWN = distortion.Lens((80.0, 84.0), (50.0, 30.0), (-0.2, 0.05, 0.01, 0.02, 0.03, -0.01))
LENSES = {
    "barrel": BROWN._replace(radial=(-0.3, 0.05, 0.0, 0.0, 0.0, 0.0)),
    "pincushion": BROWN._replace(radial=(0.2, 0.0, 0.0, 0.0, 0.0, 0.0)),
    "rational": BROWN,
    "tangential": BROWN._replace(tangential=(0.01, -0.02)),
    "fisheye": distortion.Lens((60.0, 60.0), (48.0, 32.0), (0.05, -0.01, 0.0, 0.0), fisheye=True),
}


def test_the_formula_of_brown():
    """By hand, in the order that OpenCV's page has it."""
    x, y = 0.3, -0.4
    square = 0.25
    scale = (1 - 0.2 * square + 0.05 * square**2 + 0.01 * square**3) / (
        1 + 0.02 * square + 0.03 * square**2 - 0.01 * square**3
    )
    bent_x = x * scale + 2 * 0.01 * x * y - 0.02 * (square + 2 * x * x)
    bent_y = y * scale + 0.01 * (square + 2 * y * y) - 2 * 0.02 * x * y
    found = distortion.distort(LENSES["tangential"], np.asarray([x]), np.asarray([y]))
    np.testing.assert_allclose(found, [[80 * bent_x + 50], [84 * bent_y + 30]], rtol=1e-12)


def test_the_formula_of_the_fisheye():
    angle = 1.1
    radius = np.tan(angle)
    bent = angle * (1 + 0.05 * angle**2 - 0.01 * angle**4)
    x, y = 0.6 * radius, 0.8 * radius
    u, v = distortion.distort(LENSES["fisheye"], np.asarray([x, 0.0]), np.asarray([y, 0.0]))
    np.testing.assert_allclose(u, (60 * 0.6 * bent + 48, 48), rtol=1e-12)
    np.testing.assert_allclose(v, (60 * 0.8 * bent + 32, 32), rtol=1e-12)


@pytest.mark.parametrize("name", LENSES)
def test_the_zoom_is_the_least_that_leaves_nothing_blank(name):
    lens = LENSES[name]
    zoom = distortion.zoom(lens, SIZE)
    u, v = np.meshgrid(np.linspace(0, SIZE[0], 200), np.linspace(0, SIZE[1], 200))

    def blank(factor):
        x, y = (u - lens.centre[0]) / lens.focal[0], (v - lens.centre[1]) / lens.focal[1]
        found = distortion.distort(lens, x / factor, y / factor)
        return max(
            max(-part.min(), part.max() - end) for part, end in zip(found, SIZE, strict=True)
        )

    assert blank(zoom) <= 1e-3
    assert blank(0.99 * zoom) > 0.05
    assert (zoom > 1.0) == (name == "pincushion")


@pytest.mark.parametrize("name", LENSES)
def test_a_pinhole_pixel_shows_what_the_lens_shows_there(name):
    """Of pictures that count their own pixels, but for the last half of one at the border."""
    lens = LENSES[name]
    u, v = np.meshgrid(np.arange(SIZE[0]) + 0.5, np.arange(SIZE[1]) + 0.5)
    picture = np.stack([2 * u, 2 * v, 0 * u + 9], axis=-1).astype(np.uint8)
    found = distortion.straightened(lens, picture)
    (fx, _, cx), (_, fy, cy), _ = distortion.pinhole(lens, SIZE, "a camera")
    there = distortion.distort(lens, (u - cx) / fx, (v - cy) / fy)
    for layer, place, end in zip((0, 1), there, SIZE, strict=True):
        inside = (place > 0.5) & (place < end - 0.5)
        error = (2 * place - found[..., layer])[inside]
        assert inside.mean() > 0.9
        # What is between two numbers is cut off.
        assert error.min() > -0.1
        assert error.max() < 1.1
    assert (found[..., 2] == 9).all()


def test_colours_at_an_outline_are_those_of_the_object():
    picture = np.zeros((*SIZE[::-1], 4), np.uint8)
    picture[20:44, 30:66] = 200, 100, 50, 255
    found = distortion.straightened(LENSES["barrel"], picture)
    edge = (found[..., 3] > 20) & (found[..., 3] < 235)
    assert edge.sum() > 20
    np.testing.assert_allclose(found[edge][:, :3], [[200, 100, 50]] * edge.sum(), atol=2)


def test_lenses_that_show_no_whole_picture():
    """What is farther out comes back; and far more than the picture is needed."""
    for radial in ((-900.0, 0.0, 0.0, 0.0, 0.0, 0.0), (900.0, 0.0, 0.0, 0.0, 0.0, 0.0)):
        lens = BROWN._replace(radial=radial)
        assert distortion.zoom(lens, SIZE) is None
        with pytest.raises(UserError, match=r"camera 7: .* no whole picture: calibrate again"):
            distortion.pinhole(lens, SIZE, "camera 7")


@pytest.mark.parametrize("amount", [-3.0, 3.0])
def test_balls_are_where_the_cameras_of_straightened_pictures_say(tmp_path, amount):
    """Pictures of MVImgNet's lenses, made from a pinhole camera's by solving for the radius."""
    size = ball_scene.LANDSCAPE
    shot, world = ball_scene.shots(size), ball_scene.moved_world()
    poses, points = ball_scene.in_world(shot, world)
    focal, (cx, cy) = 150.0, (44.5, 37.25)
    u, v = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    x, y = (u - cx) / focal, (v - cy) / focal
    bent = np.hypot(x, y)
    radius = bent.copy()
    for _ in range(50):
        radius -= (radius * (1 + amount * radius**2) - bent) / (1 + 3 * amount * radius**2)
    scale = radius / bent
    (fx, _, _), (_, fy, _), _ = shot.intrinsics
    there = fy * y * scale + cy - 0.5, fx * x * scale + cx - 0.5
    folder = tmp_path / "7" / "bent"
    (folder / "images").mkdir(parents=True)
    (folder / "sparse" / "0").mkdir(parents=True)
    rows = []
    for index, (rgb, pose) in enumerate(zip(shot.rgb, poses, strict=True)):
        layers = [
            ndimage.map_coordinates(rgb[..., c].astype(float), there, order=1, mode="nearest")
            for c in range(3)
        ]
        Image.fromarray(np.uint8(np.stack(layers, -1) + 0.5)).save(
            folder / "images" / f"{index + 1:03d}.png"
        )
        pose = (*colmap_files.quaternion(pose[:3, :3]), *pose[:3, 3])
        rows.append((index + 1, pose, 1, f"{index + 1:03d}.png", []))

    def error(distorted):
        lens = ("SIMPLE_RADIAL", *size, (focal, cx, cy, distorted))
        colmap_files.write_binary(folder / "sparse" / "0", {1: lens}, rows)
        config = mvimgnet.MVImgNetConfig(clip=clips.ClipConfig(num_frames=5, size=72))
        clip = mvimgnet.read(folder, config, np.random.default_rng(0))
        ball_scene.check_clip(clip, points, least=2)

    error(amount)
    with pytest.raises(AssertionError):
        error(0.0)
