"""The optimiser's schedule, the average of weights, and one step, against plain numpy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax import errors, state
from v3d_jax.ops import compiling, target
from v3d_jax.parallel import mesh as meshes
from v3d_jax.parallel import sharding
from v3d_jax.state import OptimConfig


def rates(config: OptimConfig, steps: int) -> np.ndarray:
    schedule = state.learning_rate(config, steps)
    return np.array([float(schedule(count)) for count in range(steps)])


def test_warmup_rises_linearly_to_the_rate():
    found = rates(OptimConfig(lr=2.0, warmup=4, decay="constant"), 8)
    np.testing.assert_allclose(found, [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0], rtol=1e-6)


def test_cosine_ends_at_the_final_rate():
    found = rates(OptimConfig(lr=1.0, warmup=0, decay="cosine", final_lr=0.1), 101)
    assert found[0] == pytest.approx(1.0)
    assert found[50] == pytest.approx(0.55, abs=1e-6)
    assert found[-1] == pytest.approx(0.1, abs=1e-6)
    assert np.all(np.diff(found) < 0)


def test_warmup_stable_decay():
    config = OptimConfig(lr=1.0, warmup=1, decay="linear", decay_start=0.8)
    found = rates(config, 101)
    np.testing.assert_allclose(found[:81], 1.0, rtol=1e-6)
    np.testing.assert_allclose(np.diff(found[81:]), found[82] - found[81], rtol=1e-4)
    assert found[-1] == pytest.approx(0.0, abs=1e-6)


def test_a_decay_start_outside_the_run_is_refused():
    with pytest.raises(ValueError, match="decay_start"):
        OptimConfig(decay_start=1.0)


def test_ema_decay_ramps_up():
    found = [float(state.ema_decay(0.99, jnp.asarray(n))) for n in (0, 8, 10_000)]
    np.testing.assert_allclose(found, [0.1, 0.5, 0.99], rtol=1e-6)


PARAMS = {"kernel": np.full((2, 3), 0.5, np.float32), "bias": np.full((3,), 0.5, np.float32)}


def flat_loss(params, frozen, batch, key):
    """No slope anywhere: only weight decay moves a parameter."""
    del frozen, batch, key
    return 0.0 * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)), {}


def noisy_loss(params, frozen, batch, key):
    noise = jax.random.normal(key, params["kernel"].shape)
    error = params["kernel"] + params["bias"][None] - noise - batch - frozen
    return jnp.mean(jnp.square(error)), {"noise": noise[0, 0]}


def begin(config: OptimConfig):
    optimizer = state.optimizer(config)
    return optimizer, state.create(jax.tree.map(jnp.asarray, PARAMS), optimizer)


def test_only_matrices_are_decayed():
    optimizer, begun = begin(OptimConfig(weight_decay=0.5))
    key, rate = jax.random.key(0), jnp.asarray(0.1)
    after, _ = state.train_step(flat_loss, optimizer, 0.5, begun, None, 0.0, key, rate)
    np.testing.assert_allclose(after.params["kernel"], 0.5 * (1 - 0.1 * 0.5), rtol=1e-6)
    np.testing.assert_array_equal(after.params["bias"], PARAMS["bias"])


def test_chosen_weights_learn_at_several_times_the_rate():
    """Of the patterns that match a weight the first counts; decay is part of the update."""
    params = {"new": {"kernel": jnp.full((2, 2), 0.5), "bias": jnp.ones(2)}, "old": jnp.ones(3)}
    grads = jax.tree.map(lambda x: 0.1 * jnp.arange(1.0, x.size + 1.0).reshape(x.shape), params)

    def updates(**options):
        optimizer = state.optimizer(OptimConfig(**options))
        return optimizer.update(grads, optimizer.init(params), params)[0]

    plain = updates()
    found = updates(faster=(("new.k*", 4.0), ("new.*", 2.0)))
    np.testing.assert_allclose(found["new"]["kernel"], 4.0 * plain["new"]["kernel"], rtol=1e-6)
    np.testing.assert_allclose(found["new"]["bias"], 2.0 * plain["new"]["bias"], rtol=1e-6)
    np.testing.assert_array_equal(found["old"], plain["old"])
    refused = r"^--optim.faster newer.\* names no weight; they are called as new.bias$"
    with pytest.raises(errors.UserError, match=refused):
        updates(faster=(("newer.*", 4.0),))


def test_a_step_is_adamw_on_the_clipped_gradient():
    config = OptimConfig(weight_decay=0.0, clip=1e-3)
    optimizer, begun = begin(config)
    key, rate = jax.random.key(3), jnp.asarray(0.1)
    after, metrics = state.train_step(noisy_loss, optimizer, 0.5, begun, 1.0, 2.0, key, rate)

    noise = np.asarray(jax.random.normal(jax.random.fold_in(key, 0), (2, 3)))
    error = PARAMS["kernel"] + PARAMS["bias"][None] - noise - 3.0
    grads = {"kernel": 2 * error / 6, "bias": (2 * error / 6).sum(0)}
    norm = np.sqrt(sum(np.square(grad).sum() for grad in grads.values()))
    assert float(metrics["loss"]) == pytest.approx(np.mean(error**2), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    for name, grad in grads.items():
        clipped = grad * config.clip / norm
        # Adam's first update: both moments' bias corrections cancel their decays.
        expected = PARAMS[name] - 0.1 * clipped / (np.abs(clipped) + config.eps)
        np.testing.assert_allclose(after.params[name], expected, rtol=1e-4)
        ema = 0.1 * PARAMS[name] + 0.9 * np.asarray(after.params[name])
        np.testing.assert_allclose(after.ema[name], ema, rtol=1e-5)
    assert int(after.step) == 1


def test_every_step_draws_its_own_noise():
    optimizer, begun = begin(OptimConfig())
    step = jax.jit(functools.partial(state.train_step, noisy_loss, optimizer, 0.9))
    key, rate = jax.random.key(0), jnp.asarray(1e-4)
    second, first_metrics = step(begun, 0.0, 0.0, key, rate)
    _, second_metrics = step(second, 0.0, 0.0, key, rate)
    _, again = step(begun, 0.0, 0.0, key, rate)
    assert float(first_metrics["noise"]) != float(second_metrics["noise"])
    assert float(first_metrics["noise"]) == float(again["noise"])


def clips_loss(params, frozen, batch, key):
    """A mean over clips without noise, so that parts of a batch make the whole."""
    del key
    error = jnp.tanh(batch @ params["kernel"] + params["bias"][None]) - frozen
    clip_loss = jnp.mean(jnp.square(error), axis=1)
    return jnp.mean(clip_loss), {"largest": jnp.max(jnp.abs(params["bias"]))}


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_make_the_whole_batch(parts):
    batch = np.random.default_rng(0).standard_normal((8, 2)).astype(np.float32)
    key, params = jax.random.key(0), jax.tree.map(jnp.asarray, PARAMS)
    whole, part = (
        jax.jit(functools.partial(state.gradients, clips_loss, accumulate=count))(
            params, 0.3, batch, key
        )
        for count in (1, parts)
    )
    assert whole[0] > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), part, whole)


def test_parts_of_a_batch_draw_apart():
    """Each part's noise is its own: two parts of equal clips are not one part twice."""
    key, params = jax.random.key(0), jax.tree.map(jnp.asarray, PARAMS)
    batch = np.zeros((2, 3), np.float32)
    value, _, _ = state.gradients(noisy_loss, params, 0.0, batch, key, accumulate=2)
    alone = [
        noisy_loss(params, 0.0, batch[:1], jax.random.fold_in(key, index))[0] for index in (0, 1)
    ]
    assert abs(alone[0] - alone[1]) > 1e-3
    np.testing.assert_allclose(value, np.mean(alone), rtol=1e-6)


def test_a_batch_in_no_parts_is_refused():
    with pytest.raises(ValueError, match="accumulate"):
        OptimConfig(accumulate=0)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_gradients_keep_their_share_and_parts_stay_on_their_devices(platform):
    """On a mesh, in parts: equal to one device, and split as the weights are."""
    mesh = meshes.make(meshes.MeshConfig(fsdp=2))
    placements = sharding.weights({"kernel": PARAMS["kernel"], "bias": PARAMS["bias"]}, mesh, 0)
    batch = np.random.default_rng(0).standard_normal((16, 2)).astype(np.float32)
    key = jax.random.key(0)
    expected = state.gradients(clips_loss, PARAMS, 0.3, batch, key)
    step = functools.partial(state.gradients, clips_loss, accumulate=2, placements=placements)
    everywhere = sharding.replicated(mesh)
    sharded = jax.jit(step, in_shardings=(placements, everywhere, sharding.batch(mesh), everywhere))
    with target.traced_for(platform):
        found = sharded(PARAMS, 0.3, batch, key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)
    assert found[2]["kernel"].sharding.shard_shape((2, 3)) == (1, 3)


def test_gradients_lie_as_parameters_do_on_gpus():
    params = {"kernel": jnp.ones((3, 3, 4, 8)), "bias": jnp.ones(8)}

    def loss(params, frozen, batch, key):
        del frozen, key
        return jnp.sum(batch * params["kernel"]) + jnp.sum(params["bias"]), {}

    def trace():
        one = functools.partial(state.gradients, loss)
        return str(jax.make_jaxpr(one)(params, None, jnp.ones((3, 3, 4, 8)), jax.random.key(0)))

    assert "layout_constraint" not in trace()
    with target.traced_for("cuda"):
        found = re.findall(r"layout_constraint\[\s*layout=.*?major_to_minor=\(([^)]*)\)", trace())
    assert sorted(found) == ["0,", "0, 1, 2, 3"]  # every axis where it is


def test_gradients_are_split_so_many_bytes_at_a_time_however_many_devices_split_them():
    """The compiler for GPUs counts what one of them keeps."""
    name = "xla_gpu_reduce_scatter_combine_threshold_bytes"
    at_once = [shares * compiling.step("gpu", shares)[name] for shares in (1, 2, 64)]
    assert at_once == 3 * [64 * 2**20]
    assert compiling.step("cpu", 2) is None


def test_stochastic_rounding_keeps_the_mean():
    """At 1 the digits of bfloat16 are 1/128 apart: a quarter of the way up is taken so often."""
    rounds = jax.jit(state.stochastic_round)
    for value, digit in ((1.0 + 0.25 / 128, 1 / 128), (-3.0 - 0.75 / 64, 1 / 64)):
        made = rounds(jnp.full(40_000, value, jnp.float32), jax.random.key(1))
        assert made.dtype == jnp.bfloat16
        made = np.asarray(made, np.float32)
        assert len(np.unique(made)) == 2
        assert np.ptp(made) == digit
        # Four deviations of a mean of 40,000 draws that fall to one side three times in four.
        assert abs(made.mean() - value) < 4 * digit * np.sqrt(0.25 * 0.75 / 40_000)
    kept = jnp.asarray([0.0, -0.0, 1.5, -256.0, jnp.inf, -jnp.inf], jnp.float32)
    np.testing.assert_array_equal(rounds(kept, jax.random.key(2)), kept.astype(jnp.bfloat16))
    assert np.isnan(np.asarray(rounds(jnp.asarray(jnp.nan), jax.random.key(2)), np.float32))


def test_bfloat16_parameters_follow_updates_below_their_digits():
    """200 steps of 1 - 1e-4; rounded to the nearest, every one of them would leave 1.0."""
    config = OptimConfig(weight_decay=0.1, params="bfloat16")
    optimizer = state.optimizer(config)
    ones = {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}
    begun = state.create(ones, optimizer, config.params)
    step = jax.jit(functools.partial(state.train_step, flat_loss, optimizer, 0.5))
    now = begun
    for _ in range(200):
        now, _ = step(now, None, 0.0, jax.random.key(0), jnp.asarray(1e-3))
    types = {name: leaf.dtype for name, leaf in now.params.items()}
    assert types == {"kernel": jnp.bfloat16, "bias": jnp.float32}
    floats = [leaf for leaf in jax.tree.leaves((now.opt_state, now.ema)) if leaf.ndim]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype(jnp.float32)}
    expected = (1 - 1e-4) ** 200
    kernel = np.asarray(now.params["kernel"], np.float32)
    assert kernel.mean() == pytest.approx(expected, abs=1e-3)
    assert np.asarray(now.ema["kernel"]).mean() == pytest.approx(expected, abs=1e-3)
    np.testing.assert_array_equal(now.params["bias"], ones["bias"])


def test_bfloat16_parameters_on_a_mesh_are_those_of_one_device():
    config = OptimConfig(params="bfloat16", clip=1e9)
    optimizer, key = state.optimizer(config), jax.random.key(5)
    begun = state.create(jax.tree.map(jnp.asarray, PARAMS), optimizer, config.params)
    batch = np.random.default_rng(0).standard_normal((16, 2)).astype(np.float32)
    rate = jnp.asarray(1e-3)
    expected, _ = state.train_step(clips_loss, optimizer, 0.9, begun, 0.3, batch, key, rate)
    mesh = meshes.make(meshes.MeshConfig(fsdp=2))
    placements = sharding.weights(begun, mesh, 0)
    everywhere = sharding.replicated(mesh)
    step = state.sharded_step(clips_loss, optimizer, config, mesh, placements, everywhere)
    found, _ = step(jax.device_put(begun, placements), 0.3, batch, key, rate)
    np.testing.assert_array_equal(found.params["kernel"], expected.params["kernel"])
    assert found.params["kernel"].sharding.shard_shape((2, 3)) == (1, 3)
