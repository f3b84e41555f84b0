"""The hand-written gradients against those of the definitions, and what they keep."""

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.ops import normalize

EPS = 1e-5


def plain_group_norm(x, scale, bias, groups, over_frames, silu):
    split = x.reshape(*x.shape[:-1], groups, -1)
    axes = (1, 2, 3, 5) if over_frames else (2, 3, 5)
    mean = jnp.mean(split, axes, keepdims=True)
    variance = jnp.mean((split - mean) ** 2, axes, keepdims=True)
    y = ((split - mean) / jnp.sqrt(variance + EPS)).reshape(x.shape)
    y = y * scale.reshape(1, 1, 1, 1, -1) + bias.reshape(1, 1, 1, 1, -1)
    return y / (1 + jnp.exp(-y)) if silu else y


def plain_layer_norm(x, scale, bias):
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    y = centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + EPS)
    return y * scale.reshape(1, 1, -1) + bias.reshape(1, 1, -1)


def arguments(*shape):
    rng = np.random.default_rng(0)
    offset = 20.0 * rng.standard_normal((shape[0],) + (1,) * (len(shape) - 2) + shape[-1:])
    x = rng.standard_normal(shape) + offset
    scale, bias = np.linspace(0.5, 2.0, shape[-1]), np.linspace(-1.0, 1.0, shape[-1])
    return [jnp.asarray(a, jnp.float32) for a in (x, scale, bias)]


def assert_same(got, expected, args):
    cotangent = jax.random.normal(jax.random.key(1), args[0].shape)

    def both(norm):
        def run(*args):
            value, pullback = jax.vjp(norm, *args)
            return value, pullback(cotangent)

        return fixtures.jit(run)(*args)

    (a, pulled_a), (b, pulled_b) = both(got), both(expected)
    np.testing.assert_allclose(a, b, atol=5e-5)
    for x, y in zip(pulled_a, pulled_b, strict=True):
        assert np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(y)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("over_frames", [False, True])
def test_group_norm_has_the_gradients_of_its_definition(over_frames, silu):
    assert_same(
        lambda *a: normalize.group_norm(*a, 4, EPS, over_frames, silu),
        lambda *a: plain_group_norm(*a, 4, over_frames, silu),
        arguments(2, 3, 4, 5, 16),
    )


def test_layer_norm_has_the_gradients_of_its_definition():
    assert_same(lambda *a: normalize.layer_norm(*a, EPS), plain_layer_norm, arguments(3, 7, 12))


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (lambda *a: normalize.group_norm(*a, 4, EPS, False, True), (2, 3, 8, 8, 16)),
        (lambda *a: normalize.layer_norm(*a, EPS), (6, 64, 16)),
    ],
)
def test_only_the_input_is_kept_of_its_size(norm, shape):
    x, scale, bias = arguments(*shape)
    x = x.astype(jnp.bfloat16)
    y, pullback = jax.vjp(norm, x, scale, bias)
    assert y.dtype == jnp.bfloat16
    kept = [leaf for leaf in jax.tree.leaves(pullback) if leaf.size == x.size]
    assert [leaf.dtype for leaf in kept] == [jnp.bfloat16]
    assert pullback(y)[0].dtype == jnp.bfloat16
