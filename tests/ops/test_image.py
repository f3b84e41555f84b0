import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from v3d_jax.ops import image


@pytest.mark.parametrize("size", [(13, 17), (80, 65), (40, 10)])
@pytest.mark.parametrize(
    ("method", "filter"),
    [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)],
)
def test_resize_equals_pillow(size, method, filter):
    x = np.random.default_rng(0).random((40, 30)).astype(np.float32)
    expected = np.asarray(Image.fromarray(x).resize(size[::-1], filter))
    got = image.resize(jnp.asarray(x)[None, None, :, :, None], size, method)
    np.testing.assert_allclose(got[0, 0, :, :, 0], expected, atol=2e-6)


def test_nearest_keeps_values():
    x = jnp.asarray([[0.0, 1.0], [2.0, 3.0]])[..., None]
    got = image.resize(x, (4, 4), "nearest")[..., 0]
    np.testing.assert_array_equal(got, np.kron(np.asarray(x[..., 0]), np.ones((2, 2))))


def test_composite():
    rgba = jnp.asarray([[[1.0, 0.5, 0.0, 0.25]]])
    np.testing.assert_allclose(image.composite(rgba)[0, 0], [1.0, 0.875, 0.75])
    over = image.composite(rgba, jnp.asarray([0.0, 1.0, 0.0]))
    np.testing.assert_allclose(over[0, 0], [0.25, 0.875, 0.0])


def test_ranges():
    x = jnp.linspace(0.0, 1.0, 5)
    np.testing.assert_allclose(image.to_network(x), np.linspace(-1, 1, 5))
    np.testing.assert_allclose(image.from_network(image.to_network(x)), x)
    np.testing.assert_array_equal(image.from_network(jnp.asarray([-3.0, 3.0])), [0.0, 1.0])


def test_clip_blur_is_that_of_512_pixels():
    blur = image._blur_matrix(512, 512 / 224)
    np.testing.assert_allclose(blur[100, 99:102], [0.186809, 0.626383, 0.186809], atol=1e-6)
    # Reflection without repeating the border pixel.
    np.testing.assert_allclose(blur[0, :2], [0.626383, 2 * 0.186809], atol=1e-6)
    np.testing.assert_allclose(blur[-1, -2:], [2 * 0.186809, 0.626383], atol=1e-6)


def test_clip_cubic_joins_corners_and_reproduces_lines():
    matrix = image._cubic_matrix(100, 23)
    np.testing.assert_allclose(matrix[[0, -1]], np.eye(100)[[0, -1]], atol=1e-12)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0)
    half = image._cubic_matrix(8, 15)[5]
    # Keys' kernel at 1.5, 0.5, 0.5, 1.5 for a = -0.75.
    np.testing.assert_allclose(half[1:5], [-0.09375, 0.59375, 0.59375, -0.09375])


def test_clip_resize_of_two_axes():
    x = jax.random.uniform(jax.random.key(0), (1, 300, 240, 3))
    got = image.clip_resize(x, 224)
    rows = image._cubic_matrix(300, 224) @ image._blur_matrix(300, 300 / 224)
    columns = image._cubic_matrix(240, 224) @ image._blur_matrix(240, 240 / 224)
    for channel in range(3):
        expected = rows @ np.asarray(x[0, :, :, channel], np.float64) @ columns.T
        np.testing.assert_allclose(got[0, :, :, channel], expected, atol=1e-5)


def test_clip_resize_does_not_blur_when_enlarging():
    x = jax.random.uniform(jax.random.key(0), (1, 5, 9, 2))
    np.testing.assert_allclose(image.clip_resize(x, 9)[:, ::2], x, atol=1e-6)


def test_clip_resize_of_a_sliver_is_an_error():
    with pytest.raises(ValueError, match="too short"):
        image.clip_resize(jnp.zeros((1, 1, 500, 3)), 224)
