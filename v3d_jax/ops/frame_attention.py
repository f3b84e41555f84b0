"""Softmax attention of every pixel to itself in the other frames of its clip.

Notation: `b` clip, `t u` frames, `s` pixels, `h` heads, `d` channels of a head. As in
`v3d_jax.ops.attention`, scores are scaled by 1 / sqrt(d) and the softmax is float32. Sequences are
as short as a clip and there is one for every pixel, so what costs time is moving them: written as
products of small matrices they are transposed, padded and kept in float32.

`fused` is one Pallas (Triton) kernel a direction that reads the arrays where they lie and keeps
scores in registers; its gradient computes them again. `plain` is its twin, for other devices.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from v3d_jax.ops import target

Clips = Float[Array, "b t s h d"]
Tile = Float[Array, "p d"]

# Pixels of one program. All frames of a tile are in registers, so longer clips would spill.
_PIXELS = 8
_MAX_FRAMES = 32


def attention(q: Clips, k: Clips, v: Clips) -> Clips:
    """softmax(q kᵀ / sqrt(d)) v over the frames of every pixel and head, in the type of `q`.

    The implementation is chosen by shape and platform (`v3d_jax.ops.target`) at trace time.
    """
    devices = math.prod(target.free_axes().values())
    if can_fuse(q.shape, target.platform(), devices):
        return fused(q, k, v)
    return plain(q, k, v)


def can_fuse(shape: tuple[int, ...], platform: str, devices: int) -> bool:
    """Whether the kernel takes arrays of this shape, which `devices` may share.

    XLA does not partition it: several devices would each attend for the whole batch. Where a clip
    is one device's, `parallel.sharding.each_clip` gives each its own.
    """
    _, t, s, _, d = shape
    fits = t <= _MAX_FRAMES and s % _PIXELS == 0 and d in (16, 32, 64, 128)
    return platform in target.GPUS and devices == 1 and fits and target.has_triton()


def plain(q: Clips, k: Clips, v: Clips) -> Clips:
    """Attention as two contractions, with the scores in memory."""
    scores = jnp.einsum("btshd,bushd->bshtu", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * (q.shape[-1] ** -0.5), axis=-1).astype(v.dtype)
    out = jnp.einsum("bshtu,bushd->btshd", weights, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def fused(q: Clips, k: Clips, v: Clips, interpret: bool = False) -> Clips:
    """Attention by the kernel; `interpret` runs it on any device, slowly."""
    return _call(_forward, 1, q, k, v, interpret=interpret)[0]


def _save(q: Clips, k: Clips, v: Clips, interpret: bool) -> tuple[Clips, tuple[Clips, ...]]:
    return fused(q, k, v, interpret), (q, k, v)


def _pull_back(interpret: bool, saved: tuple[Clips, ...], g: Clips) -> tuple[Clips, ...]:
    return tuple(_call(_backward, 3, *saved, g, interpret=interpret))


fused.defvjp(_save, _pull_back)


def _call(
    kernel: Callable[..., None], outputs: int, *args: Clips, interpret: bool
) -> Sequence[Clips]:
    """Runs the kernel on all frames of every tile of pixels and every head."""
    from jax.experimental import pallas as pl

    b, t, s, h, d = args[0].shape
    tile = pl.BlockSpec((None, t, _PIXELS, None, d), lambda i, j, k: (i, 0, j, k, 0))
    settings: dict[str, Any] = {"interpret": True}
    if not interpret:
        from jax.experimental.pallas import triton

        # Two channels of a tile a thread: the gradient holds four tiles a frame in registers.
        warps = max(1, _PIXELS * d // 64)
        settings = {"compiler_params": triton.CompilerParams(num_warps=warps, num_stages=1)}
    return pl.pallas_call(
        functools.partial(kernel, scale=d**-0.5),
        grid=(b, s // _PIXELS, h),
        in_specs=[tile] * len(args),
        out_specs=[tile] * outputs,
        out_shape=[jax.ShapeDtypeStruct(args[0].shape, args[0].dtype)] * outputs,
        **settings,
    )(*args)


def _forward(q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, *, scale: float) -> None:
    keys, values = _tiles(k_ref), _tiles(v_ref)

    def frame(i: Any, _: None) -> None:
        weights = _softmax([scale * dot for dot in _dots(q_ref[i], keys)])
        out_ref[i] = _mix(weights, values).astype(out_ref.dtype)

    jax.lax.fori_loop(0, len(keys), frame, None)


def _backward(
    q_ref: Any, k_ref: Any, v_ref: Any, g_ref: Any, dq_ref: Any, dk_ref: Any, dv_ref: Any, *,
    scale: float,
) -> None:  # fmt: skip
    keys, values = _tiles(k_ref), _tiles(v_ref)

    def frame(i: Any, sums: Any) -> Any:
        q, g = q_ref[i].astype(jnp.float32), g_ref[i].astype(jnp.float32)
        weights = _softmax([scale * dot for dot in _dots(q, keys)])
        d_weights = _dots(g, values)
        mean = sum(w * d for w, d in zip(weights, d_weights, strict=True))
        d_dots = [scale * w * (d - mean) for w, d in zip(weights, d_weights, strict=True)]
        dq_ref[i] = _mix(d_dots, keys).astype(dq_ref.dtype)
        dk = [total + d[:, None] * q for total, d in zip(sums[0], d_dots, strict=True)]
        dv = [total + w[:, None] * g for total, w in zip(sums[1], weights, strict=True)]
        return dk, dv

    zeros = [jnp.zeros(key.shape, jnp.float32) for key in keys]
    dk, dv = jax.lax.fori_loop(0, len(keys), frame, (zeros, zeros))
    for u in range(len(keys)):
        dk_ref[u], dv_ref[u] = dk[u].astype(dk_ref.dtype), dv[u].astype(dv_ref.dtype)


def _tiles(ref: Any) -> list[Tile]:
    """One tile a frame, in float32."""
    return [ref[u].astype(jnp.float32) for u in range(ref.shape[0])]


def _dots(x: Tile, tiles: Sequence[Tile]) -> list[Float[Array, " p"]]:
    return [jnp.sum(x.astype(jnp.float32) * tile, axis=-1) for tile in tiles]


def _mix(weights: Sequence[Float[Array, " p"]], tiles: Sequence[Tile]) -> Tile:
    return functools.reduce(
        jnp.add, [w[:, None] * tile for w, tile in zip(weights, tiles, strict=True)]
    )


def _softmax(scores: Sequence[Float[Array, " p"]]) -> list[Float[Array, " p"]]:
    top = functools.reduce(jnp.maximum, scores)
    powers = [jnp.exp(score - top) for score in scores]
    total = functools.reduce(jnp.add, powers)
    return [power / total for power in powers]
