"""Blend signs, and who attends to whose context."""

import fixtures
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from flax import nnx

from v3d_jax.nn import layers, spatiotemporal

ALPHA = 0.6224593  # sigmoid(0.5)

call = fixtures.jit(lambda module, *args: module(*args))


def random(seed: int, *shape: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("weighs_temporal", [False, True])
def test_alpha_weighs_the_side_it_should(weighs_temporal):
    blend = spatiotemporal.Blend(0.5, alpha_weighs_temporal=weighs_temporal)
    spatial, temporal = jnp.ones((1, 2, 1, 1, 3)), jnp.zeros((1, 2, 1, 1, 3))
    expected = 1 - ALPHA if weighs_temporal else ALPHA
    np.testing.assert_allclose(blend(spatial, temporal), expected, atol=1e-6)


def test_images_among_frames_keep_the_spatial_result():
    blend = spatiotemporal.Blend(0.5)
    spatial, temporal = jnp.ones((1, 2, 1, 1, 3)), jnp.zeros((1, 2, 1, 1, 3))
    out = blend(spatial, temporal, jnp.asarray([[True, False]]))
    np.testing.assert_allclose(out[0, :, 0, 0, 0], [1.0, ALPHA], atol=1e-6)


@pytest.fixture
def cross():
    def create():
        return layers.Attention(
            8, head_channels=4, context_dim=6, dtype=jnp.float32, rngs=nnx.Rngs(0)
        )

    return fixtures.randomise(create), layers.LayerNorm(8)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_shared_context_is_the_same_as_a_repeated_one(cross, tokens):
    x, context = random(0, 2, 4, 5, 8), random(1, 2, 1, tokens, 6)
    attend = fixtures.jit(spatiotemporal.attend_context)
    shared = attend(*cross, x, context)
    repeated = attend(*cross, x, jnp.repeat(context, 4, axis=1))
    np.testing.assert_allclose(*jnp.broadcast_arrays(shared, repeated), atol=1e-6)


def test_each_frame_attends_to_its_own_context(cross):
    attn, norm = cross
    x, context = random(0, 2, 4, 5, 8), random(1, 2, 4, 3, 6)
    out = fixtures.jit(spatiotemporal.attend_context)(attn, norm, x, context)
    queries = call(norm, x)
    for b in range(2):
        for t in range(4):
            expected = call(attn, queries[b, t][None], context[b, t][None])[0]
            np.testing.assert_allclose(out[b, t], expected, atol=1e-6)


@pytest.fixture
def transformer():
    return fixtures.randomise(
        lambda: spatiotemporal.SpatialVideoTransformer(
            32, head_channels=16, context_dim=6, dtype=jnp.float32, rngs=nnx.Rngs(0)
        )
    )


def test_layers_across_frames_attend_to_the_context_of_frame_0(transformer):
    # With the layers per frame blind to the context, only those across frames are left.
    transformer.spatial.attn2.to_out.kernel[...] = jnp.zeros((32, 32))
    x, context = random(0, 1, 3, 2, 2, 32), random(1, 1, 3, 2, 6)
    out = call(transformer, x, context)
    np.testing.assert_array_equal(out, call(transformer, x, context.at[:, 1:].add(1.0)))
    difference = jnp.abs(out - call(transformer, x, context.at[:, 0].add(1.0)))
    assert bool(jnp.all(difference.max(axis=(0, 2, 3, 4)) > 1e-3))


def test_the_frame_index_tells_equal_frames_apart(transformer):
    x, context = random(0, 1, 1, 2, 2, 32), random(1, 1, 1, 2, 6)
    out = call(transformer, jnp.repeat(x, 3, axis=1), context)
    assert float(jnp.abs(out[:, 0] - out[:, 2]).max()) > 1e-2
    images = call(transformer, jnp.repeat(x, 3, axis=1), context, jnp.ones((1, 3), bool))
    np.testing.assert_allclose(images[:, 0], images[:, 2], atol=1e-6)


def test_a_temporal_block_keeps_pixels_apart(transformer):
    tokens, context = random(0, 2, 3, 5, 32), random(1, 2, 1, 2, 6)
    out = call(transformer.temporal, tokens, context)
    for pixel in range(5):
        alone = call(transformer.temporal, tokens[:, :, pixel : pixel + 1], context)
        np.testing.assert_allclose(out[:, :, pixel : pixel + 1], alone, atol=1e-5)


def test_the_embedding_reaches_its_own_frame():
    block = fixtures.randomise(
        lambda: spatiotemporal.ResBlock(
            32, 64, emb_dim=16, eps=1e-5, zero=False, dtype=jnp.float32, rngs=nnx.Rngs(0)
        )
    )
    x, emb = random(0, 1, 3, 2, 2, 32), random(1, 1, 3, 16)
    before, after = (call(block, x, e) for e in (emb, emb.at[:, 1].add(1.0)))
    difference = jnp.abs(before - after).max(axis=(0, 2, 3, 4))
    assert difference[1] > 1e-2
    np.testing.assert_array_equal(difference[jnp.asarray([0, 2])], 0.0)


def test_a_blend_keeps_its_arguments_alone():
    """As they are, and not in float32."""
    graphdef, params = nnx.split(spatiotemporal.Blend(0.5))
    x = jnp.ones((1, 2, 3, 3, 4), jnp.bfloat16)
    found = jaxprs.kept(lambda params, *xs: nnx.merge(graphdef, params)(*xs), params, x, x)
    assert max((np.prod(shape) for shape, _ in found), default=0) <= 2
