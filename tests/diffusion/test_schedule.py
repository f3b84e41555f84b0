import numpy as np
import pytest

from v3d_jax.diffusion import schedule

PUBLISHED = [
    700, 545.729, 421.569, 322.454, 244.023, 182.547, 134.854, 98.2671, 70.5409, 49.8098, 34.5367,
    23.4675, 15.59, 10.0971, 6.35427, 3.8697, 2.26912, 1.27318, 0.678146, 0.339378, 0.157405,
    0.0663991, 0.0248026, 0.00788252, 0.002, 0,
]  # fmt: skip


@pytest.mark.golden
def test_edm_levels_equal_the_published_ones():
    np.testing.assert_allclose(schedule.EDMSchedule().sigmas(25), PUBLISHED, rtol=5e-6)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_edm_levels_are_equally_spaced_in_the_power(n):
    sigmas = np.asarray(schedule.EDMSchedule(0.1, 50.0, 3.0).sigmas(n), np.float64)
    assert sigmas.shape == (n + 1,)
    assert sigmas[0] == pytest.approx(50.0, rel=1e-6)
    assert sigmas[-1] == 0
    np.testing.assert_allclose(np.diff(sigmas[:-1] ** (1 / 3), n=2), 0, atol=1e-6)


def test_align_your_steps_ends_clean_and_interpolates_log_linearly():
    ten = np.asarray(schedule.align_your_steps())
    np.testing.assert_allclose(
        ten, [700, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0], rtol=1e-6
    )
    twenty = np.asarray(schedule.align_your_steps(20))
    np.testing.assert_allclose(twenty[:-1:2], ten[:-1], rtol=1e-5)
    np.testing.assert_allclose(twenty[1], np.sqrt(700 * 54.5), rtol=1e-5)
    assert np.all(np.diff(twenty) < 0)
