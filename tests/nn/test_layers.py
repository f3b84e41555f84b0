"""Layers against slow NumPy twins and stored sinusoids."""

import fixtures
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from flax import nnx

from v3d_jax.nn import layers


@pytest.mark.golden
@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (300.0, [-0.0221, -0.9089, 0.9995, -0.9998, 0.4170, 0.0322]),
        (1.0, [0.54030, 0.59738, 1.0, 0.84147, 0.80196, 1.0746e-4]),
        (0.02, [0.99980, 0.99983, 1.0, 0.019999, 0.018610, 2.1492e-6]),
    ],
)
def test_sinusoid_is_the_published_one(t, expected):
    values = layers.sinusoid(jnp.asarray([t]), 256)[0]
    np.testing.assert_allclose(values[jnp.asarray([0, 1, 127, 128, 129, 255])], expected, atol=6e-5)


def test_sinusoid_has_cosines_first_and_stays_float32():
    values = layers.sinusoid(jnp.zeros((2, 3), jnp.bfloat16), 8)
    assert values.dtype == jnp.float32
    np.testing.assert_array_equal(values, np.broadcast_to([1.0] * 4 + [0.0] * 4, (2, 3, 8)))
    with pytest.raises(ValueError, match="even"):
        layers.sinusoid(jnp.zeros(1), 7)


def group_norm_twin(x, scale, bias, eps, over_frames, count=32):
    b, t, h, w, c = x.shape
    groups = np.asarray(x, np.float64).reshape(b, t, h, w, count, c // count)
    axes = (1, 2, 3, 5) if over_frames else (2, 3, 5)
    mean, variance = (f(groups, axis=axes, keepdims=True) for f in (np.mean, np.var))
    return ((groups - mean) / np.sqrt(variance + eps)).reshape(x.shape) * scale + bias


@pytest.fixture
def clip():
    # A mean far from 0 that differs by channel, frame and clip.
    rng = np.random.default_rng(0)
    offset = 50.0 * rng.standard_normal((2, 3, 1, 1, 64))
    return (rng.standard_normal((2, 3, 4, 5, 64)) + offset).astype(np.float32)


@pytest.mark.parametrize(("over_frames", "count"), [(False, 32), (True, 32), (False, 4)])
def test_group_norm_equals_its_definition(clip, over_frames, count):
    norm = layers.GroupNorm(64, eps=1e-5, groups=count, over_frames=over_frames)
    norm.scale[...], norm.bias[...] = jnp.linspace(0.5, 2.0, 64), jnp.linspace(-1.0, 1.0, 64)
    scale, bias = np.asarray(norm.scale[...]), np.asarray(norm.bias[...])
    expected = group_norm_twin(clip, scale, bias, 1e-5, over_frames, count)
    np.testing.assert_allclose(norm(jnp.asarray(clip)), expected, atol=2e-5)


def test_group_norm_keeps_a_small_variance_beside_a_large_mean():
    x = (1000.0 + np.random.default_rng(0).standard_normal((1, 1, 16, 16, 32))).astype(np.float32)
    norm = layers.GroupNorm(32, eps=1e-6)
    expected = group_norm_twin(x, 1.0, 0.0, 1e-6, over_frames=False)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, atol=2e-4)


@pytest.mark.parametrize("over_frames", [False, True])
def test_group_norm_has_the_gradient_of_its_definition(clip, over_frames):
    norm = layers.GroupNorm(64, eps=1e-5, over_frames=over_frames)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(clip.shape), jnp.float32)

    def plain(x):
        groups = x.reshape(*x.shape[:-1], 32, 2)
        axes = (1, 2, 3, 5) if over_frames else (2, 3, 5)
        mean = jnp.mean(groups, axes, keepdims=True)
        variance = jnp.mean((groups - mean) ** 2, axes, keepdims=True)
        return jnp.sum(weights * ((groups - mean) / jnp.sqrt(variance + 1e-5)).reshape(x.shape))

    x = jnp.asarray(clip)
    got = jax.jit(jax.grad(lambda x: jnp.sum(weights * norm(x))))(x)
    want = jax.jit(jax.grad(plain))(x)
    assert jnp.linalg.norm(got - want) < 1e-5 * jnp.linalg.norm(want)


def test_norms_compute_in_float32_whatever_the_activations(clip):
    x = jnp.asarray(clip, jnp.bfloat16)
    for norm in (layers.GroupNorm(64, eps=1e-5), layers.LayerNorm(64)):
        out = norm(x)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_array_equal(out, norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_group_norm_refuses_channels_that_do_not_divide():
    with pytest.raises(ValueError, match="48 channels"):
        layers.GroupNorm(48, eps=1e-5)


def test_layer_norm_equals_its_definition(clip):
    norm = layers.LayerNorm(64)
    norm.scale[...], norm.bias[...] = jnp.linspace(0.5, 2.0, 64), jnp.linspace(-1.0, 1.0, 64)
    x = clip.astype(np.float64)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    expected = expected * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
    np.testing.assert_allclose(norm(jnp.asarray(clip)), expected, atol=1e-4)


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_temporal_conv_equals_three_shifted_products(frames):
    conv = fixtures.randomise(
        lambda: layers.TemporalConv(5, 7, dtype=jnp.float32, rngs=nnx.Rngs(0))
    )
    x = np.random.default_rng(0).standard_normal((2, frames, 3, 4, 5)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    kernel = np.asarray(conv.kernel[...])
    expected = sum(padded[:, i : i + frames] @ kernel[i] for i in range(3)) + np.asarray(conv.bias)
    np.testing.assert_allclose(conv(jnp.asarray(x)), expected, atol=1e-5)


def test_feed_forward_gates_the_first_half_by_gelu_of_the_second():
    layer = fixtures.randomise(lambda: layers.FeedForward(4, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    layer.proj.kernel[...] = jnp.zeros((4, 32))
    layer.proj.bias[...] = jnp.concatenate([jnp.full(16, 3.0), jnp.full(16, 1.0)])
    layer.out.kernel[...] = jnp.full((16, 4), 1 / 16)
    layer.out.bias[...] = jnp.zeros(4)
    # Exact GELU(1) = (1 + erf(1 / sqrt 2)) / 2.
    np.testing.assert_allclose(layer(jnp.ones((2, 4))), 3.0 * 0.8413447, atol=1e-6)


def test_feed_forward_is_exact_gelu_with_its_gradient():
    layer = fixtures.randomise(lambda: layers.FeedForward(4, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    x = 3.0 * jax.random.normal(jax.random.key(0), (50, 4))

    def definition(x):
        value, gate = jnp.split(layer.proj(x), 2, axis=-1)
        return layer.out(value * nnx.gelu(gate, approximate=False))

    got, expected = (jax.vjp(function, x) for function in (layer, definition))
    np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(got[1](x)[0], expected[1](x)[0], atol=1e-4)


def test_feed_forward_keeps_no_more_than_its_projection_for_the_gradient():
    layer = layers.FeedForward(16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.ones((1000, 16), jnp.bfloat16)
    kept = jax.tree.leaves(jax.vjp(layer, x)[1])
    # The input, the projection of 8 x 16 channels and the product of 4 x 16.
    large = [leaf for leaf in kept if leaf.shape[:1] == (1000,)]
    assert {leaf.dtype for leaf in large} == {jnp.dtype(jnp.bfloat16)}
    assert sum(leaf.shape[1] for leaf in large) <= 13 * 16


def test_attention_to_one_token_needs_no_queries():
    attend = fixtures.randomise(
        lambda: layers.Attention(
            32, head_channels=8, context_dim=6, dtype=jnp.float32, rngs=nnx.Rngs(0)
        )
    )
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 5, 32)), jnp.float32)
    context = jnp.asarray(rng.standard_normal((2, 1, 6)), jnp.float32)
    short = attend.one_key(context)
    np.testing.assert_allclose(attend(x, context), jnp.broadcast_to(short, x.shape), atol=1e-6)


def test_attention_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="heads of 24"):
        layers.Attention(32, head_channels=24, dtype=jnp.float32, rngs=nnx.Rngs(0))


def test_upsample_repeats_pixels():
    x = np.arange(2 * 3 * 2 * 2 * 1, dtype=np.float32).reshape(2, 3, 2, 2, 1)
    expected = x.repeat(2, axis=2).repeat(2, axis=3)
    np.testing.assert_array_equal(layers.upsample(jnp.asarray(x)), expected)


def test_keys_differ_and_come_again():
    first, second = (layers.Keys(jax.random.key(3)) for _ in range(2))
    draws = [jax.random.key_data(first.params()) for _ in range(4)]
    again = [jax.random.key_data(second.params()) for _ in range(4)]
    np.testing.assert_array_equal(draws, again)
    assert len({tuple(np.asarray(x)) for x in draws}) == 4


def test_layers_start_with_unit_gain():
    # LeCun: outputs of unit inputs have unit variance, so depth does not fade or blow up signals.
    rngs = nnx.Rngs(0)
    conv = layers.conv(32, 64, dtype=jnp.float32, rngs=rngs)
    temporal = layers.TemporalConv(64, 64, dtype=jnp.float32, rngs=rngs)
    dense = layers.linear(256, 64, dtype=jnp.float32, rngs=rngs)
    for kernel, fan_in in ((conv.kernel, 9 * 32), (temporal.kernel, 3 * 64), (dense.kernel, 256)):
        np.testing.assert_allclose(jnp.std(kernel[...]) * fan_in**0.5, 1.0, atol=0.03)
    assert not jnp.any(layers.linear(4, 4, zero=True, dtype=jnp.float32, rngs=rngs).kernel[...])


def test_a_feed_forward_keeps_its_projection_alone():
    """Not the gated product, half as wide, nor anything in float32."""
    block = layers.FeedForward(8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(block)
    x = jnp.ones((5, 8), jnp.bfloat16)
    found = jaxprs.kept(lambda params, x: nnx.merge(graphdef, params)(x), params, x)
    tokens = [one for one in found if one[0][0] == 5]
    assert tokens == [((5, 64), jnp.bfloat16)]
