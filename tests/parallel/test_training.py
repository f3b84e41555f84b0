"""A video model's loss and gradients on meshes of eight devices equal those on one device."""

import dataclasses
import functools

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from v3d_jax import pipeline, state
from v3d_jax.diffusion import loss as edm
from v3d_jax.diffusion import sampler
from v3d_jax.nn import autoencoder, clip, conditioner, generator, unet
from v3d_jax.ops import image
from v3d_jax.parallel import mesh as meshes
from v3d_jax.parallel import sharding
from v3d_jax.training import cached, conditioning, perceptual, video

CLIPS, FRAMES = 8, 4


@pytest.fixture(autouse=True)
def split_small_weights(monkeypatch):
    """At rest, and where layers gather them."""
    monkeypatch.setattr(sharding, "SMALL", 2**10)


def config(levels: int) -> generator.GeneratorConfig:
    """One level has attention in the middle only; two have it below full resolution too."""
    return generator.GeneratorConfig(
        unet=unet.UNetConfig(
            model_channels=32,
            channel_mult=(1,) * levels,
            num_res_blocks=1,
            attention_resolutions=(2,),
            head_channels=16,
            context_dim=16,
            vector_dim=16,
        ),
        autoencoder=autoencoder.AutoencoderConfig(channels=32, channel_mult=(1, 1)),
        vision=clip.VisionConfig(
            image_size=8,
            patch=4,
            width=16,
            layers=1,
            heads=2,
            mlp=32,
            output_dim=16,
            output="tokens",
            preprocess="plain",
        ),
        conditioner=conditioner.ConditionerConfig(scalars=("azimuth",), dim=16),
        num_frames=FRAMES,
        image_size=16,
    )


@functools.cache
def model(levels: int):
    """A graph and weights, none zero: a zero-initialised layer would hide what is before it."""
    abstract = generator.abstract(config(levels))
    graphdef, params = nnx.split(abstract)
    rng = np.random.default_rng(0)

    def draw(leaf):
        fan_in = max(1, int(np.prod(leaf.shape[:-1])))
        return (rng.standard_normal(leaf.shape) / np.sqrt(fan_in)).astype(np.float32)

    params = jax.tree.map(draw, nnx.to_pure_dict(params))
    return graphdef, {name: params[name] for name in video.PARTS}, params["autoencoder"]


@functools.cache
def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    turn = np.arange(FRAMES, dtype=np.float32) * (360.0 / FRAMES)
    return {
        "latents": rng.standard_normal((CLIPS, FRAMES, 8, 8, 4)).astype(np.float16),
        "image": rng.integers(0, 256, (CLIPS, 16, 16, 3), np.uint8),
        "azimuth": np.tile(turn, (CLIPS, 1)) + rng.uniform(0, 360, (CLIPS, 1)).astype(np.float32),
        "elevation": np.zeros(CLIPS, np.float32),
        "index": np.arange(CLIPS, dtype=np.int32),
    }


@functools.cache
def gradients(levels: int, devices: int, fsdp: int, frames: int = 1, remat: str = "none"):
    """Loss, the gradient's norm, the gradient in numpy, and the FLOPs of one device."""
    mesh = meshes.make(meshes.MeshConfig(fsdp=fsdp, devices=devices, frames=frames))
    _, params, frozen = model(levels)
    placements = sharding.weights(params, mesh)
    everywhere = sharding.replicated(mesh)
    settings = config(levels)
    network = dataclasses.replace(settings.unet, remat=remat)
    whole = pipeline.Settings(
        dataclasses.replace(settings, unet=network), sampler.SamplingConfig(), activations="float32"
    )
    loss = video.make_loss(
        whole,
        edm.LossConfig(),
        perceptual.PerceptualConfig(),
        conditioning.ConditionConfig(),
        video.PARTS,
    )

    def step(params, frozen, batch, key):
        value, _, grads = state.gradients(loss, params, frozen, batch, key, placements=placements)
        return value, optax.tree.norm(grads), grads

    step = jax.jit(
        sharding.on_mesh(step, mesh),
        in_shardings=(placements, everywhere, sharding.batch(mesh), everywhere),
        out_shardings=(everywhere, everywhere, placements),
        # Where things lie is decided before what this leaves out.
        compiler_options=fixtures.FAST_COMPILE,
    )
    placed = sharding.put(params, placements)
    split = [leaf for leaf in jax.tree.leaves(placed) if not leaf.sharding.is_fully_replicated]
    assert bool(split) == (fsdp > 1)
    resting = video.Frozen(frozen, None, {}, jnp.float32(1.0))
    arguments = (placed, resting, sharding.put_batch(batch(), mesh), jax.random.key(0))
    compiled = step.lower(*arguments).compile()
    value, norm, grads = compiled(*arguments)
    work = compiled.cost_analysis()["flops"]
    return float(value), float(norm), jax.tree.map(np.asarray, grads), work


def assert_equal_to_one_device(levels: int, *layout):
    value, norm, grads, work = gradients(levels, 1, 1)
    sharded_value, sharded_norm, sharded_grads, share = gradients(levels, *layout)
    assert norm > 0
    assert sharded_value == pytest.approx(value, rel=1e-5)
    assert sharded_norm == pytest.approx(norm, rel=1e-5)
    difference = jax.tree.map(np.subtract, sharded_grads, grads)
    assert float(optax.tree.norm(difference)) < 1e-5 * norm
    # An eighth, and as much as a third of it again where blocks are recomputed.
    recomputes = {"blocks", "dots"} & set(layout)
    assert share < (0.18 if recomputes else 0.14) * work
    # The image tower is trained through the UNet.
    assert float(optax.tree.norm(grads["vision"])) > 1e-4 * norm


@pytest.mark.slow  # test_train has a shorter one
def test_weights_batch_and_frames_split_equal_one_device():
    """All axes at once, and blocks that the gradient recomputes."""
    assert_equal_to_one_device(1, 8, 2, 2, "blocks")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fsdp", "frames", "remat"),
    [
        (1, 1, "none"),
        (2, 1, "none"),
        (8, 1, "dots"),
        (1, 2, "none"),
        (1, 4, "dots"),
        (4, 2, "none"),
    ],
)
def test_every_layout_equals_one_device(fsdp, frames, remat):
    assert_equal_to_one_device(1, 8, fsdp, frames, remat)


@pytest.mark.slow
@pytest.mark.parametrize(("fsdp", "frames"), [(1, 1), (2, 1), (8, 1), (2, 2), (2, 4)])
def test_two_levels_equal_one_device(fsdp, frames):
    assert_equal_to_one_device(2, 8, fsdp, frames)


def test_condition_is_what_sampling_gives():
    """The scalars of a training clip equal those of the pipeline, wherever the clip begins."""
    graphdef, params, frozen = model(1)
    whole = {**params, "autoencoder": frozen}
    key = jax.random.key(0)
    settings = pipeline.Settings(config(1), sampler.SamplingConfig(), activations="float32")

    @fixtures.jit
    def make(whole, batch):
        return conditioning.make(
            nnx.merge(graphdef, whole), batch, key, conditioning.ConditionConfig()
        )

    @fixtures.jit
    def encode_picture(whole, pixels):
        return pipeline.picture_latent(settings, nnx.merge(graphdef, whole), pixels, key)

    condition = make(whole, batch())
    expected = pipeline.vector(settings, CLIPS)
    np.testing.assert_allclose(condition.vector, expected, atol=2e-4)
    first = batch()["latents"][:, 0].astype(np.float32)
    np.testing.assert_array_equal(condition.latent, first)
    # ... and latents are cached at the scale at which sampling encodes the picture.
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    encode = cached.encoder(config(1).autoencoder, frozen, jnp.float32)
    pixels = image.to_network(jnp.asarray(frames, jnp.float32) / 255.0)
    latent = encode_picture(whole, pixels)
    np.testing.assert_allclose(encode(frames), latent, atol=1e-5)
