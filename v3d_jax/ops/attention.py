"""Softmax attention, one function with four implementations that agree.

Notation: `b` sequences, `n` queries, `m` keys, `h` heads, `d` channels of a head. Scores are scaled
by 1 / sqrt(d), there is no mask, and the softmax is float32 whatever the inputs' type.

- `xla`: scores in memory; the plain twin of the others, and the fastest for short sequences.
- `chunked`: `xla` over blocks of queries, recomputed in the backward pass: memory linear in `n`.
- `cudnn`: the fused kernel of NVIDIA GPUs, bfloat16 or float16, at most 128 channels a head, and
  even numbers of queries and keys (its backward pass takes no others).
- `tpu_flash`: the fused Pallas kernel of TPUs. A Mosaic kernel is not partitioned automatically:
  where the batch is sharded, trace under `jax.set_mesh`, and each device runs its own sequences.

Measured on one H200 in bfloat16: 4096 tokens, 5 heads of 64: cudnn 2.1 ms, xla 10.1 ms; 18 tokens:
xla 0.6 ms, cudnn 1.1 ms.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from v3d_jax.ops import target

Implementation = Literal["xla", "chunked", "cudnn", "tpu_flash"]

_QUERY_CHUNK = 512
# Below this many queries or keys the fused kernels lose to XLA. cuDNN's limit is an estimate: XLA
# keeps float32 scores in memory, and reads them several times in each direction.
_SHORT = 128
_CUDNN_SHORT = 64
# Scores of one head and sequence above which they are not kept in memory where nothing is fused.
_MANY_SCORES = 1024 * 1024
_CUDNN_MAX_CHANNELS = 128
_TPU_MAX_CHANNELS = 256
_TPU_BLOCK = 128
_TPU_MAX_BLOCK = 512


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    *,
    impl: Implementation | None = None,
) -> Float[Array, "b n h d"]:
    """softmax(q kᵀ / sqrt(d)) v for every sequence and head, in the type of `q`.

    `impl` None picks by shape, type and platform (`v3d_jax.ops.target`) at trace time. Not to be
    used under `vmap` (cuDNN's batching rules): flatten leading axes into `b`.
    """
    if impl is None:
        impl = choose(q.shape, k.shape[1], q.dtype, target.platform())
    match impl:
        case "xla":
            return _xla(q, k, v)
        case "chunked":
            return _chunked(q, k, v)
        case "cudnn":
            q, k, v = _split_alike(q, k, v)
            return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
        case "tpu_flash":
            return _tpu_flash_sharded(q, k, v)
    raise ValueError(f"unknown attention implementation {impl!r}")


def choose(q_shape: tuple[int, ...], num_keys: int, dtype: Any, platform: str) -> Implementation:
    """The implementation for queries of shape [b, n, h, d] and `num_keys` keys on a platform."""
    num_queries, channels = q_shape[1], q_shape[3]
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    cudnn = platform in target.GPUS and half and channels <= _CUDNN_MAX_CHANNELS
    fits = channels % 8 == 0 and num_queries % 2 == 0 and num_keys % 2 == 0
    shortest = min(num_queries, num_keys)
    if cudnn and fits and shortest >= _CUDNN_SHORT:
        return "cudnn"
    if shortest < _SHORT:
        return "xla"
    if cudnn:
        return "chunked"
    many = num_queries * num_keys >= _MANY_SCORES
    if platform == "tpu" and many and channels <= _TPU_MAX_CHANNELS:
        return "tpu_flash"
    return "chunked" if many else "xla"


def _xla(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"]
) -> Float[Array, "b n h d"]:
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * (q.shape[-1] ** -0.5), axis=-1).astype(v.dtype)
    out = jnp.einsum("bhnm,bmhd->bnhd", weights, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)


def _chunked(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"]
) -> Float[Array, "b n h d"]:
    b, n, h, d = q.shape
    size = min(_QUERY_CHUNK, n)
    chunks = -(-n // size)
    # Queries are independent, so rows of padding change nothing but themselves.
    padded = jnp.pad(q, ((0, 0), (0, chunks * size - n), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(b, chunks, size, h, d), 1, 0)
    out = jax.lax.map(jax.checkpoint(lambda block: _xla(block, k, v)), blocks)
    return jnp.moveaxis(out, 0, 1).reshape(b, chunks * size, h, d)[:, :n]


def _split_alike(*arrays: Float[Array, "b _ h d"]) -> list[Array]:
    """The arrays split by sequence over as many devices of the mesh in context as divide them.

    cuDNN's partitioner refuses queries and keys that lie differently, as those of frames and of a
    context that every device has.
    """
    free = target.free_axes()
    if not free:
        return list(arrays)
    axes, parts = [], 1
    for name, size in free.items():
        if arrays[0].shape[0] % (parts * size) == 0:
            axes, parts = [*axes, name], parts * size
    spec = PartitionSpec(tuple(axes) or None)
    return [jax.lax.with_sharding_constraint(x, spec) for x in arrays]


def _tpu_flash_sharded(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"]
) -> Float[Array, "b n h d"]:
    """Runs the kernel on each device's sequences where a mesh is in context."""
    free = target.free_axes()
    devices = math.prod(free.values())
    if devices == 1:
        return _tpu_flash(q, k, v)
    if q.shape[0] % devices:
        return _chunked(q, k, v)
    spec = PartitionSpec(tuple(free))
    mapped = jax.shard_map(
        _tpu_flash, in_specs=(spec, spec, spec), out_specs=spec, axis_names=set(free),
        check_vma=False,
    )  # fmt: skip
    return mapped(q, k, v)


def _tpu_flash(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"]
) -> Float[Array, "b n h d"]:
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    n, m = q.shape[1], k.shape[1]
    q, k, v = (jnp.moveaxis(_pad_length(x, _TPU_BLOCK), 1, 2) for x in (q, k, v))
    segments = None
    if k.shape[2] != m:
        # The kernel masks by segment: padded keys belong to a segment that no query has.
        queries = jnp.zeros((q.shape[0], q.shape[2]), jnp.int32)
        keys = (jnp.arange(k.shape[2]) >= m).astype(jnp.int32)
        keys = jnp.broadcast_to(keys[None], (k.shape[0], k.shape[2]))
        segments = flash.SegmentIds(q=queries, kv=keys)
    out = flash.flash_attention(
        q, k, v,
        segment_ids=segments,
        sm_scale=q.shape[-1] ** -0.5,
        block_sizes=_block_sizes(flash, q.shape[2], k.shape[2]),
    )  # fmt: skip
    return jnp.moveaxis(out, 2, 1)[:, :n].astype(q.dtype)


def _pad_length(x: Float[Array, "b n h d"], multiple: int) -> Float[Array, "b padded h d"]:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)))


def _block_sizes(flash, num_queries: int, num_keys: int):
    block_q, block_k = (
        next(size for size in (_TPU_MAX_BLOCK, 256, _TPU_BLOCK) if length % size == 0)
        for length in (num_queries, num_keys)
    )
    return flash.BlockSizes(
        block_q=block_q, block_k_major=block_k, block_k=block_k, block_b=1,
        block_q_major_dkv=block_q, block_k_major_dkv=block_k, block_k_dkv=block_k,
        block_q_dkv=block_q, block_k_major_dq=block_k, block_k_dq=block_k, block_q_dq=block_q,
    )  # fmt: skip
