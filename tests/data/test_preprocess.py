import numpy as np
import pytest
from PIL import Image

from v3d_jax import errors
from v3d_jax.data import preprocess


def rectangle(canvas=(100, 160), box=(20, 30, 60, 50), colour=(10, 200, 30), alpha=255):
    """RGBA; `box` is top, left, bottom, right, exclusive."""
    rgba = np.zeros((*canvas, 4), np.uint8)
    rgba[..., :3] = 77  # hidden colour that must never show
    rgba[box[0] : box[2], box[1] : box[3]] = (*colour, alpha)
    return rgba


def bounds(mask):
    rows, columns = np.nonzero(mask)
    return rows.min(), columns.min(), rows.max() + 1, columns.max() + 1


def test_object_fills_the_middle_of_the_longer_side():
    out = preprocess.recentre(rectangle(), 0.3)
    assert out.shape == (160, 160, 4)
    # Bounding box without its last row and column: 39 x 19; int(160 * 0.7) = 112 high.
    top, left, bottom, right = bounds(out[..., 3] > 0)
    assert (bottom - top, right - left) == (112, int(19 * 112 / 39))
    assert (top, left) == ((160 - 112) // 2, (160 - 54) // 2)
    np.testing.assert_array_equal(out[80, 80], (10, 200, 30, 255))


def test_hidden_colours_do_not_bleed_into_the_edge():
    rgba = rectangle(canvas=(400, 400), box=(100, 100, 301, 301), colour=(250, 250, 250))
    rgba[150:152, 100:300] = (0, 0, 0, 0)
    out = preprocess.recentre(rgba, 0.8)
    assert (out[out[..., 3] > 0][:, :3] >= 249).all()


def test_soft_edges_are_multiplied_by_alpha_once():
    """Grey 200 at half alpha on white is 227; the release's second multiplication gives 177."""
    rgba = rectangle(colour=(200, 200, 200), alpha=128)
    assert preprocess.on_white(rgba)[40, 40, 0] == int(200 * 128 / 255 + 127)
    assert preprocess.on_white(rgba)[0, 0, 0] == 255


def test_prepared_picture(tmp_path):
    path = tmp_path / "object.png"
    Image.fromarray(rectangle()).save(path)
    prepared = preprocess.prepare(path, 64)
    assert prepared.rgba.shape == (64, 64, 4)
    assert prepared.image.shape == (64, 64, 3)
    assert prepared.notes == ()
    np.testing.assert_array_equal(prepared.image[0, 0], 255)
    np.testing.assert_allclose(prepared.image[32, 32], (10, 200, 30), atol=1)
    alone = preprocess.on_white(prepared.rgba).astype(int)
    assert np.abs(alone - prepared.image).mean() < 0.5
    again = preprocess.prepare(str(path), 64)
    np.testing.assert_array_equal(again.image, prepared.image)


def test_opaque_picture_is_cut_out_with_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess.matte.importlib.util, "find_spec", lambda name: None)
    path = tmp_path / "photo.jpg"
    pixels = np.full((120, 90, 3), 235, np.uint8)
    pixels[30:90, 30:60] = (160, 40, 30)
    Image.fromarray(pixels).save(path, quality=95)
    prepared = preprocess.prepare(path, 64)
    assert len(prepared.notes) == 1
    top, left, bottom, right = bounds(prepared.rgba[..., 3] > 127)
    assert bottom - top == pytest.approx(0.7 * 64, abs=2)
    assert right - left == pytest.approx(0.35 * 64, abs=2)
    np.testing.assert_allclose(prepared.image[32, 32], (160, 40, 30), atol=8)
    np.testing.assert_array_equal(prepared.image[2, 2], 255)


@pytest.mark.parametrize("box", [(40, 40, 41, 41), (0, 0, 100, 1), (50, 10, 51, 150)])
def test_one_pixel_wide_objects_survive(box):
    out = preprocess.recentre(rectangle(box=box), 0.3)
    assert out[..., 3].max() == 255


def test_empty_alpha_is_refused(tmp_path):
    path = tmp_path / "nothing.png"
    Image.fromarray(rectangle(alpha=0)).save(path)
    with pytest.raises(errors.UserError, match="transparent everywhere"):
        preprocess.prepare(path, 64)


def test_area_resizing_conserves_the_mean_and_repeats_pixels_when_growing():
    image = np.random.default_rng(0).random((12, 15, 2)).astype(np.float32)
    for size in ((5, 7), (12, 4), (36, 45)):
        out = preprocess.resize_area(image, size)
        assert out.shape == (*size, 2)
        np.testing.assert_allclose(out.mean((0, 1)), image.mean((0, 1)), atol=1e-6)
    tripled = image.repeat(3, axis=0).repeat(3, axis=1)
    np.testing.assert_allclose(preprocess.resize_area(image, (36, 45)), tripled, atol=1e-6)
    blocks = image.reshape(4, 3, 5, 3, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(preprocess.resize_area(image, (4, 5)), blocks, atol=1e-6)


@pytest.mark.parametrize("border", [-0.1, 1.0])
def test_border_out_of_range(border):
    with pytest.raises(ValueError, match="fraction"):
        preprocess.prepare(Image.fromarray(rectangle()), 64, border)
