import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas

from v3d_jax.nn import layers
from v3d_jax.ops import attention, frame_attention, target
from v3d_jax.parallel import mesh as meshes
from v3d_jax.parallel import sharding


def inputs(shape, dtype=jnp.float32):
    return [jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 4)]


def value_and_gradients(function, q, k, v, cotangent):
    out, pullback = jax.vjp(function, q, k, v)
    return out, *pullback(cotangent)


def assert_close(got, expected, tolerance):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def test_plain_is_attention_of_every_pixel_to_its_frames():
    q, k, v, _ = inputs((2, 5, 3, 2, 4))
    one_sequence_a_pixel = [x.swapaxes(1, 2).reshape(6, 5, 2, 4) for x in (q, k, v)]
    expected = attention.attention(*one_sequence_a_pixel, impl="xla")
    got = frame_attention.plain(q, k, v).swapaxes(1, 2).reshape(6, 5, 2, 4)
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.01)])
def test_fused_equals_plain_with_gradients(dtype, tolerance):
    arrays = inputs((2, 3, 16, 2, 16), dtype)
    plain = value_and_gradients(frame_attention.plain, *arrays)
    fused = value_and_gradients(lambda q, k, v: frame_attention.fused(q, k, v, True), *arrays)
    assert_close(fused, plain, tolerance)


def test_fused_softmax_does_not_overflow():
    q, k, v, _ = inputs((1, 2, 8, 1, 16))
    plain, fused = frame_attention.plain(100 * q, k, v), frame_attention.fused(100 * q, k, v, True)
    np.testing.assert_allclose(fused, plain, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 18, 64, 2, 32), (1, 25, 144, 5, 64)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 0.005), (jnp.bfloat16, 0.02)])
def test_kernel_equals_plain_on_a_gpu(shape, dtype, tolerance):
    arrays = inputs(shape, dtype)
    plain = jax.jit(lambda *x: value_and_gradients(frame_attention.plain, *x))(*arrays)
    fused = jax.jit(lambda *x: value_and_gradients(frame_attention.fused, *x))(*arrays)
    assert_close(fused, plain, tolerance)


@pytest.mark.parametrize(("frames", "fuses"), [(1, True), (2, False)])
def test_devices_run_the_kernel_on_clips_of_their_own(frames, fuses):
    """Whoever shares a clip attends by XLA, which divides the work."""
    mesh = meshes.make(meshes.MeshConfig(2, frames=frames), jax.devices("cpu"))
    layer = layers.Attention(64, head_channels=32, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jax.ShapeDtypeStruct((8, 18, 64, 64), jnp.float32)
    with target.traced_for("cuda"):
        traced = jax.make_jaxpr(sharding.on_mesh(layer.across_frames, mesh))(x)
        alone = jax.make_jaxpr(layer.across_frames)(x)
    assert "pallas_call" in str(alone)
    assert ("pallas_call" in str(traced)) == fuses
    assert ("shard_map" in str(traced)) == fuses


def test_kernel_is_chosen_for_short_clips_on_one_gpu():
    shape = (32, 18, 1024, 2, 32)
    assert frame_attention.can_fuse(shape, "gpu", 1)
    assert not frame_attention.can_fuse(shape, "gpu", 2)
    assert not frame_attention.can_fuse(shape, "cpu", 1)
    assert not frame_attention.can_fuse((1, 64, 1024, 2, 32), "gpu", 1)
    assert not frame_attention.can_fuse((1, 18, 1023, 2, 32), "gpu", 1)
    assert not frame_attention.can_fuse((1, 18, 1024, 2, 40), "gpu", 1)


def test_xla_attends_where_jax_has_no_triton_back_end(monkeypatch):
    monkeypatch.delattr(pallas, "triton", raising=False)
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    assert not frame_attention.can_fuse((32, 18, 1024, 2, 32), "gpu", 1)
