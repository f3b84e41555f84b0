import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax import errors
from v3d_jax.ops import camera
from v3d_jax.sdf import targets
from v3d_jax.sdf.targets import Targets

VIEWS, HEIGHT, WIDTH = 3, 20, 40


@pytest.fixture(scope="module")
def seen():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(VIEWS, HEIGHT, WIDTH, 3), dtype=np.uint8)
    alpha = np.zeros((VIEWS, HEIGHT, WIDTH), bool)
    alpha[0, 5:9, 10:20] = True
    alpha[2, 0:3, 0:2] = True
    cameras = camera.orbit(VIEWS, width=WIDTH, height=HEIGHT)
    return Targets(jnp.asarray(images), jnp.asarray(alpha), cameras)


def test_pixels_around_the_object_come_first(seen):
    found = jax.jit(targets.with_pixels)(seen)
    assert sorted(np.asarray(found.pixels)) == list(range(VIEWS * HEIGHT * WIDTH))
    near = np.zeros((VIEWS, HEIGHT, WIDTH), bool)
    near[0, 4:10, 9:21] = True
    near[2, 0:4, 0:3] = True
    first = np.asarray(found.pixels[: int(found.around)])
    np.testing.assert_array_equal(first, np.flatnonzero(near))


def test_rays_go_around_the_object_and_elsewhere(seen, key):
    found = targets.with_pixels(seen)
    view, pixels = targets.draw(key, found, 1000, 0.75)
    assert view.shape == (1000,)
    places = np.floor(np.asarray(pixels)).astype(int)
    np.testing.assert_array_equal(pixels, places + 0.5)
    near = np.isin(
        (np.asarray(view) * HEIGHT + places[:, 1]) * WIDTH + places[:, 0],
        np.asarray(found.pixels[: int(found.around)]),
    )
    assert near[:750].all()
    assert near[750:].mean() < 0.15
    assert set(np.asarray(view[750:])) == {0, 1, 2}


def test_without_masks_or_with_empty_ones_rays_go_everywhere(seen, key):
    for alpha in (None, jnp.zeros_like(seen.alpha)):
        found = targets.with_pixels(seen._replace(alpha=alpha))
        view, _ = targets.draw(key, found, 300, 0.8)
        assert set(np.asarray(view)) == {0, 1, 2}


def test_frames_are_composited(seen):
    back = jnp.asarray([0.2, 0.4, 0.6])
    view = jnp.asarray([0, 0, 2], jnp.int32)
    pixels = jnp.asarray([[12.5, 6.5], [0.5, 0.5], [1.5, 2.5]])
    straight = np.asarray(seen.images)[[0, 0, 2], [6, 0, 2], [12, 0, 1]] / 255.0
    found = targets.look(seen, view, pixels, back)
    wanted = np.where([[True], [False], [True]], straight, back)
    np.testing.assert_allclose(found.color, wanted, atol=1e-6)
    np.testing.assert_array_equal(found.alpha, [1.0, 0.0, 1.0])
    assert found.normal is None
    half = seen._replace(alpha=jnp.full(seen.alpha.shape, 51, jnp.uint8))
    found = targets.look(half, view, pixels, back)
    np.testing.assert_allclose(found.color, 0.2 * straight + 0.8 * np.asarray(back), atol=1e-6)
    opaque = targets.look(seen._replace(alpha=None), view, pixels, back)
    np.testing.assert_allclose(opaque.color, straight, atol=1e-6)
    np.testing.assert_array_equal(opaque.alpha, 1.0)


def test_patches_are_squares_inside_the_frame(seen):
    found = targets.with_pixels(seen)
    draw = jax.jit(lambda key: targets.draw_patch(key, found, 8))
    for seed in range(20):
        view, pixels = draw(jax.random.key(seed))
        assert len(set(np.asarray(view))) == 1
        pixels = np.asarray(pixels).reshape(8, 8, 2)
        np.testing.assert_array_equal(pixels[:, :, 0], np.tile(pixels[:1, :, 0], (8, 1)))
        np.testing.assert_array_equal(pixels - pixels[0, 0], np.mgrid[:8, :8].T)
        assert pixels.min() >= 0.5
        assert pixels[..., 0].max() < WIDTH
        assert pixels[..., 1].max() < HEIGHT


def test_bad_frames_are_named(seen):
    broken = seen.images.astype(jnp.float32).at[1, 2, 3, 0].set(jnp.nan)
    hollow = seen.alpha.astype(jnp.float32).at[0, 0, 0].set(jnp.inf)
    one = jax.tree.map(lambda leaf: leaf[:1], seen)
    for bad, said in (
        (seen._replace(images=broken), "not numbers"),
        (seen._replace(alpha=hollow), "not numbers"),
        (seen._replace(alpha=jnp.zeros_like(seen.alpha)), "masks are empty"),
        (one, "different sides"),
    ):
        with pytest.raises(errors.UserError, match=said) as caught:
            targets.check(bad)
        assert "\n" not in str(caught.value)
    targets.check(seen)
    targets.check(seen._replace(alpha=None))
