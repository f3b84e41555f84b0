import functools
from dataclasses import replace

import fixtures
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
import tiny_generator
from PIL import Image

from v3d_jax import errors, pipeline
from v3d_jax.data import preprocess
from v3d_jax.diffusion import guidance
from v3d_jax.diffusion.sampler import SamplingConfig
from v3d_jax.nn import conditioner, generator
from v3d_jax.weights import folder

SAMPLING = SamplingConfig(steps=3, sampler="dpmpp_2m", guidance_min=1.0, guidance_max=2.0)
SETTINGS = pipeline.Settings(tiny_generator.CONFIG, SAMPLING)


@pytest.fixture(scope="module")
def params():
    return tiny_generator.params()


@pytest.fixture(scope="module")
def image():
    return jax.random.uniform(jax.random.key(7), (16, 16, 3))


@pytest.fixture(scope="module")
def orbit():
    return jax.jit(pipeline.image_to_orbit, static_argnums=0)


@pytest.fixture(scope="module")
def fast_orbit():
    """The same compiled in a quarter of the time, where the production program is not the point."""
    return fixtures.jit(pipeline.image_to_orbit, static_argnums=0)


def test_the_whole_is_one_jitted_function_of_its_key(params, image, orbit, key):
    frames = orbit(SETTINGS, params, image, key)
    assert frames.shape == (3, 16, 16, 3)
    assert frames.dtype == jnp.float32
    assert 0.0 <= float(frames.min()) < float(frames.max()) <= 1.0
    np.testing.assert_array_equal(frames, orbit(SETTINGS, params, image, key))
    other = orbit(SETTINGS, params, image, jax.random.key(1))
    assert float(jnp.abs(frames - other).max()) > 0.01
    turned = orbit(SETTINGS, params, image[::-1], key)
    assert float(jnp.abs(frames - turned).max()) > 0.01


def test_stages_step_by_step_give_the_whole(params, image, fast_orbit, key):
    """What the command line does, one step at a time, is what the one function does."""
    condition_key, noise_key = pipeline.split_key(key)
    encode = fixtures.jit(pipeline.encode_condition, static_argnums=0)
    advance = fixtures.jit(pipeline.advance, static_argnums=0)
    condition = encode(SETTINGS, params, image[None], condition_key)
    condition = fixtures.jit(pipeline.branch, static_argnums=0)(SETTINGS, params, condition)
    trajectory, levels = pipeline.begin(SETTINGS, 1, noise_key)
    for i in range(len(levels) - 1):
        trajectory = advance(SETTINGS, params, condition, trajectory, levels[i : i + 2])
    frames = fixtures.jit(pipeline.decode, static_argnums=0)(SETTINGS, params, trajectory.x)[0]
    np.testing.assert_allclose(frames, fast_orbit(SETTINGS, params, image, key), atol=1e-4)


def test_bfloat16_activations_stay_close_and_return_float32(params, key):
    latents = jax.random.normal(key, (1, 3, 8, 8, 4))
    decode = fixtures.jit(pipeline.decode, static_argnums=0)
    half = decode(replace(SETTINGS, activations="bfloat16"), params, latents)
    assert half.dtype == jnp.float32
    difference = jnp.abs(half - decode(SETTINGS, params, latents))
    assert 0 < float(difference.mean()) < 0.03


def test_cross_attention_to_one_token_is_computed_once_a_run(key):
    """No equation of a step has the tokens' 11 channels, nor any inside the scan over steps."""
    settings = replace(
        SETTINGS,
        generator=replace(
            tiny_generator.CONFIG,
            vision=replace(tiny_generator.CONFIG.vision, output_dim=11, output="pooled"),
            unet=replace(tiny_generator.CONFIG.unet, context_dim=11),
        ),
    )
    params = folder.abstract_params(settings.generator)
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    condition = jax.eval_shape(
        functools.partial(pipeline.encode_condition, settings), params, image, key
    )
    assert condition.context.shape == (1, 1, 11)
    made = jax.eval_shape(functools.partial(pipeline.branch, settings), params, condition)
    start, levels = pipeline.begin(settings, 1, key)

    def of_tokens(jaxpr):
        return [
            equation
            for equation in jaxprs.equations(jaxpr)
            if equation.primitive.name == "dot_general"
            and any(11 in x.aval.shape for x in equation.invars)
        ]

    step = jax.make_jaxpr(functools.partial(pipeline.advance, settings))
    alone = step(params, condition, start, levels[:2]).jaxpr
    assert len(of_tokens(alone)) == 2  # values of both cross-attentions
    assert of_tokens(step(params, made, start, levels[:2]).jaxpr) == []
    whole = jax.make_jaxpr(functools.partial(pipeline.sample_latents, settings))
    whole = whole(params, condition, key).jaxpr
    (scan,) = [x for x in jaxprs.equations(whole) if x.primitive.name == "scan"]
    assert of_tokens(scan.params["jaxpr"].jaxpr) == []
    assert len(of_tokens(whole)) == 2


@pytest.mark.slow
def test_weights_held_in_bfloat16_give_the_same_bits(params, image, orbit, key, tmp_path):
    """A norm's scale rounded too would show, and a kernel left in float32 weighs twice."""
    folder.save(tmp_path / "tiny", tiny_generator.CONFIG, SAMPLING, params)
    model = pipeline.load(tmp_path / "tiny", activations="bfloat16")
    held = folder.flatten(model.params)
    large = {name: leaf for name, leaf in held.items() if leaf.size > 256}
    assert len(large) > 30
    assert {leaf.dtype for leaf in large.values()} == {jnp.dtype(jnp.bfloat16)}
    frames = pipeline.generate_orbit(model, image, key)
    wide = orbit(model.settings, params, image, key)
    np.testing.assert_array_equal(frames, wide)


def test_a_notebook_gives_the_frames_of_the_pure_function(params, orbit, key, tmp_path, capsys):
    """From a path, an opened picture and an array, with the model's own sampling settings."""
    folder.save(tmp_path / "tiny", tiny_generator.CONFIG, SAMPLING, params)
    model = pipeline.load(tmp_path / "tiny")
    assert model.settings == SETTINGS
    rgb = np.full((40, 40, 3), 250, np.uint8)
    rgb[10:30, 12:28] = (200, 60, 30)
    Image.fromarray(rgb).save(tmp_path / "toy.png")
    frames = pipeline.generate_orbit(model, tmp_path / "toy.png", key)
    assert "note: " in capsys.readouterr().err  # that the background was guessed
    prepared = preprocess.prepare(tmp_path / "toy.png", 16).image / np.float32(255.0)
    np.testing.assert_array_equal(frames, orbit(SETTINGS, params, jnp.asarray(prepared), key))
    opened = pipeline.generate_orbit(model, Image.open(tmp_path / "toy.png"), key)
    np.testing.assert_array_equal(opened, frames)
    np.testing.assert_array_equal(pipeline.generate_orbit(model, prepared, key), frames)


def test_a_notebook_is_told_what_cannot_be_used(params, image, key):
    model = pipeline.Model(SETTINGS, params)
    with pytest.raises(errors.UserError, match="16 x 8 pixels was given, the model takes 16 x 16"):
        pipeline.generate_orbit(model, image[:8], key)
    wide = replace(SETTINGS, generator=replace(tiny_generator.CONFIG, image_size=(16, 32)))
    with pytest.raises(errors.UserError, match="32 x 16 frames"):
        pipeline.generate_orbit(model._replace(settings=wide), "toy.png", key)


def test_low_memory_gives_the_same_frames(params, image, fast_orbit, key):
    low = replace(SETTINGS, low_memory=True)
    frames = fast_orbit(low, params, image, key)
    np.testing.assert_allclose(frames, fast_orbit(SETTINGS, params, image, key), atol=1e-5)


@pytest.mark.slow
def test_low_memory_takes_less_in_a_step_and_in_decoding(params, key):
    """A step has half the batch. Of so small a decoder a few activations are most."""
    twelve = replace(SETTINGS, generator=replace(tiny_generator.CONFIG, num_frames=12))
    low = replace(twelve, low_memory=True)
    start, levels = pipeline.begin(twelve, 1, key)
    condition = guidance.Condition(
        jnp.zeros((1, 1, 8)), jnp.zeros((1, 8, 8, 4)), pipeline.vector(twelve, 1)
    )

    def temporary(stage, settings, *arguments):
        lowered = fixtures.jit(stage, static_argnums=0).lower(settings, params, *arguments)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    step = (condition, start, levels[:2])
    cases = ((pipeline.advance, step, 0.65), (pipeline.decode, (start.x,), 0.8))
    for stage, given, share in cases:
        assert temporary(stage, low, *given) < share * temporary(stage, twelve, *given)


def test_low_memory_decodes_frames_alone_in_turn(params, key):
    alone = replace(SETTINGS.generator.autoencoder, frames_alone=True)
    settings = replace(SETTINGS, generator=replace(SETTINGS.generator, autoencoder=alone))
    latents = jax.random.normal(key, (2, 3, 8, 8, 4))
    decode = fixtures.jit(pipeline.decode, static_argnums=0)
    expected = decode(settings, params, latents)
    assert float(jnp.abs(expected - decode(SETTINGS, params, latents)).max()) > 1e-3
    low = decode(replace(settings, low_memory=True), params, latents)
    np.testing.assert_allclose(low, expected, atol=1e-5)


def test_low_memory_is_for_one_device():
    with pytest.raises(ValueError, match="one device"):
        replace(SETTINGS, low_memory=True, devices=2)


def test_scale_one_costs_half(params, image, key):
    condition = jax.eval_shape(
        functools.partial(pipeline.encode_condition, SETTINGS), params, image[None], key
    )

    def flops(high):
        settings = replace(SETTINGS, sampling=replace(SAMPLING, guidance_max=high))
        sample = jax.jit(pipeline.sample_latents, static_argnums=0)
        return sample.lower(settings, params, condition, key).cost_analysis()["flops"]

    assert flops(1.0) / flops(2.0) == pytest.approx(0.5, abs=0.02)


def test_azimuth_is_the_angle_from_frame_zero(params):
    vector = pipeline.vector(SETTINGS, 2)
    angles = jnp.broadcast_to(jnp.asarray([0.0, 120.0, 240.0]), (2, 3))
    config = tiny_generator.CONFIG.conditioner
    np.testing.assert_allclose(vector, conditioner.vector(config, {"azimuth": angles}), rtol=1e-6)


def test_latent_of_a_model_that_is_not_told_of_noise(params, image, key):
    pixels = 2.0 * image[None] - 1.0

    @fixtures.jit
    def both(params, pixels):
        network = pipeline.networks(SETTINGS, params)
        mean = network.autoencoder.encode(pixels).mean
        return mean, pipeline.picture_latent(SETTINGS, network, pixels, key)

    mean, latent = both(params, pixels)
    np.testing.assert_allclose(latent, 0.5 * mean, rtol=1e-6)


def test_latent_of_a_model_that_is_told_of_noise(params, image):
    """As SVD and V3D: a sample of the posterior plus noise, not scaled."""
    scalars = conditioner.ConditionerConfig(("fps_id", "motion_bucket_id", "cond_aug"), 8)
    told = replace(
        tiny_generator.CONFIG,
        conditioner=scalars,
        unet=replace(tiny_generator.CONFIG.unet, vector_dim=24),
    )
    conditioning = pipeline.ConditioningConfig(cond_aug=0.5)
    settings = pipeline.Settings(told, SAMPLING, conditioning)
    pixels = jnp.broadcast_to(2.0 * image - 1.0, (512, 16, 16, 3))

    @fixtures.jit
    def both(params, pixels):
        network = pipeline.networks(SETTINGS, params)
        posterior = network.autoencoder.encode(pixels[:1])
        return posterior, pipeline.picture_latent(settings, network, pixels, jax.random.key(3))

    posterior, latents = both(params, pixels)
    deviation = jnp.sqrt(jnp.exp(posterior.logvar[0]) + 0.5**2)
    error = (latents.mean(0) - posterior.mean[0]) / deviation
    assert float(jnp.abs(error).max()) < 6 / np.sqrt(512)
    np.testing.assert_allclose(latents.std(0), deviation, rtol=0.2)
    constants = pipeline.vector(settings, 1)
    assert constants.shape == (1, 3, 24)
    values = {"fps_id": 1.0, "motion_bucket_id": 300.0, "cond_aug": 0.5}
    values = {name: jnp.full((1, 3), value) for name, value in values.items()}
    np.testing.assert_allclose(constants, conditioner.vector(scalars, values), rtol=1e-6)


def test_decoding_in_chunks(params, key):
    latents = jax.random.normal(key, (1, 3, 8, 8, 4))
    decode = fixtures.jit(pipeline.decode, static_argnums=0)
    whole = decode(SETTINGS, params, latents)
    np.testing.assert_allclose(decode(replace(SETTINGS, decode_frames=3), params, latents), whole)
    single = decode(replace(SETTINGS, decode_frames=1), params, latents)
    assert single.shape == whole.shape
    assert float(jnp.abs(single - whole).max()) > 1e-3
    alone = decode(SETTINGS, params, latents[:, 2:])
    np.testing.assert_allclose(single[:, 2:], alone, atol=1e-5)


@pytest.mark.slow
def test_the_published_size_traces_from_picture_to_frames(key):
    settings = pipeline.Settings(generator.V3D_512, SamplingConfig())
    frames = jax.eval_shape(
        functools.partial(pipeline.image_to_orbit, settings),
        folder.abstract_params(generator.V3D_512),
        jax.ShapeDtypeStruct((512, 512, 3), jnp.float32),
        key,
    )
    assert frames.shape == (18, 512, 512, 3)
