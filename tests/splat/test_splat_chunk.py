"""Chains of a chunk: the unrolled form against the scanned one, operation by operation."""

import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.splat import chunk

CHANNELS, CHUNKS = 2, 5


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    shape = (CHUNKS + 3, chunk.CHUNK)
    width = rng.uniform(0.8, 6.0, shape)
    fields = [
        rng.uniform(-6, 6, shape),
        rng.uniform(-6, 6, shape),
        0.5 / width**2,
        0.3 / width**2 * rng.uniform(-1, 1, shape),
        0.5 / width**2,
        np.log(rng.uniform(0.01, 0.999, shape)),
        rng.uniform(size=shape),
        rng.uniform(1, 3, shape),
    ]
    fields[5][:, -3:] = chunk.HIDDEN
    return jnp.asarray(np.stack(fields, -1).reshape(shape[0], -1), jnp.float32)


def block():
    rng = np.random.default_rng(1)
    start = 10.0 ** rng.uniform(-5, 0, (CHUNKS, chunk.PIXELS))
    last = jnp.asarray([False, True, False, True, True])
    return jnp.asarray([7, 0, 3, 3, 5], jnp.int32), jnp.asarray(start, jnp.float32), last


def test_unrolled_equals_scanned(table):
    index, start, last = block()
    rng = np.random.default_rng(2)
    behind, *v = (
        jnp.asarray(rng.normal(size=start.shape), jnp.float32) for _ in range(1 + CHANNELS)
    )

    def everything(unroll):
        even, odd = chunk.pass_through(unroll, CHANNELS, table, index)
        made = chunk.composite(unroll, CHANNELS, table, index, start, last)
        return (
            even,
            odd,
            *made.channels,
            made.left,
            chunk.gradient(unroll, table, index, start, behind, tuple(v)),
        )

    for a, b in zip(everything(True), everything(False), strict=True):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_chunk_equals_a_loop_over_splats(table):
    index, start, last = block()
    made = chunk.composite(False, CHANNELS, table, index, start, last)
    even, odd = chunk.pass_through(False, CHANNELS, table, index)
    u, v = chunk.pixels()
    splats = np.asarray(table, np.float64).reshape(-1, chunk.CHUNK, chunk.SHAPE + CHANNELS)
    for c in range(CHUNKS):
        for p in range(0, chunk.PIXELS, 7):
            t, product, sums, left = float(start[c, p]), 1.0, np.zeros(CHANNELS), 0.0
            stopped = t <= chunk.T_MIN
            alive = not stopped
            for x, y, xx, xy, yy, log_opacity, *values in splats[int(index[c])]:
                dx, dy = u[0, p] - x, v[0, p] - y
                alpha = min(np.exp(log_opacity - xx * dx**2 - xy * dx * dy - yy * dy**2), 0.99)
                if alpha < 1 / 255:
                    continue
                product *= 1 - alpha
                if not stopped and t * (1 - alpha) <= chunk.T_MIN:
                    stopped, left = True, t
                if not stopped:
                    sums += alpha * t * np.asarray(values)
                    t *= 1 - alpha
            if alive and not stopped and last[c]:
                left = t
            np.testing.assert_allclose(even[c, p] * odd[c, p], product, rtol=1e-4)
            got = [float(channel[c, p]) for channel in made.channels]
            np.testing.assert_allclose(got, sums, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(float(made.left[c, p]), left, rtol=1e-4)


def test_moments_move_the_origin():
    rng = np.random.default_rng(3)
    u, v = chunk.pixels()
    g, x, y = rng.normal(size=(4, chunk.PIXELS)), rng.normal(size=4), rng.normal(size=4)

    def about(x0, y0):
        dx, dy = u - x0[:, None], v - y0[:, None]
        terms = (np.ones_like(dx), dx, dy, dx * dx, dx * dy, dy * dy)
        return np.stack([np.sum(g * term, axis=1) for term in terms], axis=1)

    zero = np.zeros(4)
    sums = list(jnp.asarray(about(zero, zero).T, jnp.float32))
    moved = chunk.moments(sums, jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
    np.testing.assert_allclose(np.stack(moved, 1), about(x, y), rtol=1e-4, atol=1e-3)
