import sys
import types

import numpy as np
import pytest
from PIL import Image, ImageDraw

from v3d_jax import errors
from v3d_jax.data import matte


def scene(size=192, background=(180, 200, 190), gradient=0.0, noise=0.0, ring=False):
    """A disc with a soft edge on a background; returns the picture, true alpha and colour."""
    y, x = np.mgrid[:size, :size] + 0.5
    radius = np.hypot(x - size / 2, y - size / 2)
    alpha = np.clip(size / 4 - radius + 0.5, 0, 1)
    if ring:
        alpha *= np.clip(radius - size / 8 + 0.5, 0, 1)
    colour = np.asarray([200.0, 60.0, 40.0])
    behind = np.asarray(background, float) + gradient * (x / size - 0.5)[..., None]
    image = colour * alpha[..., None] + behind * (1 - alpha[..., None])
    image += noise * np.random.default_rng(0).standard_normal(image.shape)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8), alpha, colour


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 0.01),
        ({"gradient": 80.0}, 0.01),
        ({"noise": 3.0}, 0.015),
        ({"background": (255,) * 3}, 0.01),
    ],
)
def test_disc_is_cut_out(options, tolerance):
    image, alpha, _ = scene(**options)
    _, found = matte.by_border(image)
    assert np.abs(found / 255.0 - alpha).mean() < tolerance
    assert (found[alpha == 1] == 255).mean() > 0.99
    assert (found[alpha == 0] == 0).mean() > 0.99


def test_background_does_not_stain_the_edge():
    image, alpha, colour = scene(background=(20, 220, 60))
    rgb, found = matte.by_border(image)
    edge = (alpha > 0.2) & (alpha < 1)
    assert edge.sum() > 50
    np.testing.assert_allclose(found[edge] / 255.0, alpha[edge], atol=0.05)
    before = np.abs(image[edge].astype(float) - colour).mean()
    assert np.abs(rgb[edge].astype(float) - colour).mean() < 0.1 * before


def test_object_may_touch_the_border():
    image = np.full((120, 120, 3), 240, np.uint8)
    image[60:, 40:80] = (30, 80, 160)
    _, alpha = matte.by_border(image)
    assert (alpha[64:, 44:76] == 255).all()
    assert (alpha[:56] == 0).all()


def test_inside_of_the_object_in_the_background_colour_stays():
    """A white label on an object on white is part of the object."""
    image, _, _ = scene(background=(255, 255, 255))
    image[86:106, 86:106] = 255
    _, alpha = matte.by_border(image)
    assert (alpha[88:104, 88:104] == 255).all()


def test_spiral_background_is_followed_to_its_end():
    canvas = Image.new("RGB", (160, 160), (230, 230, 230))
    draw = ImageDraw.Draw(canvas)
    for i in range(8):
        box = (10 + 9 * i, 10 + 9 * i, 150 - 9 * i, 150 - 9 * i)
        draw.rectangle(box, outline=(10, 10, 10), width=2)
        gap = (
            (box[0] + 3, box[1] - 1, box[0] + 6, box[1] + 3)
            if i % 2
            else (box[2] - 6, box[3] - 3, box[2] - 3, box[3] + 1)
        )
        draw.rectangle(gap, fill=(230, 230, 230))
    _, alpha = matte.by_border(np.asarray(canvas))
    assert alpha[80, 80] == 0


def test_plain_picture_has_no_object():
    with pytest.raises(errors.UserError, match=r"no object stands out.*rembg"):
        matte.cut_out(np.full((64, 64, 3), 130, np.uint8), "plain.png")


def test_lone_pixels_are_no_object():
    image, _, _ = scene()
    image[5, 7] = image[170, 20] = 0
    _, found = matte.by_border(image)
    assert found[5, 7] == found[170, 20] == 0


def fake_rembg(monkeypatch, remove):
    module = types.ModuleType("rembg")
    module.__spec__ = types.SimpleNamespace(name="rembg")
    module.remove = remove
    monkeypatch.setitem(sys.modules, "rembg", module)


def test_rembg_is_used_for_its_mask_alone(monkeypatch):
    image, alpha, _ = scene()
    mask = Image.fromarray((alpha * 255).astype(np.uint8))
    calls = []

    def remove(picture, only_mask):
        calls.append(only_mask)
        return mask

    fake_rembg(monkeypatch, remove)
    cut = matte.cut_out(image, "a.png")
    assert calls == [True]
    np.testing.assert_array_equal(cut.rgb, image)
    np.testing.assert_array_equal(cut.alpha, np.asarray(mask))
    assert cut.notes == ()


def test_failing_rembg_falls_back_and_says_so(monkeypatch):
    def remove(picture, only_mask):
        raise OSError("no route to host\nmore")

    fake_rembg(monkeypatch, remove)
    image, alpha, _ = scene()
    cut = matte.cut_out(image, "a.png")
    assert cut.notes[0] == "a.png: rembg failed (no route to host)"
    assert "v3d_jax[matting]" in cut.notes[1]
    assert np.abs(cut.alpha / 255.0 - alpha).mean() < 0.01


def test_without_rembg_one_line_says_how_to_do_better(monkeypatch):
    monkeypatch.setattr(matte.importlib.util, "find_spec", lambda name: None)
    cut = matte.cut_out(scene()[0], "a.png")
    assert len(cut.notes) == 1
    assert "v3d_jax[matting]" in cut.notes[0]
    assert "\n" not in cut.notes[0]
