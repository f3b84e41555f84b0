import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.ops import rays, view_moments

CLIPS, VIEWS, HEIGHT, WIDTH, CHANNELS, POINTS = 2, 4, 5, 7, 3, 40


def inputs():
    """Features, places in the maps and beyond their borders, and which of them are seen."""
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((CLIPS, VIEWS, HEIGHT, WIDTH, CHANNELS)).astype(np.float32)
    pixels = rng.uniform(-1, 8, (CLIPS, VIEWS, POINTS, 2)).astype(np.float32)
    seen = rng.uniform(size=(CLIPS, VIEWS, POINTS)) < 0.6
    seen[:, :, 0], seen[:, :, 1] = False, np.arange(VIEWS) == 2
    return jnp.asarray(maps), jnp.asarray(pixels), jnp.asarray(seen)


def plain(maps, pixels, seen):
    """Look-ups of every view, then masked means."""
    values = jax.vmap(jax.vmap(rays.bilinear))(maps, pixels)
    there = seen[..., None]
    count = jnp.sum(there, 1)
    mean = jnp.sum(jnp.where(there, values, 0.0), 1) / jnp.maximum(count, 1)
    off = jnp.where(there, values - mean[:, None], 0.0)
    variance = jnp.sum(off**2, 1) / jnp.maximum(count - 1, 1)
    return mean, jnp.where(count > 1, jnp.sqrt(jnp.where(count > 1, variance, 1.0)), 0.0)


def test_moments_are_numpys_over_the_views_that_see():
    maps, pixels, seen = inputs()
    found = fixtures.jit(view_moments.moments)(maps, maps, pixels, seen)
    values = np.asarray(jax.vmap(jax.vmap(rays.bilinear))(maps, pixels))
    for clip, point in np.ndindex(CLIPS, POINTS):
        there = values[clip, np.asarray(seen)[clip, :, point], point]
        mean = there.mean(0) if len(there) else np.zeros(CHANNELS)
        deviation = there.std(0, ddof=1) if len(there) > 1 else np.zeros(CHANNELS)
        np.testing.assert_allclose(found.mean[clip, point], mean, atol=1e-6)
        np.testing.assert_allclose(found.deviation[clip, point], deviation, atol=1e-6)


def test_gradients_of_maps_and_places_are_those_of_plain_look_ups():
    maps, pixels, seen = inputs()
    weights = [fixtures.draw(k, (CLIPS, POINTS, CHANNELS)) for k in (1, 2)]

    def total(function):
        def loss(maps, pixels):
            found = function(maps, pixels)
            return sum(jnp.sum(w * x) for w, x in zip(weights, found, strict=True))

        return fixtures.jit(jax.grad(loss, (0, 1)))

    expected = total(lambda maps, pixels: plain(maps, pixels, seen))(maps, pixels)
    found = total(lambda maps, pixels: view_moments.moments(maps, maps, pixels, seen))(maps, pixels)
    for got, wanted in zip(found, expected, strict=True):
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_views_that_see_nothing_may_hold_anything():
    maps, pixels, seen = inputs()
    seen = seen.at[:, 3].set(False)
    empty = maps.at[:, 3].set(jnp.nan)

    def loss(maps, pixels):
        found = view_moments.moments(maps, maps, pixels, seen)
        return jnp.sum(found.mean) + jnp.sum(found.deviation)

    grad = fixtures.jit(jax.value_and_grad(loss, (0, 1)))
    value, slopes = grad(empty, pixels)
    expected, wanted = grad(maps, pixels)
    assert value == expected
    jax.tree.map(np.testing.assert_array_equal, slopes, wanted)
    assert not np.any(slopes[0][:, 3])


def test_views_that_agree_have_a_gradient():
    _, pixels, seen = inputs()
    maps = jnp.ones((CLIPS, VIEWS, HEIGHT, WIDTH, CHANNELS))
    slope = jax.grad(lambda maps: jnp.sum(view_moments.moments(maps, maps, pixels, seen).deviation))
    assert np.isfinite(fixtures.jit(slope)(maps)).all()


def test_rounding_between_views_that_agree_has_no_gradient():
    _, pixels, seen = inputs()
    maps = np.ones((CLIPS, VIEWS, HEIGHT, WIDTH, CHANNELS), np.float32)
    maps[:, ::2] = np.nextafter(np.float32(1.0), np.float32(2.0))

    def slopes(maps):
        return jax.grad(lambda x: jnp.sum(view_moments.moments(x, x, pixels, seen).deviation))(maps)

    found = fixtures.jit(slopes)(jnp.asarray(maps))
    assert 0.0 < np.abs(found).max() < 1e-3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_many_points_have_for_a_cell_adds_up(dtype):
    """In 16 bits a sum of ones ends at 256."""
    points = 3000
    maps = jnp.zeros((1, 1, 2, 2, 1), dtype)
    pixels = jnp.full((1, 1, points, 2), 0.5)  # the first cell's centre
    seen = jnp.ones((1, 1, points), bool)

    def loss(maps):
        found = view_moments.moments(maps, maps.astype(jnp.float32), pixels, seen)
        return jnp.sum(found.mean)

    slope = fixtures.jit(jax.grad(loss))(maps)
    assert slope.dtype == dtype
    np.testing.assert_array_equal(slope.ravel(), np.asarray([points, 0, 0, 0], dtype))
