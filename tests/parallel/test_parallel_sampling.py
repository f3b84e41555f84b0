"""An orbit made on several devices equals that of one, and its work is shared."""

import functools
from dataclasses import replace

import fixtures
import jax
import numpy as np
import pytest
import tiny_generator

from v3d_jax import errors, pipeline
from v3d_jax.diffusion import guidance
from v3d_jax.diffusion.sampler import SamplingConfig
from v3d_jax.parallel import sampling

SETTINGS = pipeline.Settings(
    tiny_generator.CONFIG, SamplingConfig(steps=2, guidance_min=1.0, guidance_max=2.0)
)
IMAGE = jax.random.uniform(jax.random.key(7), (16, 16, 3))


@functools.cache
def params():
    return jax.tree.map(np.asarray, tiny_generator.params())


def condition():
    """Of a picture's size and magnitudes."""
    context, latent = (
        jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(1, 1, 8), (1, 8, 8, 4)])
    )
    return guidance.Condition(context, latent, pipeline.vector(SETTINGS, 1))


@functools.cache
def one_device():
    orbit = fixtures.jit(pipeline.image_to_orbit, static_argnums=0)
    return np.asarray(orbit(SETTINGS, params(), IMAGE, jax.random.key(0)))


def on_devices(devices, **sampling_changes):
    settings = replace(
        SETTINGS, devices=devices, sampling=replace(SETTINGS.sampling, **sampling_changes)
    )
    placed = sampling.repeat(params(), pipeline.device_mesh(settings))
    return settings, placed


SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("devices", [SLOW(2), SLOW(3), 6])
def test_an_orbit_equals_that_of_one_device(devices):
    settings, placed = on_devices(devices)
    orbit = fixtures.jit(pipeline.image_to_orbit, static_argnums=0)
    frames = orbit(settings, placed, IMAGE, jax.random.key(0))
    assert len(frames.sharding.device_set) == devices
    np.testing.assert_allclose(frames, one_device(), atol=1e-4)


def flops(stage, settings, *arguments):
    """Of one device."""
    lowered = fixtures.jit(stage, static_argnums=0).lower(settings, *arguments)
    return lowered.compile().cost_analysis()["flops"]


@pytest.mark.parametrize(("devices", "share"), [SLOW(2, 0.55), SLOW(6, 0.35)])
def test_every_device_has_its_share_of_a_step(devices, share):
    """A little more than 1 / devices: embeddings and halos are computed by all."""
    settings, placed = on_devices(devices)
    start, levels = pipeline.begin(SETTINGS, 1, jax.random.key(0))
    step = (condition(), start, levels[:2])
    whole = flops(pipeline.advance, SETTINGS, params(), *step)
    assert flops(pipeline.advance, settings, placed, *step) < share * whole


def test_every_step_is_the_same_program():
    """Compiled a second time for where the first step left its result, it would take minutes."""
    settings, placed = on_devices(2)
    trajectory, levels = pipeline.begin(settings, 1, jax.random.key(0))
    before = jax.tree.map(lambda leaf: leaf.sharding, trajectory)
    step = fixtures.jit(pipeline.advance, static_argnums=0)
    made = step.lower(settings, placed, condition(), trajectory, levels[:2]).compile()
    after = made.output_shardings
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(after))
    assert jax.tree.map(lambda one, other: one == other, before, after) == type(after)(
        True, True, True
    )


def test_every_device_decodes_its_share():
    settings, placed = on_devices(3)
    latents = pipeline.begin(SETTINGS, 1, jax.random.key(0))[0].x
    whole = flops(pipeline.decode, SETTINGS, params(), latents)
    assert flops(pipeline.decode, settings, placed, latents) < 0.45 * whole


def test_meshes():
    assert dict(sampling.mesh(6, 2, 18).shape) == {"branch": 2, "frame": 3}
    assert dict(sampling.mesh(3, 2, 18).shape) == {"branch": 1, "frame": 3}
    assert dict(sampling.mesh(6, 1, 18).shape) == {"branch": 1, "frame": 6}
    with pytest.raises(errors.UserError, match="9 devices are asked for, 8 are here"):
        sampling.mesh(9, 2, 18)
    with pytest.raises(errors.UserError, match="choose one of 1, 2, 3, 4, 6, 9, 12"):
        sampling.mesh(8, 2, 18)


@pytest.mark.slow
def test_a_branch_alone_is_split_by_frame():
    """Beyond guidance's interval half as large a batch is computed, on any number of devices."""
    settings, placed = on_devices(6, guidance_interval=(0.0, 1.0))
    start, levels = pipeline.begin(settings, 1, jax.random.key(0))
    advance = fixtures.jit(pipeline.advance, static_argnums=0)
    alone = replace(settings, devices=1)
    expected = advance(alone, params(), condition(), start, levels[:2]).x
    made = advance(settings, placed, condition(), start, levels[:2]).x
    np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-2)  # of values up to 700


def test_a_network_sees_the_mesh_it_is_split_over():
    """By it the flash kernel of TPUs divides its sequences among the devices."""
    mesh, seen = sampling.mesh(6, 2, 3), []

    def network(x):
        seen.append(jax.sharding.get_abstract_mesh().shape)
        return 2 * x

    x = jax.random.normal(jax.random.key(0), (2, 3, 2, 2, 4))
    out = jax.jit(sampling.split_network(network, mesh))(x)
    assert dict(seen[0]) == {"branch": 2, "frame": 3}
    assert out.sharding.shard_shape(out.shape) == (1, 1, 2, 2, 4)
    np.testing.assert_array_equal(out, 2 * x)
