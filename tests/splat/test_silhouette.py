"""Masks on white against connected components, distances against scipy's transform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from v3d_jax.splat import silhouette


def blobs(seed, shape=(40, 56), share=0.5):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 3)
    return noise > np.quantile(noise, 1.0 - share)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9])
def test_signed_distance_is_the_euclidean_one(share):
    mask, reach = blobs(1, share=share), 7
    told = silhouette.signed_distance(jnp.asarray(mask), reach)
    inside, outside = (ndimage.distance_transform_edt(m) for m in (mask, ~mask))
    expected = np.where(mask, inside - 0.5, 0.5 - outside)
    assert (np.abs(expected) > reach).any()  # the cut is part of the test
    np.testing.assert_allclose(told, np.clip(expected, -reach, reach), atol=1e-5)


def test_masks_without_an_outline_are_as_far_as_can_be():
    for value in (False, True):
        told = silhouette.signed_distance(jnp.full((9, 12), value), 5)
        np.testing.assert_array_equal(told, 5.0 if value else -5.0)


def outside_of(white):
    """White that 4-connects to the border, by scipy's labels."""
    labels, _ = ndimage.label(white)
    border = np.concatenate([labels[[0, -1]].ravel(), labels[:, [0, -1]].ravel()])
    return white & np.isin(labels, border[border > 0])


@pytest.mark.parametrize("seed", range(4))
def test_background_is_what_joins_the_border(seed):
    white = blobs(seed, share=0.5)
    image = np.where(white, 1.0, 0.3)[None, ..., None].repeat(3, -1).astype(np.float32)
    told = np.asarray(silhouette.from_white(jnp.asarray(image)))[0]
    expected = ~outside_of(white)
    assert expected.any()
    np.testing.assert_array_equal(told, expected)


def test_background_winds_its_way_in():
    """A spiral, whose every turn takes one sweep more."""
    white = np.zeros((33, 33), bool)
    row, column, turn = 0, 0, 0
    lengths = [32, 32, 32, 30, 30, 28, 28, 26, 26, 24, 24, 22, 22, 20, 20, 18, 18]
    steps = [(0, 1), (1, 0), (0, -1), (-1, 0)]
    for turn, length in enumerate(lengths):
        for _ in range(length):
            white[row, column] = True
            row, column = row + steps[turn % 4][0], column + steps[turn % 4][1]
    white[1:-1, 0] = white[0, :] = white[:, -1] = white[-1, :] = False
    white[0, 5] = white[1, 5] = True
    image = np.where(white, 255, 0)[None, ..., None].repeat(3, -1).astype(np.uint8)
    told = np.asarray(silhouette.from_white(jnp.asarray(image)))[0]
    np.testing.assert_array_equal(told, ~outside_of(white))


@pytest.fixture
def frame():
    """A blue disc with a white highlight on noisy white, 8 bits."""
    y, x = np.mgrid[:48, :48] - 23.5
    disc, highlight = np.hypot(x, y) < 16, np.hypot(x - 5, y + 4) < 4
    noise = np.random.default_rng(0).integers(245, 256, (48, 48, 3))
    frame = np.where((disc & ~highlight)[..., None], (40, 60, 200), noise)
    return frame.astype(np.uint8), disc, highlight


def test_highlights_are_object_unless_asked(frame):
    image, disc, highlight = frame
    masks = silhouette.from_white(jnp.asarray(image)[None])
    np.testing.assert_array_equal(masks[0], disc)
    masks = silhouette.from_white(jnp.asarray(image)[None], open_holes=True)
    np.testing.assert_array_equal(masks[0], disc & ~highlight)
    masks = silhouette.from_white(jnp.asarray(image)[None], tolerance=0.01)
    assert masks[0].sum() > disc.sum() + 500  # the noise counts now


def test_frames_may_be_bytes_or_floats(frame):
    bytes_ = jnp.asarray(frame[0])[None]
    compiled = jax.jit(silhouette.from_white)
    np.testing.assert_array_equal(compiled(bytes_), compiled(bytes_ / jnp.float32(255)))
