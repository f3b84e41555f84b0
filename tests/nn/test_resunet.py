"""The feature network: its stored output, size, and statistics over valid images only."""

import dataclasses

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from v3d_jax.nn import resunet
from v3d_jax.weights import keymap

SMALL = resunet.ResUNetConfig(channels=4, blocks=(2, 1))


def rules(config):
    """The key map of the release's module, which names its encoder as torchvision does."""

    def unit(source, conv, norm, target, bias=False):
        return [
            *keymap.layer(f"{source}{conv}", f"{target}.conv", keymap.CONV, bias=bias),
            *keymap.norm(f"{source}{norm}", f"{target}.norm"),
        ]

    found = unit("", "conv1", "bn1", "stem")
    for level, count in enumerate(config.blocks):
        for block in range(count):
            source, target = f"layer{level + 1}.{block}.", f"levels.{level}.{block}"
            found += unit(source, "conv1", "bn1", f"{target}.unit1")
            found += unit(source, "conv2", "bn2", f"{target}.unit2")
            if block == 0:
                found += unit(source, "downsample.0", "downsample.1", f"{target}.shortcut")
    for level in range(len(config.blocks) - 1):
        deeper = level + 2
        found += unit(f"upconv{deeper}.conv.", "conv", "bn", f"up.{level}", bias=True)
        found += unit(f"iconv{deeper}.", "conv", "bn", f"merge.{level}", bias=True)
    return [*found, *keymap.layer("out_conv", "conv_out", keymap.CONV)]


def create(config, dtype=jnp.float32):
    return lambda: resunet.ResUNet(config, dtype=dtype, rngs=nnx.Rngs(0))


@pytest.mark.golden
def test_equals_the_published_network():
    config = resunet.ResUNetConfig()
    graphdef, params = fixtures.build(create(config), rules(config))
    images = fixtures.channels_last(fixtures.draw(11, (2, 3, 64, 64)), clips=1)
    out = fixtures.forward(graphdef)(params, images)
    assert out.shape == (1, 2, 16, 16, 64)
    expected = fixtures.Summary(
        -0.001207,
        0.808228,
        0.638395,
        (1.3773, -0.65583, -0.0528, 0.81406),
        (0.27469, -0.31956, -0.40733),
    )
    fixtures.assert_summary(out, expected)


def test_full_size_has_the_published_parameters():
    params = nnx.state(nnx.eval_shape(create(resunet.ResUNetConfig())))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 8_917_120


@pytest.fixture(scope="module")
def small():
    graphdef, params = fixtures.build(create(SMALL), rules(SMALL))
    return fixtures.forward(graphdef), graphdef, params


def clips(views, seed=0, size=32):
    return jnp.asarray(fixtures.draw(seed, (2, views, size, size, 3)))


def test_images_that_are_not_valid_change_nothing(small):
    """Neither to the bit whatever they hold, nor as against not being there."""
    run, _, params = small
    images = clips(2)
    alone = run(params, images)
    valid = jnp.asarray([[True, False, True, False]] * 2)
    padded = []
    for garbage in (jnp.full_like(images, jnp.nan), 1e3 * clips(2, seed=1)):
        mixed = jnp.stack([images, garbage], axis=2).reshape(2, 4, *images.shape[2:])
        padded.append(run(params, mixed, valid)[:, ::2])
    np.testing.assert_array_equal(*padded)
    np.testing.assert_allclose(padded[0], alone, atol=2e-5)
    counted = run(params, mixed, jnp.ones((2, 4), bool))[:, ::2]
    assert np.abs(counted - alone).max() > 0.1


def test_order_of_images_changes_nothing_else(small):
    run, _, params = small
    images = clips(3)
    order = np.asarray([2, 0, 1])
    np.testing.assert_allclose(
        run(params, images[:, order]), run(params, images)[:, order], atol=2e-5
    )


def test_norms_use_the_statistics_of_the_images_at_hand(small):
    """Brightness and contrast of all images together make no difference, those of one do."""
    run, _, params = small
    images = clips(2)
    out = run(params, images)
    np.testing.assert_allclose(run(params, 3.0 * images + 1.0), out, atol=1e-3)
    assert np.abs(run(params, images.at[0, 0].multiply(3.0))[1] - out[1]).max() > 0.01


def test_with_layer_norms_an_image_has_its_features_whatever_is_beside_it():
    config = dataclasses.replace(SMALL, norm="layer")
    graphdef, params = fixtures.build(create(config), rules(config))
    run = fixtures.forward(graphdef)
    images = clips(2)
    out = run(params, images)
    np.testing.assert_allclose(run(params, images[:1, 1:])[0, 0], out[0, 1], atol=2e-5)
    beside = jnp.concatenate([images, jnp.full_like(images, jnp.nan)], axis=1)
    valid = jnp.asarray([[True, True, False, False]] * 2)
    np.testing.assert_allclose(run(params, beside, valid)[:, :2], out, atol=2e-5)
    assert out.std() > 0.05


def test_gradients_beside_padding_follow_finite_differences(small):
    _, graphdef, params = small
    images, weight = clips(2), jnp.asarray(fixtures.draw(5, (2, 2, 8, 8, 4)))
    padded = jnp.concatenate([images, jnp.full_like(images, jnp.nan)], axis=1)
    valid = jnp.asarray([[True, True, False, False]] * 2)

    def loss(params):
        out = nnx.merge(graphdef, params)(padded, valid)[:, :2]
        return jnp.sum(weight * out) / 100.0

    both = fixtures.jit(jax.value_and_grad(loss))
    _, grads = both(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    # Along the gradient itself, by central differences.
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
    step = lambda size: jax.tree.map(lambda x, g: x + size * g / norm, params, grads)  # noqa: E731
    up, down = (both(step(size))[0] for size in (2e-3, -2e-3))
    np.testing.assert_allclose((up - down) / 4e-3, norm, rtol=0.02)


def distance(tree, other):
    """Norm of the difference of two trees over the norm of the second."""
    ours, theirs = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(x)]) for x in (tree, other)
    )
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def test_bfloat16_activations_keep_float32_parameters(small):
    run, _, params = small
    graphdef, abstract = nnx.split(nnx.eval_shape(create(SMALL, jnp.bfloat16)))
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {jnp.dtype(jnp.float32)}
    out = fixtures.forward(graphdef)(params, clips(2))
    assert out.dtype == jnp.bfloat16
    want = run(params, clips(2))
    assert distance(out.astype(jnp.float32), want) < 0.05


def test_doubling_joins_corners():
    x = jnp.asarray([[0.0, 1.0, 4.0]]).reshape(1, 1, 1, 3, 1)
    found = resunet.double(x)
    assert found.shape == (1, 1, 2, 6, 1)
    want = np.interp(np.linspace(0, 2, 6), np.arange(3), [0.0, 1.0, 4.0])
    np.testing.assert_allclose(found[0, 0, :, :, 0], [want, want], atol=1e-6)


@pytest.mark.parametrize("size", [8, 20])
def test_refuses_images_that_do_not_halve(size):
    with pytest.raises(ValueError, match="not multiples of 8, 16 or more"):
        jax.eval_shape(lambda x: create(SMALL)()(x), clips(1, size=size))
