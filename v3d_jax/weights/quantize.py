"""Symmetric 8-bit quantisation of kernels, one scale per output channel.

An output channel is an entry of the last axis, as flax lays out linear [in, out] and convolution
[..., in, out] kernels. A kernel w is kept as integers q in [-127, 127] and a float32 scale s, with
w ~ q * s. Everything that is not a large kernel (norms, biases, embeddings, blend factors, the
first and last convolutions of small networks) is worth more than the bytes it costs and stays
floating point.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int8

LEVELS = 127
MIN_SIZE = 16384
Clip = Literal["max", "mse"]


class Quantized(NamedTuple):
    """A quantised kernel: int8 codes in the kernel's shape and float32 scales, one per channel."""

    codes: Int8[np.ndarray, "*shape"]
    scale: Float32[np.ndarray, " out"]


def applies(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the tensor of this dotted name and shape is stored as int8: large kernels only."""
    return name.split(".")[-1] == "kernel" and len(shape) >= 2 and math.prod(shape) >= MIN_SIZE


def quantize(kernel: Float[np.ndarray, "*rest out"], clip: Clip = "mse") -> Quantized:
    """Rounds each output channel to 8 bits.

    `clip="max"` maps the channel's largest magnitude to 127, so no weight is off by more than half
    a step (scale / 2). `clip="mse"` also tries clipping the channel's outliers at fractions of that
    magnitude, and keeps per channel the one with the least mean squared error. A channel of zeros
    has scale 0. Raises ValueError for a kernel that is not finite.
    """
    flat = np.asarray(kernel, np.float32).reshape(-1, kernel.shape[-1])
    if not np.isfinite(flat).all():
        raise ValueError("cannot quantise a kernel with NaN or infinite weights")
    largest = np.abs(flat).max(axis=0)
    scale = largest / LEVELS
    if clip == "mse":
        scale = scale * _best_fraction(flat, scale)
    return Quantized(_round(flat, scale).astype(np.int8).reshape(kernel.shape), scale)


def dequantize(quantized: Quantized) -> Float32[np.ndarray, "*rest out"]:
    """The float32 kernel that the integers and scales stand for."""
    return quantized.codes.astype(np.float32) * quantized.scale


def _round(flat: np.ndarray, scale: np.ndarray) -> np.ndarray:
    steps = flat / np.where(scale > 0, scale, 1)
    return np.clip(np.rint(steps), -LEVELS, LEVELS)


def _best_fraction(flat: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The fraction of the largest magnitude to clip at, per channel, that costs the least error."""
    best = np.ones_like(scale)
    least = np.full_like(scale, np.inf)
    for fraction in np.linspace(1.0, 0.5, 26, dtype=np.float32):
        error = np.square(_round(flat, scale * fraction) * (scale * fraction) - flat).sum(axis=0)
        better = error < least
        best, least = np.where(better, fraction, best), np.where(better, error, least)
    return best
