"""PSNR and SSIM against their definitions, written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.ops import metrics, target


def pair(shape=(17, 19, 3), noise=0.1):
    rng = np.random.default_rng(0)
    a = rng.uniform(size=shape).astype(np.float32)
    b = np.clip(a + noise * rng.normal(size=shape), 0, 1).astype(np.float32)
    return a, b


def ssim_by_definition(a, b):
    """One window at a time, as the paper's equation 13 reads."""
    offsets = np.arange(11) - 5.0
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for c in range(3):
        for y in range(a.shape[0] - 10):
            for x in range(a.shape[1] - 10):
                p = a[y : y + 11, x : x + 11, c].astype(np.float64)
                q = b[y : y + 11, x : x + 11, c].astype(np.float64)
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                values.append(
                    (2 * mp * mq + 1e-4)
                    * (2 * cov + 9e-4)
                    / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4))
                )
    return np.mean(values)


def test_psnr_of_a_constant_offset():
    a = jnp.full((4, 5, 3), 0.5)
    np.testing.assert_allclose(metrics.psnr(a, a + 0.1), 20.0, atol=1e-4)
    assert metrics.psnr(a, a) == jnp.inf


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_ssim_equals_its_definition(platform):
    a, b = pair()
    with target.traced_for(platform):
        got = metrics.ssim(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(got, ssim_by_definition(a, b), atol=2e-6)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_ssim_of_flat_bright_images_keeps_precision(platform):
    a, b = pair(noise=0.003)
    a, b = 0.99 + 0.01 * a, 0.99 + 0.01 * b
    with target.traced_for(platform):
        got = metrics.ssim(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(got, ssim_by_definition(a, b), atol=3e-4)


def test_gradients_on_gpus_are_those_of_the_banded_matrices():
    pairs = [jnp.asarray(x) for x in pair((2, 17, 19, 3))]
    found = []
    for platform in ("cpu", "gpu"):
        with target.traced_for(platform):
            found.append(jax.grad(lambda a, b: metrics.ssim(a, b).sum(), argnums=(0, 1))(*pairs))
    for banded, shifted in zip(*found, strict=True):
        np.testing.assert_allclose(shifted, banded, atol=1e-5 * np.abs(banded).max())


def test_ssim_is_symmetric_one_for_equal_and_low_for_inverted():
    a, b = (jnp.asarray(x) for x in pair())
    np.testing.assert_allclose(metrics.ssim(a, a), 1.0, atol=1e-5)
    np.testing.assert_allclose(metrics.ssim(a, b), metrics.ssim(b, a), atol=1e-6)
    assert metrics.ssim(a, 1 - a) < 0


def test_leading_axes_are_kept():
    a, b = (jnp.asarray(x) for x in pair((2, 3, 12, 13, 3)))
    for metric in (jax.jit(metrics.psnr), jax.jit(metrics.ssim)):
        both = metric(a, b)
        assert both.shape == (2, 3)
        np.testing.assert_allclose(both[1, 2], metric(a[1, 2], b[1, 2]), rtol=1e-5)


def test_ssim_refuses_images_below_the_window():
    with pytest.raises(ValueError, match="at least 11 x 11"):
        metrics.ssim(jnp.zeros((10, 20, 3)), jnp.zeros((10, 20, 3)))


@pytest.mark.parity
def test_equal_to_scikit_image():
    skimage = pytest.importorskip("skimage.metrics")
    a, b = pair((40, 33, 3))
    expected = skimage.structural_similarity(
        a, b, data_range=1.0, channel_axis=-1, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False,
    )  # fmt: skip
    np.testing.assert_allclose(metrics.ssim(jnp.asarray(a), jnp.asarray(b)), expected, atol=1e-5)
    expected = skimage.peak_signal_noise_ratio(a, b, data_range=1.0)
    np.testing.assert_allclose(metrics.psnr(jnp.asarray(a), jnp.asarray(b)), expected, rtol=1e-5)
