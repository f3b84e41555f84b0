import io

import numpy as np
import pytest
from PIL import Image

from v3d_jax.data import png


@pytest.mark.parametrize("shape", [(1, 1, 3), (7, 5, 4), (32, 33, 3), (16, 16, 4)])
def test_pillow_reads_back_every_bit(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with Image.open(io.BytesIO(png.encode(image))) as decoded:
        decoded.load()
        np.testing.assert_array_equal(np.asarray(decoded), image)


def test_views_with_strides_are_encoded():
    image = np.random.default_rng(1).integers(0, 256, (8, 12, 4), dtype=np.uint8)
    np.testing.assert_array_equal(png.decode(png.encode(image[::-1, ::2])), image[::-1, ::2])


@pytest.mark.parametrize("shape", [(4, 4, 2), (0, 4, 4), (4, 0, 3)])
def test_what_is_no_rgb_image_is_refused(shape):
    with pytest.raises(ValueError, match="cannot be a PNG"):
        png.encode(np.zeros(shape, np.uint8))


def test_white_shows_through_transparent_pixels_by_alpha():
    image = np.random.default_rng(2).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    alpha = image[..., 3:] / 255.0
    exact = alpha * image[..., :3] + (1.0 - alpha) * 255.0
    blended = png.decode_on_white(png.encode(image))
    assert np.abs(blended - exact).max() <= 0.5 + 1e-9
    clear = np.zeros((4, 4, 4), np.uint8)
    assert (png.decode_on_white(png.encode(clear)) == 255).all()


def test_pictures_without_alpha_are_opaque():
    image = np.random.default_rng(3).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    data = png.encode(image)
    np.testing.assert_array_equal(png.decode_on_white(data), image)
    assert (png.decode(data)[..., 3] == 255).all()
