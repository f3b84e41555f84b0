from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from v3d_jax.ops import attention


def inputs(b, n, m, h, d, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    q, out = (jax.random.normal(k, (b, n, h, d), dtype) for k in keys[:2])
    k, v = (jax.random.normal(k, (b, m, h, d), dtype) for k in keys[2:])
    return q, k, v, out


def reference(q, k, v):
    """Attention in float64, one sequence and head at a time."""
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            scores = q[b, :, h] @ k[b, :, h].T / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            out[b, :, h] = weights @ v[b, :, h]
    return out


@partial(jax.jit, static_argnums=0)
def value_and_gradients(impl, q, k, v, cotangent):
    out, pullback = jax.vjp(lambda *x: attention.attention(*x, impl=impl), q, k, v)
    return out, pullback(cotangent)


def assert_like_plain(impl, shape, dtype=jnp.float32, tolerance=1e-5):
    q, k, v, cotangent = inputs(*shape, dtype)
    plain = value_and_gradients("xla", q, k, v, cotangent)
    fast = value_and_gradients(impl, q, k, v, cotangent)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(fast), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(a)


@pytest.mark.parametrize("shape", [(2, 18, 18, 3, 8), (1, 5, 1, 2, 4), (1, 40, 7, 1, 16)])
def test_plain_equals_definition(shape):
    q, k, v, _ = inputs(*shape)
    np.testing.assert_allclose(
        attention.attention(q, k, v, impl="xla"), reference(q, k, v), atol=2e-6
    )


def test_softmax_is_float32_in_bfloat16():
    q, k, v, _ = inputs(1, 64, 512, 1, 16, jnp.bfloat16)
    out = attention.attention(q, k, v, impl="xla")
    assert out.dtype == jnp.bfloat16
    # 0.4 % is bfloat16's rounding; a bfloat16 softmax over 512 keys is off by several percent.
    error = np.asarray(out, np.float32) - reference(q, k, v)
    assert np.linalg.norm(error) < 0.005 * np.linalg.norm(reference(q, k, v))


# Less than one chunk of 512; two chunks and a part.
@pytest.mark.parametrize(("n", "m"), [(100, 30), (1100, 40)])
def test_chunked_equals_plain_with_gradients(n, m):
    assert_like_plain("chunked", (2, n, m, 2, 8))


def test_chunked_needs_less_memory():
    q, k, v, cotangent = inputs(1, 4096, 4096, 1, 16)

    def temporary(impl):
        lowered = value_and_gradients.lower(impl, q, k, v, cotangent)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary("chunked") < temporary("xla") / 3


@pytest.mark.parametrize(("n", "m"), [(256, 128), (200, 300)])
def test_tpu_flash_equals_plain_with_gradients(n, m):
    with pltpu.force_tpu_interpret_mode():
        assert_like_plain("tpu_flash", (1, n, m, 1, 16))


@pytest.mark.parametrize(("sequences", "parts"), [(16, 8), (6, 2), (4, 2), (3, 1)])
def test_cudnn_gets_queries_and_keys_that_lie_alike(monkeypatch, sequences, parts):
    """Its partitioner refuses others: frames are split, a context may be on every device."""
    lie = []

    def seen(*arrays, implementation):
        assert implementation == "cudnn"
        for x in arrays:
            jax.debug.inspect_array_sharding(x, callback=lie.append)
        return attention.attention(*arrays, impl="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", seen)
    q, k, v, _ = inputs(sequences, 4, 6, 2, 8)
    plain = attention.attention(q, k, v, impl="xla")
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=axis_types)
    split = jax.sharding.NamedSharding(mesh, jax.P(("data", "fsdp") if parts == 8 else None))
    everywhere = jax.sharding.NamedSharding(mesh, jax.P())
    with jax.set_mesh(mesh):
        arrays = [jax.device_put(q, split), *jax.device_put((k, v), everywhere)]
        found = jax.jit(lambda *a: attention.attention(*a, impl="cudnn"))(*arrays)
    np.testing.assert_allclose(found, plain, atol=1e-6)
    assert [one.shard_shape(q.shape)[0] for one in lie] == 3 * [sequences // parts]


def test_tpu_flash_runs_on_each_device_of_a_mesh():
    q, k, v, _ = inputs(8, 128, 128, 1, 16)
    plain = np.asarray(attention.attention(q, k, v, impl="xla"))
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=axis_types)
    sharding = jax.sharding.NamedSharding(mesh, jax.P(("data", "fsdp")))
    flash = jax.jit(
        lambda q, k, v: attention.attention(q, k, v, impl="tpu_flash"), out_shardings=sharding
    )
    with jax.set_mesh(mesh), pltpu.force_tpu_interpret_mode():
        arrays = [jax.device_put(x, sharding) for x in (q, k, v)]
        assert "shard_map" in str(jax.make_jaxpr(flash)(*arrays))
        sharded = np.asarray(flash(*arrays))
    np.testing.assert_allclose(sharded, plain, atol=1e-5)


def test_tpu_flash_lowers_for_tpu_with_gradients():
    shape = jax.ShapeDtypeStruct((2, 1024, 5, 64), jnp.bfloat16)
    step = jax.jit(partial(value_and_gradients, "tpu_flash"))
    text = jax.export.export(step, platforms=["tpu"])(shape, shape, shape, shape).mlir_module()
    assert text.count("tpu_custom_call") >= 3


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [(2, 1024, 1024, 5, 64), (3, 258, 258, 4, 80), (2, 4608, 64, 4, 32), (9, 64, 64, 5, 32)],
)
def test_cudnn_equals_plain_with_gradients(shape):
    assert_like_plain("cudnn", shape, jnp.bfloat16, tolerance=0.02)


def test_choice_by_platform_and_shape():
    bf16, f32 = jnp.bfloat16, jnp.float32
    temporal, level0, autoencoder = (64, 18, 5, 64), (36, 4096, 5, 64), (18, 4096, 1, 512)
    for platform in ("cpu", "gpu", "tpu"):
        assert attention.choose(temporal, 18, bf16, platform) == "xla"
        assert attention.choose(level0, 1, bf16, platform) == "xla"
        assert attention.choose(autoencoder, 4096, bf16, platform) == "chunked"
    assert attention.choose(level0, 4096, bf16, "gpu") == "cudnn"
    assert attention.choose(level0, 4096, f32, "gpu") == "chunked"
    # The mini's coarsest level, and its context of 64 tokens, seen from all pixels of a clip.
    assert attention.choose((576, 64, 5, 32), 64, bf16, "gpu") == "cudnn"
    assert attention.choose((32, 18432, 2, 32), 64, bf16, "gpu") == "cudnn"
    assert attention.choose((32, 18432, 2, 32), 65, bf16, "gpu") == "xla"
    assert attention.choose((32, 18432, 2, 32), 64, bf16, "tpu") == "xla"
    # CLIP's class token makes its sequence odd.
    assert attention.choose((1, 257, 16, 80), 257, bf16, "gpu") == "chunked"
    assert attention.choose(level0, 4096, bf16, "tpu") == "tpu_flash"
    assert attention.choose(level0, 4096, bf16, "cpu") == "chunked"
    assert attention.choose((1, 257, 16, 80), 257, f32, "cpu") == "xla"


def test_default_runs_here_and_unknown_names_do_not():
    q, k, v, _ = inputs(1, 9, 9, 1, 4)
    np.testing.assert_allclose(attention.attention(q, k, v), reference(q, k, v), atol=2e-6)
    with pytest.raises((TypeError, ValueError), match="fast"):
        attention.attention(q, k, v, impl="fast")
