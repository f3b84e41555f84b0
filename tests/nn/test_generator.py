import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tiny_generator
from flax import nnx

from v3d_jax.nn import generator, layers

# Bytes that int8 weights of the packaged model may take, scales aside.
MINI_LIMIT = 23_000_000


def counts(config):
    model = generator.abstract(config)
    parts = (model.unet, model.autoencoder.encoder, model.autoencoder.decoder, model.vision)
    return tuple(generator.num_parameters(part) for part in parts)


@pytest.mark.slow
@pytest.mark.golden
def test_published_sizes():
    # The 25-frame and the 18-frame model have the same networks: only clips differ.
    same = {"num_frames": 25, "image_size": (576, 1024)}
    assert dataclasses.replace(generator.V3D_512, **same) == generator.SVD_XT
    assert counts(generator.V3D_512) == (1_524_623_082, 34_163_592, 63_579_183, 632_076_800)


def test_mini_fits_the_package():
    assert sum(counts(generator.MINI)) < MINI_LIMIT


def test_an_abstract_generator_is_the_constructors():
    """Although only one of clips of one frame was traced, and in another type."""
    config = dataclasses.replace(tiny_generator.CONFIG, num_frames=5)
    built = nnx.eval_shape(
        lambda: generator.Generator(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )
    graphdef, state = nnx.split(built)
    generator.abstract(config)  # float32 ones must not be the same objects
    made = nnx.split(generator.abstract(config, dtype=jnp.bfloat16))
    assert made[0] == graphdef
    assert nnx.split(generator.abstract(config))[0] != graphdef
    assert jax.tree.map(lambda x: (x.shape, x.dtype), nnx.to_pure_dict(made[1])) == jax.tree.map(
        lambda x: (x.shape, x.dtype), nnx.to_pure_dict(state)
    )


def test_weights_that_layers_cast_are_kernels_their_biases_and_embeddings():
    names = {"a.conv.kernel", "a.conv.bias", "a.norm.scale", "a.norm.bias", "a.mix.mix_factor"}
    names |= {"vision.class_embedding"}
    cast = {"a.conv.kernel", "a.conv.bias", "vision.class_embedding"}
    assert generator.cast_weights(names) == cast


def test_latent_shapes():
    assert generator.V3D_512.latent_shape == (18, 64, 64, 4)
    assert generator.SVD_XT.latent_shape == (25, 72, 128, 4)
    assert generator.SVD_XT.frame_size == (576, 1024)
    assert generator.MINI.frame_size == (256, 256)


@pytest.mark.parametrize(
    ("part", "change", "name"),
    [
        ("unet", {"in_channels": 9}, "unet.in_channels"),
        ("unet", {"out_channels": 3}, "unet.out_channels"),
        ("unet", {"context_dim": 1}, "unet.context_dim"),
        ("conditioner", {"scalars": ("azimuth", "elevation")}, "unet.vector_dim"),
    ],
)
def test_parts_that_do_not_fit_are_errors(part, change, name):
    changed = dataclasses.replace(getattr(generator.MINI, part), **change)
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(generator.MINI, **{part: changed})


def test_frames_must_divide():
    with pytest.raises(ValueError, match="do not divide by 32"):
        dataclasses.replace(generator.MINI, image_size=(256, 240))


@pytest.mark.parametrize("config", [generator.SCENE_MINI, generator.SCENE_512])
def test_every_layer_gathers_its_kernel(config):
    """Where weights are split over devices; a layer made otherwise leaves that to the compiler."""
    kinds = (nnx.Linear, nnx.Conv)
    found = [m for _, m in nnx.iter_modules(generator.abstract(config)) if isinstance(m, kinds)]
    assert len(found) > 100
    assert all(module.promote_dtype is layers.promote_dtype for module in found)
