"""Outputs of our networks and of the peers' with the same random weights; see generator.py.

Limits: in float32 0.001 of absolute and 0.0001 of relative error (of the norm), in bfloat16 0.02 of
relative error, both against the peer in float32. Values have a deviation of about 1.
"""

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import generator as benchmark
import generator_peer
import jax
import jax.numpy as jnp
import numpy as np
import torch

from v3d_jax import pipeline
from v3d_jax.diffusion.guidance import Condition
from v3d_jax.nn import generator
from v3d_jax.ops import compiling, metrics
from v3d_jax.weights import folder

ABSOLUTE, RELATIVE, HALF = 1e-3, 1e-4, 2e-2
Arrays = dict[str, np.ndarray]


def compiled(settings: pipeline.Settings, params: Any) -> Callable[..., Any]:
    """A method of our networks as a program of the weights; float32 is not rounded on the way."""

    def call(method: Callable[..., Any], *args: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            program = jax.jit(
                lambda p, *a: method(pipeline.networks(settings, p), *a),
                compiler_options=compiling.OPTIONS,
            )
            return jax.tree.map(np.asarray, program(params, *args))

    return call


def our_outputs(settings: pipeline.Settings, params: Any, given: Arrays) -> Arrays:
    """Every network on the inputs of `arrays`."""
    call = compiled(settings, params)
    noise = jnp.full(given["x"].shape[:2], given["noise"])
    unet = (given["x"], noise, given["context"][:, None], pipeline.vector(settings, 2))
    return {
        "UNet": call(lambda n, *args: n.unet(*args), *unet),
        "encoder": call(lambda n, x: n.autoencoder.encode(x).mean, given["image"]),
        "temporal decoder": call(lambda n, z: n.autoencoder.decode(z), given["latents"])[0],
        "image tower": call(lambda n, x: n.vision.encode(x)[:, 0], given["pixels"]),
    }


@torch.no_grad()
def peer_outputs(peer: generator_peer.Peer, scalars: tuple[float, ...], given: Arrays) -> Arrays:
    """The same by the peer."""
    x, image, latents, pixels = (
        generator_peer.to_torch(given[name]).to(peer.dtype)
        for name in ("x", "image", "latents", "pixels")
    )
    context = torch.from_numpy(given["context"]).to(x)
    noise = torch.tensor(float(given["noise"]), device=x.device)
    vector = torch.tensor([scalars] * 2, device=x.device)
    tower = peer.tower(pixels).image_embeds.float().cpu().numpy()
    images = {
        "UNet": peer.unet(x, noise, context, vector).sample,
        "encoder": peer.vae.encode(image).latent_dist.mean,
        "temporal decoder": peer.vae.decode(latents[0], num_frames=latents.shape[1]).sample,
    }
    return {name: generator_peer.to_numpy(out) for name, out in images.items()} | {
        "image tower": tower
    }


def draw(settings: pipeline.Settings, image: Any) -> Arrays:
    """Inputs of unit deviation for all networks."""
    rng = np.random.default_rng(3)
    config = settings.generator
    given, pixels, _ = benchmark.inputs(settings, image)
    frames, height, width, channels = config.latent_shape
    shapes = {
        "x": (2, frames, height, width, 2 * channels),
        "context": (2, 1, config.unet.context_dim),
        "latents": (1, *config.latent_shape),
    }
    drawn = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return {
        **drawn,
        "noise": np.float32(-0.3),
        "image": np.asarray(given),
        "pixels": np.asarray(pixels),
    }


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference over that of what was expected."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def halved(params: Any) -> Any:
    """The weights as a model loaded for bfloat16 holds them."""
    cast = generator.cast_weights(folder.flatten(params))
    leaves = [
        leaf.astype(jnp.bfloat16) if name in cast else leaf
        for name, leaf in folder.flatten(params).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def frames_of(settings: pipeline.Settings, params: Any, image: Any, noise: Any) -> np.ndarray:
    """Our frames, the picture's latent being the posterior's mean plus the peer's noise."""
    call = compiled(settings, params)
    pixels, tower, added = benchmark.inputs(settings, image)
    latent = call(lambda n, x: n.autoencoder.encode(x).mean, pixels) + added
    context = call(lambda n, x: n.vision.encode(x), tower).astype(np.float32)
    condition = Condition(jnp.asarray(context), latent, pipeline.vector(settings, 1))
    with jax.default_matmul_precision("highest"):
        levels = pipeline.begin(settings, 1, jax.random.key(0))[1]
        start = pipeline.sampler.begin(noise, levels[0])
        advance, decode = (
            jax.jit(stage, static_argnums=0, compiler_options=compiling.OPTIONS)
            for stage in (pipeline.advance, pipeline.decode)
        )
        for i in range(len(levels) - 1):
            start = advance(settings, params, condition, start, levels[i : i + 2])
        return np.asarray(decode(settings, params, start.x)[0])


def peer_frames(
    peer: generator_peer.Peer, settings: pipeline.Settings, image: Any, noise: Any
) -> np.ndarray:
    """The peer's frames in its own loop."""
    given = (generator_peer.to_torch(x) for x in benchmark.inputs(settings, image))
    condition = peer.encode(*given, benchmark.scalar_values(settings))
    levels = np.asarray(pipeline.sampler.sigmas(settings.sampling))
    scale = torch.from_numpy(pipeline.frame_scale(settings)).to(generator_peer.device())
    latents = peer.sample(levels, generator_peer.to_torch(noise), condition, scale)
    return generator_peer.to_numpy(peer.decode(latents))


def main(settings: pipeline.Settings, image: Any) -> None:
    """Prints a row a network and the PSNR of samples; exits with status 1 beyond a limit."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    exact = dataclasses.replace(settings, activations="float32")
    half = dataclasses.replace(settings, activations="bfloat16")
    peer = generator_peer.Peer(settings.generator, torch.float32)
    peer.randomise()
    params = peer.weights(folder.abstract_params(settings.generator))
    small, given = halved(params), draw(settings, image)
    scalars = benchmark.scalar_values(settings)
    expected = peer_outputs(peer, scalars, given)
    noise = jax.random.normal(jax.random.key(5), (1, *settings.generator.latent_shape))
    sample = peer_frames(peer, settings, image, noise)
    peer.to(torch.bfloat16)
    theirs = peer_outputs(peer, scalars, given)
    their_sample = peer_frames(peer, settings, image, noise)
    del peer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what it keeps for later is not JAX's to take
    ours, ours_half = our_outputs(exact, params, given), our_outputs(half, small, given)
    rows, beyond = [], []
    for name, x in expected.items():
        far = float(np.abs(ours[name] - x).max())
        errors = [relative(out[name], x) for out in (ours, ours_half, theirs)]
        rows.append([name, f"{x.std():.2f}", *(f"{e:.1e}" for e in (far, *errors))])
        if far > ABSOLUTE or errors[0] > RELATIVE or errors[1] > HALF:
            beyond.append(name)
    benchmark.table(
        ["network", "deviation", "float32 largest", "float32 relative", "bfloat16", "peer's"], rows
    )
    made = {
        "ours, float32": frames_of(exact, params, image, noise),
        "ours, bfloat16": frames_of(half, small, image, noise),
        "peer, bfloat16": their_sample,
    }
    rows = [[name, f"{float(metrics.psnr(x, sample).mean()):.1f}"] for name, x in made.items()]
    benchmark.table(["whole sample against the peer in float32", "PSNR dB"], rows)
    if beyond:
        raise SystemExit(f"beyond the limits: {', '.join(beyond)}")
