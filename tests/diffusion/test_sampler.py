"""Gaussian data N(m, v) has D(x; s) = (v x + s^2 m) / (v + s^2).

The ODE then has the solution (x - m) / sqrt(v + s^2) = constant.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.diffusion import sampler, schedule
from v3d_jax.diffusion.sampler import SamplingConfig

MEAN, DEVIATION = 0.3, 0.7
SOLVERS = {"euler": sampler.euler, "heun": sampler.heun, "dpmpp_2m": sampler.dpmpp_2m}


def gaussian_denoiser(x, sigma):
    return (DEVIATION**2 * x + sigma**2 * MEAN) / (DEVIATION**2 + sigma**2)


def exact(x, sigma, sigma_next):
    shrink = np.sqrt((DEVIATION**2 + sigma_next**2) / (DEVIATION**2 + sigma**2))
    return MEAN + shrink * (x - MEAN)


def noise(shape=(2, 3, 2, 2, 4), seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def solve(name, sigmas, x):
    trajectory = sampler.Trajectory(x, jnp.zeros_like(x), jnp.asarray(jnp.inf))
    return SOLVERS[name](gaussian_denoiser, trajectory, sigmas).x


@pytest.mark.golden
def test_euler_equals_the_published_run():
    x = jnp.asarray([1.0, -0.5]).reshape(1, 1, 1, 1, 2)
    result = sampler.sample(SamplingConfig(), lambda x, s: (x + 0.3 * s**2) / (1 + s**2), x)
    np.testing.assert_allclose(result.reshape(-1), [1.1542, -0.1276], atol=6e-5)


@pytest.mark.parametrize(
    ("name", "steps", "tolerance"),
    # Twice the errors found: 9.2e-3, 7.2e-5, 7.4e-5. The schedule is V3D's, from 700 to 0.
    [("euler", 800, 2e-2), ("heun", 800, 1.5e-4), ("dpmpp_2m", 800, 1.5e-4)],
)
def test_whole_schedule_samples_the_gaussian(name, steps, tolerance):
    config = SamplingConfig(steps=steps, sampler=name)
    start = sampler.begin(noise(), jnp.asarray(700.0)).x
    result = sampler.sample(config, gaussian_denoiser, noise())
    np.testing.assert_allclose(result, exact(start, 700.0, 0.0), atol=tolerance)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(name, order):
    """Halving the step divides the error by 2^order, away from float32's rounding."""
    x = 5 * noise()
    errors = []
    for n in (32, 64, 128):
        sigmas = jnp.geomspace(5.0, 0.2, n + 1)
        errors.append(np.abs(solve(name, sigmas, x) - exact(x, 5.0, 0.2)).max())
    rates = np.log2(np.asarray(errors[:-1]) / np.asarray(errors[1:]))
    np.testing.assert_allclose(rates, order, atol=0.25)


def test_align_your_steps_with_two_m_beats_euler_at_ten_steps():
    start = sampler.begin(noise(), jnp.asarray(700.0)).x
    target = exact(start, 700.0, 0.0)

    def error(config):
        return float(jnp.abs(sampler.sample(config, gaussian_denoiser, noise()) - target).max())

    ten = SamplingConfig(steps=10)
    assert error(replace(ten, sampler="dpmpp_2m", schedule="ays")) < 0.5 * error(ten)


@pytest.mark.parametrize(("name", "evaluations"), [("euler", 6), ("heun", 11), ("dpmpp_2m", 6)])
def test_number_of_evaluations_and_no_evaluation_at_zero(name, evaluations):
    seen = []

    def denoise(x, sigma):
        jax.debug.callback(lambda s: seen.append(float(s)), sigma)
        return gaussian_denoiser(x, sigma)

    jax.block_until_ready(sampler.sample(SamplingConfig(steps=6, sampler=name), denoise, noise()))
    jax.effects_barrier()
    assert len(seen) == evaluations
    assert min(seen) > 0


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_the_network_is_compiled_once(name):
    traces = []

    def denoise(x, sigma):
        traces.append(x.shape)
        return jnp.sin(gaussian_denoiser(x, sigma))

    config = SamplingConfig(steps=6, sampler=name)
    lowered = jax.jit(lambda n: sampler.sample(config, denoise, n)).lower(noise())
    assert lowered.as_text().count("stablehlo.sine") == 1


@pytest.mark.parametrize("name", sorted(SOLVERS))
@pytest.mark.parametrize("cut", [1, 4])
def test_a_trajectory_in_parts_equals_the_whole(name, cut):
    config = SamplingConfig(steps=6, sampler=name)
    sigmas = sampler.sigmas(config)
    state = sampler.begin(noise(), sigmas[0])
    state = sampler.advance(config, gaussian_denoiser, state, sigmas[: cut + 1])
    state = sampler.advance(config, gaussian_denoiser, state, sigmas[cut:])
    whole = sampler.sample(config, gaussian_denoiser, noise())
    np.testing.assert_allclose(state.x, whole, rtol=1e-6, atol=1e-6)


def test_initial_variance():
    start = sampler.begin(noise((1, 18, 16, 16, 4)), schedule.EDMSchedule().sigmas(2)[0]).x
    assert float(jnp.std(start)) == pytest.approx(np.sqrt(700**2 + 1), rel=0.02)
