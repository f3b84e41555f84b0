"""Texture look-up: bilinear, wrapping, from a mip pyramid of packed texels.

A texel is one uint32 (R | G << 8 | B << 16 | A << 24), so that a tap is one 4-byte gather. Colours
are averaged with their alpha as weight, in the pyramid and between taps: what an editor left
behind in holes does not bleed over their edges.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8, UInt32

_CLEAR = 1e-6  # weight of a texel without alpha: four of them give their plain mean


def pyramid(atlas: UInt8[Array, "n s s 4"]) -> UInt32[Array, "n t"]:
    """Levels of s, s / 2, ... 1 texels, each the mean of 2 x 2 texels of the one before.

    Row-major, level after level, finest first: t = (4 s^2 - 1) / 3 packed texels.

    Raises ValueError if s is no power of two.
    """
    count, size = atlas.shape[0], atlas.shape[1]
    if size & (size - 1):
        raise ValueError(f"textures must have a power of two of texels a side, not {size}")
    level = atlas.astype(jnp.float32)
    levels = [_pack(level).reshape(count, level.shape[1] ** 2)]
    while level.shape[1] > 1:
        level = _halve(level)
        levels.append(_pack(level).reshape(count, level.shape[1] ** 2))
    return jnp.concatenate(levels, axis=1)


def coarsest_level(texels: UInt32[Array, "n t"]) -> int:
    """Number of the level of one texel, the finest being 0: log2 s."""
    return (3 * texels.shape[1] + 1).bit_length() // 2 - 1


def sample(
    texels: UInt32[Array, "n t"],
    texture: Int32[Array, "*n"],
    u: Float[Array, "*n"],
    v: Float[Array, "*n"],
    level: Int32[Array, "*n"] | None,
) -> tuple[Array, Array, Array, Array]:
    """Red, green, blue, alpha in [0, 1] at (u, v), v up, of one texture and level each.

    `level` None reads the finest everywhere.
    """
    coarsest = coarsest_level(texels)
    starts = np.cumsum([0] + [4**k for k in range(coarsest, 0, -1)]).astype(np.int32)
    if level is None:
        start, size, scale = 0, 1 << coarsest, float(1 << coarsest)
    else:
        start = jnp.asarray(starts)[level]
        size = jnp.right_shift(jnp.int32(1 << coarsest), level)
        scale = size.astype(jnp.float32)
    x = (u - jnp.floor(u)) * scale - 0.5
    y = (1.0 - (v - jnp.floor(v))) * scale - 0.5
    x0, y0 = jnp.floor(x), jnp.floor(y)
    fx, fy = x - x0, y - y0
    x0, y0 = x0.astype(jnp.int32), y0.astype(jnp.int32)
    total = [0.0] * 4
    for dy, wy in ((0, 1.0 - fy), (1, fy)):
        for dx, wx in ((0, 1.0 - fx), (1, fx)):
            # sizes are powers of two: wrapping is a bit mask
            place = start + ((y0 + dy) & (size - 1)) * size + ((x0 + dx) & (size - 1))
            red, green, blue, alpha = _unpack(texels[texture, place])
            weight = wx * wy * (alpha + _CLEAR)
            parts = (weight * red, weight * green, weight * blue, weight)
            total = [a + b for a, b in zip(total, parts, strict=True)]
    weight = total[3]
    return total[0] / weight, total[1] / weight, total[2] / weight, weight - _CLEAR


def _halve(level: Float[Array, "n s s 4"]) -> Float[Array, "n r r 4"]:
    count, half = level.shape[0], level.shape[1] // 2
    cells = level.reshape(count, half, 2, half, 2, 4)
    alpha = cells[..., 3:]
    total = alpha.sum(axis=(2, 4))
    color = (cells[..., :3] * alpha).sum(axis=(2, 4)) / jnp.maximum(total, 1.0)
    color = jnp.where(total > 0, color, cells[..., :3].mean(axis=(2, 4)))
    return jnp.concatenate([color, total / 4], axis=-1)


def _pack(texel: Float[Array, "*n 4"]) -> UInt32[Array, "*n"]:
    red, green, blue, alpha = (jnp.round(texel[..., k]).astype(jnp.uint32) for k in range(4))
    return red | (green << 8) | (blue << 16) | (alpha << 24)


def _unpack(texel: UInt32[Array, "*n"]) -> list[jax.Array]:
    step = np.float32(1 / 255)
    return [((texel >> k) & 0xFF).astype(jnp.float32) * step for k in (0, 8, 16, 24)]
