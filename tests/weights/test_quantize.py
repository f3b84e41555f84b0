"""Eight bits per output channel: error bounds, clipping, and which tensors it is for."""

import numpy as np
import pytest

from v3d_jax.weights import quantize


def kernel(shape=(3, 3, 40, 7)):
    rng = np.random.default_rng(0)
    spread = 10.0 ** rng.uniform(-4, 1, shape[-1])
    return (rng.normal(size=shape) * spread).astype(np.float32)


def error(weights, clip):
    return quantize.dequantize(quantize.quantize(weights, clip)) - weights


def test_no_weight_is_off_by_more_than_half_a_step():
    weights = kernel()
    quantized = quantize.quantize(weights, "max")
    assert quantized.codes.dtype == np.int8
    assert quantized.codes.shape == weights.shape
    assert quantized.scale.shape == (7,)
    bound = quantized.scale * 0.5 * (1 + 1e-5)
    assert (np.abs(error(weights, "max")) <= bound).all()
    np.testing.assert_array_equal(np.abs(quantized.codes).max(axis=(0, 1, 2)), 127)


def test_codes_are_symmetric():
    weights = kernel()
    plus, minus = quantize.quantize(weights), quantize.quantize(-weights)
    np.testing.assert_array_equal(plus.codes, -minus.codes)
    assert plus.codes.min() >= -127


def test_least_squares_clipping_never_costs_and_pays_for_outliers():
    weights = kernel((512, 7))
    weights[0] = 12 * weights.std(axis=0)
    by_max = np.square(error(weights, "max")).sum(axis=0)
    by_mse = np.square(error(weights, "mse")).sum(axis=0)
    assert (by_mse <= by_max).all()

    # A Gaussian channel of a million weights is better off without its last outliers.
    many = np.random.default_rng(1).normal(size=(1_000_000, 1)).astype(np.float32)
    assert np.square(error(many, "mse")).sum() < 0.97 * np.square(error(many, "max")).sum()


def test_relative_error_of_gaussian_kernels_is_under_one_percent():
    weights = kernel((9 * 64, 32))
    noise = np.square(error(weights, "mse")).sum(axis=0) / np.square(weights).sum(axis=0)
    assert np.sqrt(noise).max() < 0.01


def test_channels_of_zeros_stay_zero():
    weights = kernel((40, 3))
    weights[:, 1] = 0
    restored = quantize.dequantize(quantize.quantize(weights))
    np.testing.assert_array_equal(restored[:, 1], 0)
    assert (restored[:, 0] != 0).any()


def test_unfinite_weights_are_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize.quantize(np.full((4, 2), np.nan, np.float32))


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("unet.mid.conv.kernel", (3, 3, 64, 64), True),
        ("unet.linear.kernel", (128, 128), True),
        ("unet.conv_in.kernel", (3, 3, 8, 64), False),
        ("unet.norm.scale", (65536,), False),
        ("vision.position_embedding", (257, 1024), False),
        ("unet.linear.bias", (65536,), False),
    ],
)
def test_only_large_kernels_are_quantised(name, shape, expected):
    assert quantize.applies(name, shape) is expected
