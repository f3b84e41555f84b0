import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.diffusion import guidance, loss, precondition
from v3d_jax.diffusion.loss import LossConfig


def make_batch(key, clips=3, frames=4):
    keys = jax.random.split(key, 4)
    condition = guidance.Condition(
        jax.random.normal(keys[0], (clips, 2, 5)),
        jax.random.normal(keys[1], (clips, 4, 4, 4)),
        jax.random.normal(keys[2], (clips, frames, 6)),
    )
    return jax.random.normal(keys[3], (clips, frames, 4, 4, 4)), condition


def test_sigma_is_log_normal_and_shared_by_the_frames_of_a_clip(key):
    sigma = loss.draw_sigma(key, 20_000, 3, LossConfig())
    np.testing.assert_array_equal(sigma, jnp.broadcast_to(sigma[:, :1], sigma.shape))
    logs = np.log(sigma[:, 0])
    assert logs.mean() == pytest.approx(1.5, abs=0.06)
    assert logs.std() == pytest.approx(2.0, abs=0.04)
    other = loss.draw_sigma(key, 20_000, 1, LossConfig(p_mean=-1.2, p_std=1.2))
    assert np.log(other).mean() == pytest.approx(-1.2, abs=0.04)


def test_sigma_of_each_frame_is_independent_as_an_option(key):
    logs = np.log(loss.draw_sigma(key, 20_000, 2, LossConfig(per_frame_sigma=True)))
    assert abs(np.corrcoef(logs.T)[0, 1]) < 0.03


def test_parts_are_dropped_independently_and_the_vector_never(key):
    clips = 20_000
    ones = guidance.Condition(
        jnp.ones((clips, 1, 2)), jnp.ones((clips, 1, 1, 2)), jnp.ones((clips, 1, 1))
    )
    kept = loss.drop_condition(key, ones, LossConfig())
    context, latent = np.asarray(kept.context), np.asarray(kept.latent).reshape(clips, 1, 2)
    np.testing.assert_array_equal(context[..., 0], context[..., 1])
    no_context, no_latent = context[:, 0, 0] == 0, latent[:, 0, 0] == 0
    assert no_context.mean() == pytest.approx(0.2, abs=0.015)
    assert no_latent.mean() == pytest.approx(0.2, abs=0.015)
    assert (no_context & no_latent).mean() == pytest.approx(0.04, abs=0.007)
    np.testing.assert_array_equal(kept.vector, 1)


@pytest.mark.parametrize("per_frame", [False, True])
def test_loss_is_the_unweighted_error_of_v_prediction(key, per_frame):
    latents, condition = make_batch(key)
    config = LossConfig(p_mean=0.0, p_std=0.5, per_frame_sigma=per_frame)
    seen = []

    def network(x, c_noise, context, vector):
        seen.append((x[..., :4], c_noise))
        return jnp.zeros_like(x[..., :4])

    @fixtures.jit
    def both(latents, condition, key):
        return loss.edm_loss(network, latents, condition, key, config), seen[-1]

    (value, metrics), given = both(latents, condition, key)
    x_in, c_noise, latents = map(np.asarray, (*given, latents))
    sigma = np.exp(4 * c_noise)[..., None, None, None]
    noise = (x_in * np.sqrt(sigma**2 + 1) - latents) / sigma
    v = (noise - sigma * latents) / np.sqrt(sigma**2 + 1)
    np.testing.assert_allclose(metrics.clip_loss, np.mean(v**2, axis=(1, 2, 3, 4)), rtol=1e-4)
    np.testing.assert_allclose(value, np.mean(v**2), rtol=1e-4)
    np.testing.assert_allclose(metrics.log_sigma, 4 * c_noise.mean(1), rtol=1e-4, atol=1e-5)


def test_gradient_step_on_a_linear_network_reaches_the_best_one(key):
    """For unit Gaussian latents the best F is 0 at every level; descent must find it."""
    latents, condition = make_batch(key, clips=8)

    def objective(gain, key):
        def network(x, c_noise, context, vector):
            return gain * x[..., :4]

        return loss.edm_loss(network, latents, condition, key, LossConfig())[0]

    @fixtures.jit
    def descend(gain, step):
        return gain - 0.1 * jax.grad(objective)(gain, jax.random.fold_in(key, step))

    gain = jnp.asarray(1.0)
    for step in range(30):
        gain = descend(gain, step)
    assert abs(float(gain)) < 0.1


def test_a_perfect_denoiser_has_no_loss(key):
    latents, condition = make_batch(key)

    def network(x, c_noise, context, vector):
        sigma = jnp.exp(4 * c_noise)[..., None, None, None]
        scale = precondition.scalings(sigma)
        return (latents - scale.c_skip * x[..., :4] / scale.c_in) / scale.c_out

    value, _ = loss.edm_loss(network, latents, condition, key, LossConfig(p_std=0.5))
    assert float(value) < 1e-9
