"""The autoencoder: stored outputs of the published one, sizes, the posterior."""

import dataclasses

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from v3d_jax.nn import autoencoder, chunked_decoder
from v3d_jax.weights import sgm

CONFIG = fixtures.AUTOENCODER

decode = fixtures.jit(lambda net, latents: net.decode(latents))


@pytest.mark.golden
def test_encoder_equals_the_published_one():
    graphdef, params = fixtures.filled_encoder()
    images = fixtures.channels_last(fixtures.draw(9, (2, 3, 32, 32)), clips=2)
    fixtures.assert_summary(
        fixtures.forward(graphdef)(params, images),
        fixtures.Summary(
            -0.163189,
            0.605782,
            0.484177,
            (0.48936, -0.46376, -0.15587, 0.08947),
            (-0.42376, -0.21555, 0.32204),
        ),
    )


@pytest.mark.golden
def test_decoder_equals_the_published_one_on_a_clip_and_frame_by_frame():
    graphdef, params = fixtures.filled_decoder()
    latents = fixtures.draw(10, (3, 4, 8, 8))
    fixtures.assert_summary(
        fixtures.forward(graphdef)(params, fixtures.channels_last(latents, clips=1)),
        fixtures.Summary(
            -0.017703,
            0.393601,
            0.292986,
            (0.11065, 0.16958, 0.14783, 0.12527),
            (-0.03209, -0.06567, -0.23323),
        ),
    )
    fixtures.assert_summary(
        fixtures.forward(graphdef)(params, fixtures.channels_last(latents, clips=3)),
        fixtures.Summary(
            0.020759,
            0.259370,
            0.191886,
            (0.12754, 0.16872, 0.20943, 0.19009),
            (0.01559, -0.13941, -0.27166),
        ),
    )


def test_full_size_has_the_published_parameters():
    net = nnx.eval_shape(
        lambda: autoencoder.Autoencoder(autoencoder.AutoencoderConfig(), rngs=nnx.Rngs(0))
    )
    for part, tensors, parameters in (
        (net.encoder, 106, 34_163_592),
        (net.decoder, 266, 63_579_183),
    ):
        leaves = jax.tree.leaves(nnx.state(part))
        assert len(leaves) == tensors
        assert sum(leaf.size for leaf in leaves) == parameters
    state = nnx.to_flat_state(nnx.state(net.decoder))
    temporal = {"temporal", "mix", "time_mix_conv"}
    assert sum(leaf.size for path, leaf in state if temporal & set(path)) == 14_089_004


def decoder(config: autoencoder.AutoencoderConfig) -> autoencoder.TemporalDecoder:
    return autoencoder.TemporalDecoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0))


def filled(config=CONFIG, dtype=jnp.float32) -> autoencoder.Autoencoder:
    def create() -> nnx.Module:
        return autoencoder.Autoencoder(config, dtype=dtype, rngs=nnx.Rngs(0))

    return nnx.merge(*fixtures.build(create, sgm.autoencoder(config)))


def test_a_fresh_decoder_is_one_of_images():
    config = dataclasses.replace(CONFIG, channel_mult=(1,))
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: decoder(config)))
    params = fixtures.jit(lambda: nnx.state(decoder(config)))()
    decode = fixtures.forward(graphdef)
    latents = jnp.asarray(fixtures.draw(0, (1, 3, 4, 4, 4)))
    clip = decode(params, latents)
    assert clip.shape == (1, 3, 4, 4, 3)
    np.testing.assert_allclose(clip[0], decode(params, latents[0][:, None])[:, 0], atol=1e-5)
    assert 0.1 < float(jnp.std(clip)) < 10.0


def test_frames_alone_are_clips_of_one_frame():
    net = filled()
    alone = filled(dataclasses.replace(CONFIG, frames_alone=True))
    latents = jnp.asarray(fixtures.draw(3, (2, 3, 4, 4, 4)))
    frames = decode(alone, latents)
    assert frames.shape == (2, 3, 16, 16, 3)
    for frame in range(3):
        expected = decode(net, latents[:, frame : frame + 1])[:, 0]
        np.testing.assert_allclose(frames[:, frame], expected, atol=1e-5)
    assert float(jnp.abs(frames - decode(net, latents)).max()) > 1e-3


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_a_decoder_in_chunks_gives_the_whole_clips_frames(frames):
    """Unlike chunks of the clip, which lack their neighbours and the clip's statistics."""
    config = dataclasses.replace(CONFIG, channel_mult=(1, 2))
    net = filled(config)
    latents = jnp.asarray(fixtures.draw(5, (2, 6, 4, 4, 4)))
    whole = decode(net, latents)
    chunked = fixtures.jit(lambda n, z: chunked_decoder.decode(n.decoder, z, frames))
    np.testing.assert_allclose(chunked(net, latents), whole, atol=1e-5)
    alone = decode(net, latents[:, :frames])
    assert float(jnp.abs(alone - whole[:, :frames]).max()) > 1e-2


def test_a_decoder_in_chunks_takes_less_memory():
    config = dataclasses.replace(CONFIG, channel_mult=(1, 2))
    net = nnx.eval_shape(
        lambda: autoencoder.Autoencoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )
    latents = jax.ShapeDtypeStruct((1, 18, 32, 32, 4), jnp.bfloat16)

    def temporary(decode):
        return (
            fixtures.jit(decode).lower(net, latents).compile().memory_analysis().temp_size_in_bytes
        )

    chunked = temporary(lambda n, z: chunked_decoder.decode(n.decoder, z, 2))
    activation = 2 * 18 * 64 * 64 * 32
    assert chunked < 0.4 * temporary(lambda n, z: n.decode(z))
    assert chunked < 7 * activation


def test_chunks_must_divide_the_clip():
    with pytest.raises(ValueError, match="6 frames do not divide into chunks of 4"):
        chunked_decoder.decode(filled().decoder, jnp.zeros((1, 6, 4, 4, 4)), 4)


def test_encode_splits_and_clamps_the_moments():
    net = filled()
    images = jnp.asarray(fixtures.draw(1, (2, 16, 16, 3)))
    encode = fixtures.jit(lambda net, x: net.encode(x))
    posterior, bias = encode(net, images), net.encoder.conv_out.bias
    assert posterior.mean.shape == posterior.logvar.shape == (2, 4, 4, 4)
    bias[...] += jnp.asarray([7.0] * 4 + [-100.0, -100.0, 100.0, 100.0])
    moved = encode(net, images)
    np.testing.assert_allclose(moved.mean, posterior.mean + 7.0, atol=1e-5)
    expected = np.broadcast_to([-30.0, -30.0, 20.0, 20.0], moved.logvar.shape)
    np.testing.assert_array_equal(moved.logvar, expected)


def test_encoder_pads_right_and_below_only():
    conv = filled().encoder.down[0].resample
    conv.kernel[...] = jnp.zeros_like(conv.kernel[...]).at[0, 0].set(jnp.eye(32))
    conv.bias[...] = jnp.zeros(32)
    x = jnp.asarray(fixtures.draw(2, (1, 1, 6, 6, 32)))
    np.testing.assert_allclose(conv(x), x[:, :, ::2, ::2], atol=1e-6)


def test_posterior_draws_with_its_mean_and_deviation(key):
    mean = jnp.full((1, 64, 64, 1), 3.0)
    posterior = autoencoder.Posterior(mean, jnp.full_like(mean, 2 * np.log(0.5)))
    draws = posterior.sample(key)
    np.testing.assert_allclose([jnp.mean(draws), jnp.std(draws)], [3.0, 0.5], atol=0.03)


def test_posterior_divergence_from_the_standard_normal():
    shape = (2, 3, 5, 4)
    standard = autoencoder.Posterior(jnp.zeros(shape), jnp.zeros(shape))
    np.testing.assert_array_equal(standard.kl(), [0.0, 0.0])
    # KL(N(1, e) || N(0, 1)) = (1 + e - 1 - 1) / 2 a latent.
    other = autoencoder.Posterior(jnp.ones(shape), jnp.ones(shape))
    np.testing.assert_allclose(other.kl(), 60 * 0.5 * (np.e - 1), rtol=1e-6)


def test_encode_refuses_images_that_do_not_divide():
    with pytest.raises(ValueError, match="do not divide by 4"):
        filled().encode(jnp.zeros((1, 18, 16, 3)))


def test_remat_gives_the_same_gradient_in_less_memory():
    config = dataclasses.replace(CONFIG, channel_mult=(1,))
    latents = jnp.asarray(fixtures.draw(3, (1, 2, 8, 8, 4)))
    _, params = fixtures.build(lambda: decoder(config), sgm.decoder(config))

    def compiled(remat):
        setting = dataclasses.replace(config, remat=remat)
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: decoder(setting)))

        def loss(params, z):
            return jnp.mean(jnp.square(nnx.merge(graphdef, params)(z)))

        lowered = jax.jit(jax.grad(loss)).lower(params, latents)
        return lowered.compile(compiler_options=fixtures.KEEP_BARRIERS)

    plain, remat = compiled(False), compiled(True)
    for got, want in zip(
        jax.tree.leaves(remat(params, latents)),
        jax.tree.leaves(plain(params, latents)),
        strict=True,
    ):
        assert np.isfinite(want).all()
        np.testing.assert_allclose(got, want, atol=1e-5)
    used = [x.memory_analysis().temp_size_in_bytes for x in (plain, remat)]
    assert used[1] < 0.5 * used[0]


def test_bfloat16_activations_keep_float32_parameters_and_posterior():
    config = dataclasses.replace(CONFIG, channel_mult=(1, 2))
    net, exact = filled(config, jnp.bfloat16), filled(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(net))} == {jnp.dtype(jnp.float32)}
    images = jnp.asarray(fixtures.draw(4, (1, 8, 8, 3)))
    posterior, want = (fixtures.jit(lambda n, x: n.encode(x))(n, images) for n in (net, exact))
    assert posterior.mean.dtype == jnp.float32
    error = jnp.linalg.norm(posterior.mean - want.mean) / jnp.linalg.norm(want.mean)
    assert 0.0 < float(error) < 0.05


def test_untrained_posterior_is_narrow(key):
    # Small variances at the start, or the noise of sampling hides colour from training.
    images = jax.random.uniform(key, (2, 16, 16, 3), minval=-1.0)
    posterior = fixtures.jit(
        lambda images: autoencoder.Autoencoder(CONFIG, rngs=nnx.Rngs(0)).encode(images)
    )(images)
    assert abs(float(jnp.mean(posterior.logvar)) - autoencoder.INITIAL_LOGVAR) < 1.0
    assert abs(float(jnp.mean(posterior.mean))) < 1.0
