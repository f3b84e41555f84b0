"""Arithmetic on unevaluated sums of two float32 numbers: about 48 bits without float64.

A rasterizer decides by the sign of small differences of large products. float32 is off by about
1e-4 pixels there and float64 is switched off in JAX by default (and absent on TPU).

Compilers may contract a product and a sum into one fused operation, which breaks the textbook
product of Dekker (Numer. Math. 18, 1971). Here every raw product is exact: operands are split by
a bit mask into 12-bit halves, so contraction changes nothing. Sums follow Knuth's two-sum (The
Art of Computer Programming, vol. 2, 4.2.2).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


class TwoFloat(NamedTuple):
    """The number hi + lo; hi is the sum rounded to float32."""

    hi: Float[Array, "*n"]
    lo: Float[Array, "*n"]


def exact(value: Float[Array, "*n"]) -> TwoFloat:
    """A float32 number as it is."""
    return TwoFloat(value, jnp.zeros_like(value))


def two_sum(a: Float[Array, "*#n"], b: Float[Array, "*#n"]) -> TwoFloat:
    """a + b without error."""
    total = a + b
    part = total - a
    return TwoFloat(total, (a - (total - part)) + (b - part))


def product(a: Float[Array, "*#n"], b: Float[Array, "*#n"]) -> TwoFloat:
    """a * b to about 2**-46 of its size."""
    (ah, al), (bh, bl) = _halves(a), _halves(b)
    middle = two_sum(ah * bl, al * bh)
    first = _normalize(ah * bh, middle.hi)
    return _normalize(first.hi, first.lo + (middle.lo + al * bl))


def add(x: TwoFloat, y: TwoFloat) -> TwoFloat:
    """x + y."""
    high, low = two_sum(x.hi, y.hi), two_sum(x.lo, y.lo)
    first = _normalize(high.hi, high.lo + low.hi)
    return _normalize(first.hi, first.lo + low.lo)


def negative(x: TwoFloat) -> TwoFloat:
    """-x."""
    return TwoFloat(-x.hi, -x.lo)


def subtract(x: TwoFloat, y: TwoFloat) -> TwoFloat:
    """x - y."""
    return add(x, negative(y))


def multiply(x: TwoFloat, y: TwoFloat) -> TwoFloat:
    """x * y."""
    high = product(x.hi, y.hi)
    return _normalize(high.hi, high.lo + (x.hi * y.lo + x.lo * y.hi))


def divide(x: TwoFloat, y: TwoFloat) -> TwoFloat:
    """x / y, by one Newton correction of the float32 quotient."""
    quotient = exact(x.hi / y.hi)
    rest = subtract(x, multiply(quotient, y))
    return add(quotient, exact(rest.hi / y.hi))


def less(x: TwoFloat, y: TwoFloat) -> Bool[Array, "*n"]:
    """x < y."""
    return (x.hi < y.hi) | ((x.hi == y.hi) & (x.lo < y.lo))


def equal(x: TwoFloat, y: TwoFloat) -> Bool[Array, "*n"]:
    """x == y."""
    return (x.hi == y.hi) & (x.lo == y.lo)


def part(x: TwoFloat, index: Any) -> TwoFloat:
    """x[index]."""
    return TwoFloat(x.hi[index], x.lo[index])


def _halves(a: Float[Array, "*n"]) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    bits = lax.bitcast_convert_type(a, jnp.uint32) & jnp.uint32(0xFFFFF000)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return high, a - high


def _normalize(a: Float[Array, "*n"], b: Float[Array, "*n"]) -> TwoFloat:
    """a + b without error where |a| >= |b|."""
    total = a + b
    return TwoFloat(total, b - (total - a))
