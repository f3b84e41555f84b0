"""Two-float arithmetic against float64, fused into one program."""

import jax
import jax.numpy as jnp
import numpy as np

from v3d_jax.ops import twofloat


def numbers(seed):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=20000) * 10.0 ** rng.uniform(-2, 3, 20000)).astype(np.float32)


def value(x):
    return np.asarray(x.hi, np.float64) + np.asarray(x.lo, np.float64)


def test_cancelling_products_keep_forty_bits():
    # a b - c d with c d close to a b: float32 keeps nothing of it.
    a, b, e = numbers(0), numbers(1), numbers(2) / np.float32(1e6)
    c, d = a + e, b

    @jax.jit
    def cross(a, b, c, d):
        return twofloat.subtract(twofloat.product(a, b), twofloat.product(c, d))

    exact = a.astype(np.float64) * b - c.astype(np.float64) * d
    scale = np.abs(a.astype(np.float64) * b)
    error = np.abs(value(cross(a, b, c, d)) - exact) / scale
    assert error.max() < 2.0**-44
    single = np.asarray(jax.jit(lambda a, b, c, d: a * b - c * d)(a, b, c, d), np.float64)
    assert (np.abs(single - exact) / scale).max() > 2.0**-25


def test_chains_of_operations():
    a, b, c, d = (numbers(k) for k in range(4))

    @jax.jit
    def chain(a, b, c, d):
        p, q = twofloat.product(a, b), twofloat.product(c, d)
        back = twofloat.multiply(twofloat.divide(p, q), q)
        return twofloat.divide(p, q), twofloat.add(back, twofloat.exact(a))

    a, b, c, d = (x.astype(np.float64) for x in (a, b, c, d))
    ratio, total = chain(*(jnp.asarray(x, jnp.float32) for x in (a, b, c, d)))
    np.testing.assert_allclose(value(ratio), a * b / (c * d), rtol=2.0**-42)
    error = np.abs(value(total) - (a * b + a)) / (np.abs(a * b) + np.abs(a))
    assert error.max() < 2.0**-42


def test_results_are_normalized():
    a, b = numbers(5), numbers(6)
    got = jax.jit(lambda a, b: twofloat.add(twofloat.product(a, b), twofloat.exact(a)))(a, b)
    assert (np.abs(got.lo) <= 0.5 * np.spacing(np.abs(got.hi))).all()
    np.testing.assert_array_equal(got.hi, value(got).astype(np.float32))
