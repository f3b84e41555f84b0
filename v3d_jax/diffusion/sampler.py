"""Solvers of the probability-flow ODE dx/dsigma = (x - D(x; sigma)) / sigma.

Each takes a trajectory at noise level `sigmas[0]` to level `sigmas[-1]`, all steps in one
`lax.scan` that holds the network once. A trajectory can be run in several calls, each with its
part of the levels (neighbouring parts share a level), with the same result. State is float32.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from v3d_jax.diffusion import guidance, schedule
from v3d_jax.diffusion.guidance import DenoiseFn


@dataclass(frozen=True)
class SamplingConfig:
    """How latents are drawn; the defaults are the published release's (25 Euler steps)."""

    steps: int = 25
    sampler: Literal["euler", "heun", "dpmpp_2m"] = "euler"
    schedule: Literal["edm", "ays"] = "edm"
    sigma_min: float = 0.002
    sigma_max: float = 700.0
    rho: float = 7.0
    guidance_min: float = 3.5
    guidance_max: float = 3.5
    guidance_shape: guidance.Shape = "linear"
    # Noise levels, above the first and up to the second, at which there is guidance; None is all.
    guidance_interval: tuple[float, float] | None = None


def fast(config: SamplingConfig) -> SamplingConfig:
    """Settings for speed: nine steps of Align Your Steps by DPM-Solver++(2M), six of them guided.

    There is no guidance at the first two of the nine levels, where it costs variety, nor at the
    last, where it changes nothing that is seen (arXiv 2404.07724): the work of 7.5 guided steps.
    """
    return replace(
        config, steps=9, sampler="dpmpp_2m", schedule="ays", guidance_interval=(0.2, 20.0)
    )


class Trajectory(NamedTuple):
    """A sample between two steps, and the step before, which multistep solvers look back to."""

    x: Float[Array, "b t h w c"]
    denoised: Float[Array, "b t h w c"]
    sigma: Float[Array, ""]  # at which `denoised` was evaluated; inf before the first step


def sigmas(config: SamplingConfig) -> Float[Array, " n"]:
    """The noise levels of the settings: steps + 1 of them, the last one 0."""
    if config.schedule == "ays":
        return schedule.align_your_steps(config.steps)
    edm = schedule.EDMSchedule(config.sigma_min, config.sigma_max, config.rho)
    return edm.sigmas(config.steps)


def begin(noise: Float[Array, "b t h w c"], sigma: Float[Array, ""]) -> Trajectory:
    """Scales standard normal noise to the variance sigma^2 + 1 of noisy data."""
    x = noise.astype(jnp.float32) * jnp.sqrt(1.0 + sigma**2)
    return Trajectory(x, jnp.zeros_like(x), jnp.asarray(jnp.inf, jnp.float32))


def euler(denoise: DenoiseFn, trajectory: Trajectory, sigmas: Float[Array, " n"]) -> Trajectory:
    """Euler's method: EDM (arXiv 2206.00364), algorithm 1 without lines 6 to 8; V3D's sampler.

    One evaluation a step.
    """

    def step(x, levels):
        sigma, sigma_next = levels
        d = (x - denoise(x, sigma)) / sigma
        return x + (sigma_next - sigma) * d, None

    x, _ = jax.lax.scan(step, trajectory.x, (sigmas[:-1], sigmas[1:]))
    return trajectory._replace(x=x)


def heun(denoise: DenoiseFn, trajectory: Trajectory, sigmas: Float[Array, " n"]) -> Trajectory:
    """Heun's second-order method: EDM (arXiv 2206.00364), algorithm 1.

    Two evaluations a step, one in a step to 0. The scan runs over evaluations rather than steps,
    each of which moves by d <- (1 - w) d_before + w d: w is 1 for the predictor, 1/2 for the
    corrector, and 0 for the corrector of a step to 0, which is not evaluated.
    """
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    at = jnp.stack([sigma, sigma_next], axis=-1).reshape(-1)
    h = jnp.repeat(sigma_next - sigma, 2)
    w_corrector = jnp.where(sigma_next > 0, 0.5, 0.0)
    w = jnp.stack([jnp.ones_like(sigma), w_corrector], axis=-1).reshape(-1)
    corrects = jnp.arange(at.shape[0]) % 2 == 1

    def evaluate(carry, point):
        x, x_at, d_before = carry
        sigma, h, w, corrects = point
        denoised = jax.lax.cond(sigma > 0, denoise, lambda x, _: x, x_at, sigma)
        d = (x_at - denoised) / jnp.where(sigma > 0, sigma, 1.0)
        d = (1 - w) * d_before + w * d
        x_next = x + h * d
        return (jnp.where(corrects, x_next, x), x_next, d), None

    start = (trajectory.x, trajectory.x, jnp.zeros_like(trajectory.x))
    (x, _, _), _ = jax.lax.scan(evaluate, start, (at, h, w, corrects))
    return trajectory._replace(x=x)


def dpmpp_2m(denoise: DenoiseFn, trajectory: Trajectory, sigmas: Float[Array, " n"]) -> Trajectory:
    """DPM-Solver++(2M): arXiv 2211.01095, algorithm 2, with lambda = -ln sigma and alpha = 1.

    One evaluation a step, second order by looking back one step. The first step and a step to 0
    are of first order.
    """
    before = jnp.concatenate([trajectory.sigma[None], sigmas[:-2]])

    def step(carry, levels):
        x, denoised_before = carry
        sigma_before, sigma, sigma_next = levels
        denoised = denoise(x, sigma)
        h = jnp.log(sigma / sigma_next)
        h_before = jnp.log(sigma_before / sigma)
        # 1 / 2r of the paper: 0 where there is no step before, or no finite step ahead.
        weight = jnp.where(sigma_next > 0, h / (2 * h_before), 0.0)
        slope = (1 + weight) * denoised - weight * denoised_before
        ratio = sigma_next / sigma
        return (ratio * x + (1 - ratio) * slope, denoised), None

    start = (trajectory.x, trajectory.denoised)
    (x, denoised), _ = jax.lax.scan(step, start, (before, sigmas[:-1], sigmas[1:]))
    return Trajectory(x, denoised, sigmas[-2])


def advance(
    config: SamplingConfig,
    denoise: DenoiseFn,
    trajectory: Trajectory,
    sigmas: Float[Array, " n"],
) -> Trajectory:
    """Runs the sampler that the settings name over the given levels."""
    solver = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}[config.sampler]
    return solver(denoise, trajectory, sigmas)


def sample(
    config: SamplingConfig, denoise: DenoiseFn, noise: Float[Array, "b t h w c"]
) -> Float[Array, "b t h w c"]:
    """Latents from standard normal noise: the whole schedule of the settings in one scan."""
    levels = sigmas(config)
    return advance(config, denoise, begin(noise, levels[0]), levels).x
