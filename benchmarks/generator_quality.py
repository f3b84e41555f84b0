"""What faster sampling costs: PSNR to a 50-step solution from the same noise; see generator.py.

The solution is Heun's method with 50 steps of EDM's schedule, 99 evaluations, guided throughout.
Settings that change the equation, as guidance in an interval does, count as errors too.
"""

import dataclasses
from pathlib import Path
from typing import Any

import generator as benchmark
import jax
import jax.numpy as jnp
import numpy as np

from v3d_jax import pipeline
from v3d_jax.data import preprocess
from v3d_jax.diffusion import guidance, sampler
from v3d_jax.ops import metrics
from v3d_jax.weights import packaged


def candidates(own: sampler.SamplingConfig) -> dict[str, sampler.SamplingConfig]:
    """Settings by name: V3D's, the fast preset, and the preset without each of its parts."""
    euler = sampler.SamplingConfig(
        guidance_min=own.guidance_min,
        guidance_max=own.guidance_max,
        guidance_shape=own.guidance_shape,
    )
    fast = sampler.fast(euler)
    return {
        "Euler, 25 steps": euler,
        "Euler, 10 steps": dataclasses.replace(euler, steps=10),
        "Euler, 25 steps, interval": dataclasses.replace(
            euler, guidance_interval=fast.guidance_interval
        ),
        "fast": fast,
        "fast, guided throughout": dataclasses.replace(fast, guidance_interval=None),
        "fast, by Euler": dataclasses.replace(fast, sampler="euler"),
        "fast, EDM's levels": dataclasses.replace(fast, schedule="edm"),
    }


def compiled_denoisers(
    settings: pipeline.Settings, params: Any, condition: Any, x: Any
) -> tuple[Any, Any]:
    """The guided denoiser and that of the conditional branch, one program each for all solvers."""
    alone = dataclasses.replace(settings.sampling, guidance_min=1.0, guidance_max=1.0)
    made = []
    for sampling in (settings.sampling, alone):
        told = dataclasses.replace(settings, sampling=sampling)

        def denoise(params: Any, branches: Any, x: Any, sigma: Any, told: Any = told) -> Any:
            network, scale = pipeline.networks(told, params).unet, pipeline.frame_scale(told)
            return guidance.denoiser(network, branches, scale)(x, sigma)

        branches = jax.jit(pipeline.branch, static_argnums=0)(told, params, condition)
        given = (params, branches)
        program = jax.jit(denoise).lower(*given, x, jnp.float32(1)).compile()
        made.append(lambda x, sigma, program=program, given=given: program(*given, x, sigma))
    return made[0], made[1]


def solve(
    config: sampler.SamplingConfig, denoisers: tuple[Any, Any], noise: Any
) -> tuple[Any, list[int]]:
    """Latents, and how many evaluations of each kind they took; solvers run step by step."""
    low, high = config.guidance_interval or (0.0, np.inf)
    count = [0, 0]

    def denoise(x: Any, sigma: Any) -> Any:
        kind = 0 if low < float(sigma) <= high else 1
        count[kind] += 1
        with jax.disable_jit(False):
            return denoisers[kind](x, sigma)

    with jax.disable_jit():
        return sampler.sample(config, denoise, noise), count


def main(model: str, activations: Any, picture: Path | None) -> None:
    """Prints a row for each of the settings."""
    unread = packaged.open_model(model)
    # As they would be without settings of its own for fewer steps: one equation for all.
    settings = pipeline.Settings(unread.generator, unread.sampling, activations=activations)
    params = pipeline.read_params(settings, unread)
    source = picture or packaged.ASSETS / "example.png"
    pixels = preprocess.prepare(source, settings.generator.frame_size[1]).image / np.float32(255)
    condition_key, noise_key = pipeline.split_key(jax.random.key(0))
    encode = jax.jit(pipeline.encode_condition, static_argnums=0)
    condition = encode(settings, params, jnp.asarray(pixels)[None], condition_key)
    noise = jax.random.normal(noise_key, (1, *settings.generator.latent_shape))
    denoisers = compiled_denoisers(settings, params, condition, noise)
    decode = jax.jit(pipeline.decode, static_argnums=0)
    tried = candidates(settings.sampling)
    exact = dataclasses.replace(tried["Euler, 25 steps"], steps=50, sampler="heun")
    truth = decode(settings, params, solve(exact, denoisers, noise)[0])
    rows = []
    for name, config in tried.items():
        latents, count = solve(config, denoisers, noise)
        error = metrics.psnr(decode(settings, params, latents), truth).mean()
        rows.append([name, *count, f"{float(error):.2f}"])
    heads = ["settings", "guided evaluations", "others", "PSNR dB to 50 steps of Heun"]
    benchmark.table(heads, rows)
