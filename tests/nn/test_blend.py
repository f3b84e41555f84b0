"""Source pictures in frames: geometry against a plane, weights, padding and gradients."""

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from v3d_jax.nn import blend, layers, pixelnerf, resunet
from v3d_jax.ops import camera

SIDE, CELLS = 96, 12
NORMAL, OFFSET = np.asarray([0.3, -0.2, 1.0]), 3.0  # the plane n x = o of the world


def lenses(places, towards=(0.0, 0.0, 3.0)):
    """Cameras [1, n] at places in the world, which all look at one point of it."""
    position = jnp.asarray(places, jnp.float32)
    pose = camera.look_at(position, jnp.asarray(towards), jnp.asarray([0.0, -1.0, 0.0]))[None]
    count = len(places)
    intrinsics = np.tile(np.asarray([[90.0, 0, 50], [0, 95.0, 46], [0, 0, 1]]), (1, count, 1, 1))
    size = jnp.full((1, count), SIDE, jnp.int32)
    return camera.Camera(pose, jnp.asarray(intrinsics, jnp.float32), size, size)


def on_plane(lens, size):
    """Points of the plane [h, w, 3] that pixels of a camera show, and their depths."""
    pose, inverse = (np.linalg.inv(np.asarray(x[0, 0], np.float64)) for x in lens[:2])
    y, x = (np.mgrid[:size, :size] + 0.5) * SIDE / size
    ahead = np.stack([x, y, np.ones_like(x)], -1) @ inverse.T
    along, origin = ahead @ pose[:3, :3].T, pose[:3, 3]
    depth = (OFFSET - origin @ NORMAL) / (along @ NORMAL)
    return origin + depth[..., None] * along, depth


def texture(points):
    """Colours in [-1, 1] of places."""
    x, y, _ = np.moveaxis(points, -1, 0)
    waves = [np.sin(5 * x + 2 * y), np.cos(4 * y - x), np.sin(3 * x) * np.cos(6 * y)]
    return np.stack(waves, -1)


def view(lens):
    return jnp.asarray(texture(on_plane(lens, SIDE)[0]), jnp.float32)[None, None]


TARGET = lenses([[0.2, 0.1, 0.0]])
SOURCE = lenses([[-0.5, -0.2, 0.2]])
NEAR = blend.Disparity(
    *(jnp.asarray(1.0 / on_plane(x, CELLS)[1], jnp.float32)[None, None] for x in (TARGET, SOURCE))
)
ALL = jnp.ones((1, 1), bool)


def draw(seed, shape):
    return jnp.asarray(fixtures.draw(seed, shape))


def network(channels=4, **options):
    return fixtures.randomise(
        lambda: blend.Blend(channels, dtype=jnp.float32, rngs=nnx.Rngs(0)), **options
    )


def warped(views=3, k=2):
    """Random pictures, of which each pixel is seen in some."""
    shape = (2, k, views, 8, 8)
    seen = draw(1, shape) > -0.3
    pictures = jnp.where(seen[..., None], draw(2, (*shape, 3)), 0.0)
    return blend.Warped(pictures, seen, jnp.abs(draw(3, shape)) * seen, draw(6, shape) * seen)


def test_a_plane_is_shown_from_another_camera():
    found = blend.warp(view(SOURCE), SOURCE, ALL, TARGET, NEAR)
    assert found.pictures.shape == (1, 1, 1, SIDE, SIDE, 3)
    seen = np.asarray(found.seen[0, 0, 0])
    assert 0.6 < seen.mean() < 1.0
    truth, shown = np.asarray(view(TARGET)[0, 0]), np.asarray(found.pictures[0, 0, 0])

    def decibels(difference):
        return -10 * np.log10(np.mean(np.square(difference)) / 4)

    assert decibels((truth - shown)[seen]) > 35.0
    assert decibels(truth - view(SOURCE)[0, 0]) < 17.0


def test_pictures_are_empty_where_a_view_sees_nothing():
    found = blend.warp(view(SOURCE), SOURCE, ALL, TARGET, NEAR)
    unseen = ~np.asarray(found.seen)
    assert unseen.any()
    assert not np.asarray(found.pictures)[unseen].any()
    assert not np.asarray(found.turned)[unseen].any()
    assert not np.asarray(found.hidden)[unseen].any()


def test_lines_of_sight_are_apart_by_their_angle():
    found = blend.warp(view(SOURCE), SOURCE, ALL, TARGET, NEAR)
    points, _ = on_plane(TARGET, SIDE)
    ways = []
    for lens in (TARGET, SOURCE):
        way = points - np.linalg.inv(np.asarray(lens.world_to_camera[0, 0], np.float64))[:3, 3]
        ways.append(way / np.linalg.norm(way, axis=-1, keepdims=True))
    chord = np.linalg.norm(ways[0] - ways[1], axis=-1)
    seen = np.asarray(found.seen[0, 0, 0])
    np.testing.assert_allclose(np.asarray(found.turned[0, 0, 0])[seen], chord[seen], atol=1e-4)


def test_hidden_is_what_lies_behind_the_surface_of_a_view():
    seen = np.asarray(blend.warp(view(SOURCE), SOURCE, ALL, TARGET, NEAR).seen)
    for factor, wanted in ((1.0, 0.0), (1.2, np.log(1.2)), (0.9, np.log(0.9)), (9.0, 1.0)):
        near = NEAR._replace(views=factor * NEAR.views)
        found = blend.warp(view(SOURCE), SOURCE, ALL, TARGET, near).hidden
        np.testing.assert_allclose(np.asarray(found)[seen], wanted, atol=0.02)


def test_gradient_moves_disparity_to_where_pictures_agree():
    images, truth = view(SOURCE), view(TARGET)[:, :, None]

    def error(factor):
        found = blend.warp(images, SOURCE, ALL, TARGET, NEAR._replace(frames=factor * NEAR.frames))
        return jnp.sum(jnp.square(found.pictures - truth) * found.seen[..., None])

    slope = jax.jit(jax.grad(error))
    assert slope(1.05) > 0.0 > slope(0.95)
    step = 1e-3
    about = (error(1.05 + step) - error(1.05 - step)) / (2 * step)
    np.testing.assert_allclose(slope(1.05), about, rtol=0.1)


def test_new_weights_take_the_mean_of_what_is_seen():
    net = blend.Blend(4, dtype=jnp.float32, rngs=nnx.Rngs(0))
    given, frames = warped(), draw(4, (2, 2, 8, 8, 3))
    count = 1 + np.sum(given.seen, axis=2)[..., None]
    np.testing.assert_allclose(
        net(frames, given), (frames + np.sum(given.pictures, axis=2)) / count, atol=1e-6
    )


def test_order_of_views_and_views_that_see_nothing_change_nothing():
    net, frames = network(), draw(4, (2, 2, 8, 8, 3))
    given = warped()
    found = net(frames, given)
    assert np.abs(found - net(frames, jax.tree.map(lambda x: x[:, :, :1], given))).max() > 0.01
    turned = jax.tree.map(lambda x: x[:, :, ::-1], given)
    np.testing.assert_allclose(net(frames, turned), found, atol=1e-5)
    more = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x)], axis=2), given)
    np.testing.assert_allclose(net(frames, more), found, atol=1e-5)


def test_a_scene_model_finishes_frames_and_padding_reaches_nothing():
    config = pixelnerf.PixelNeRFConfig(
        encoder=resunet.ResUNetConfig(channels=4, blocks=(1, 1)), hidden=8, features=5, blend=4
    )
    net = fixtures.randomise(lambda: pixelnerf.PixelNeRF(config, rngs=nnx.Rngs(0)))
    sources = lenses([[-0.5, -0.2, 0.2], [0.4, 0.3, 0.1]])
    targets = lenses([[0.2, 0.1, 0.0], [0.1, 0.0, 0.1]])
    near = jax.tree.map(lambda x: jnp.tile(x, (1, 2, 1, 1)), NEAR)
    lost = jax.tree.map(lambda x: x.at[:, 1].set(jnp.full_like(x[:, 1], jnp.nan)), sources[:2])
    sources = camera.Camera(*lost, *sources[2:])
    images = jnp.concatenate([view(SOURCE), jnp.full((1, 1, SIDE, SIDE, 3), jnp.nan)], axis=1)
    frames = draw(5, (1, 2, SIDE, SIDE, 3))
    views = pixelnerf.Views(images, sources, jnp.asarray([[True, False]]))

    def finished(near, views):
        return net.finish(frames, views, targets, near)

    alone = jax.tree.map(lambda x: x[:, :1], views)
    found = finished(near, views)
    one = near._replace(views=near.views[:, :1])
    np.testing.assert_allclose(found, finished(one, alone), atol=1e-5)
    assert np.abs(found - frames).max() > 0.1
    first = jax.tree.map(lambda x: x[:, :1], targets)
    shown = net.finish(frames[:, :1], views, first, near._replace(frames=near.frames[:, :1]))
    np.testing.assert_allclose(shown, found[:, :1], atol=1e-5)
    slope = jax.grad(lambda near: jnp.sum(jnp.square(finished(near, views))))(near)
    for leaf in slope:
        assert np.isfinite(leaf).all()
        assert np.any(leaf)
    assert not np.any(slope.views[:, 1])


def test_without_it_frames_stay_as_they_are():
    net = pixelnerf.PixelNeRF(
        pixelnerf.PixelNeRFConfig(encoder=resunet.ResUNetConfig(channels=4, blocks=(1, 1))),
        rngs=nnx.Rngs(0),
    )
    frames = draw(5, (1, 1, SIDE, SIDE, 3))
    views = pixelnerf.Views(view(SOURCE), SOURCE, ALL)
    assert net.finish(frames, views, TARGET, NEAR) is frames


@pytest.mark.parametrize("step", [1, 2, 4])
def test_taps_apart_are_a_dilated_convolution_with_its_gradients(step):
    conv = layers.conv(6, 5, dtype=jnp.float32, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(conv)
    shapes = ((2, 3, 16, 24, 6), (2, 3, 16, 24, 5))
    x, weight = (jnp.asarray(fixtures.draw(k, shape)) for k, shape in enumerate(shapes))

    def apart(params, x):
        return blend.taps_apart(nnx.merge(graphdef, params), x, step)

    def dilated(params, x):
        merged = nnx.merge(graphdef, params)
        found = jax.lax.conv_general_dilated(
            x.reshape(6, 16, 24, 6),
            merged.kernel[...],
            (1, 1),
            [(step, step)] * 2,
            rhs_dilation=(step, step),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return found.reshape(weight.shape) + merged.bias[...].reshape(1, 1, 1, 1, -1)

    def value_and_slopes(function):
        def total(params, x):
            return jnp.sum(weight * function(params, x))

        slopes = jax.grad(total, (0, 1))(params, x)
        return [function(params, x), *jax.tree.leaves(slopes)]

    for got, wanted in zip(value_and_slopes(apart), value_and_slopes(dilated), strict=True):
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(got, wanted, atol=1e-4)
