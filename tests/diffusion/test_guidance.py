import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.diffusion import guidance, precondition


def make_condition(key, clips=2, frames=5):
    keys = jax.random.split(key, 3)
    return guidance.Condition(
        jax.random.normal(keys[0], (clips, 1, 6)),
        jax.random.normal(keys[1], (clips, 4, 4, 3)),
        jax.random.normal(keys[2], (clips, frames, 8)),
    )


def linear_network(x, c_noise, context, vector):
    """Depends on every input, so that a lost or swapped one shows."""
    noisy, latent = jnp.split(x, 2, axis=-1)
    scalars = c_noise + vector.sum(-1) + context.sum((-2, -1))
    return noisy + 2 * latent + scalars[..., None, None, None]


def test_frame_scales():
    np.testing.assert_allclose(guidance.frame_scale("linear", 1.0, 3.0, 5), [1, 1.5, 2, 2.5, 3])
    np.testing.assert_allclose(guidance.frame_scale("triangle", 1.0, 3.0, 5), [1, 2, 3, 2, 1])
    np.testing.assert_allclose(guidance.frame_scale("constant", 1.0, 3.0, 3), [3, 3, 3])


def test_guided_denoiser_equals_two_separate_branches(key):
    condition = make_condition(key)
    x = jax.random.normal(jax.random.fold_in(key, 9), (2, 5, 4, 4, 3))
    sigma = jnp.asarray(2.5)
    scale = guidance.frame_scale("linear", 1.5, 3.0, 5)
    guided = fixtures.jit(guidance.guided_denoiser(linear_network, condition, scale))(x, sigma)

    @fixtures.jit
    def branch(condition):
        network = guidance.condition_network(linear_network, condition)
        return precondition.denoise(network, x, sigma)

    zeroed = condition._replace(context=0 * condition.context, latent=0 * condition.latent)
    u, c = branch(zeroed), branch(condition)
    for t, s in enumerate(np.linspace(1.5, 3.0, 5)):
        np.testing.assert_allclose(guided[:, t], u[:, t] + s * (c - u)[:, t], atol=1e-4)
    assert float(jnp.abs(u - c).max()) > 0.1


@pytest.mark.parametrize(
    ("low", "high", "clips"), [(1.0, 1.0, 2), (1.0, 1.5, 4), (0.0, 0.0, 4), (3.5, 3.5, 4)]
)
def test_unconditional_branch_is_skipped_only_at_scale_one(key, low, high, clips):
    condition = make_condition(key)
    x = jnp.ones((2, 5, 4, 4, 3))
    batches = []

    def network(x, c_noise, context, vector):
        batches.append((x.shape[0], context.shape[0], vector.shape[0]))
        return linear_network(x, c_noise, context, vector)

    scale = guidance.frame_scale("linear", low, high, 5)
    guidance.guided_denoiser(network, condition, scale)(x, jnp.asarray(1.0))
    assert batches == [(clips,) * 3]


def test_scale_zero_ignores_the_picture_and_keeps_the_vector(key):
    scale = guidance.frame_scale("constant", 0.0, 0.0, 5)
    x = jnp.ones((2, 5, 4, 4, 3))
    condition = make_condition(key)
    other = make_condition(jax.random.fold_in(key, 1))

    def denoise(condition):
        return guidance.guided_denoiser(linear_network, condition, scale)(x, jnp.asarray(1.0))

    same_vector = other._replace(vector=condition.vector)
    np.testing.assert_allclose(denoise(condition), denoise(same_vector), rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(denoise(condition) - denoise(other)).max()) > 0.1


def test_branches_in_turn_equal_both_at_once(key):
    condition, x = make_condition(key), jax.random.normal(key, (2, 5, 4, 4, 3))
    scale = guidance.frame_scale("linear", 1.5, 3.0, 5)
    made = guidance.branches(condition, scale)
    seen = []

    def network(x, c_noise, context, vector):
        seen.append(x.shape[0])
        return linear_network(x, c_noise, context, vector)

    both, turns = (
        guidance.denoiser(network, made, scale, in_turn=in_turn)(x, jnp.asarray(2.5))
        for in_turn in (False, True)
    )
    assert seen == [4, 2]
    np.testing.assert_allclose(turns, both, atol=1e-5)


@pytest.mark.parametrize(
    ("sigma", "guided"), [(0.5, False), (0.51, True), (3.0, True), (3.01, False)]
)
def test_guidance_is_limited_to_an_interval_of_noise_levels(key, sigma, guided):
    condition, x = make_condition(key), jax.random.normal(key, (2, 5, 4, 4, 3))
    scale = guidance.frame_scale("linear", 1.5, 3.0, 5)
    made = guidance.branches(condition, scale)
    limited = guidance.denoiser(linear_network, made, scale, interval=(0.5, 3.0))
    sigma = jnp.asarray(sigma, jnp.float32)
    alone = guidance.guided_denoiser(linear_network, condition, np.ones(5, np.float32))
    everywhere = guidance.denoiser(linear_network, made, scale)
    same, other = (everywhere, alone) if guided else (alone, everywhere)
    np.testing.assert_allclose(limited(x, sigma), same(x, sigma), atol=1e-5)
    assert float(jnp.abs(limited(x, sigma) - other(x, sigma)).max()) > 0.1
