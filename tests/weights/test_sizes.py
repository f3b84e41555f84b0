"""Settings of networks out of the names and shapes of their tensors."""

import dataclasses
from types import SimpleNamespace

import pytest
import test_keymap
from flax import nnx

from v3d_jax.nn import autoencoder, clip, unet
from v3d_jax.weights import clip as clip_names
from v3d_jax.weights import diffusers, keymap, sgm, sizes


def tensors_of(create, rules):
    """Shapes of a network's tensors, by the names of a layout."""
    shapes = keymap.shapes(rules, test_keymap.abstract(create))
    return {name: SimpleNamespace(shape=shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (unet.UNetConfig(32, 4, 32, (1, 3), 3, (1,), 32, 12, 24), "both"),
        (unet.UNetConfig(8, 4, 64, (1, 1, 2), 1, (4, 1), 64, 20, 24), "both"),
        (unet.UNetConfig(8, 5, 32, (2, 1), 2, (), 32, 12, 48), "sgm"),
    ],
)
def test_every_size_of_a_unet_is_found(config, layout):
    def create():
        return unet.VideoUNet(config, rngs=nnx.Rngs(0))

    named = tensors_of(create, sgm.unet(config))
    assert sizes.sgm_unet(named, "x", config.head_channels) == config
    if layout == "both":
        named = tensors_of(create, diffusers.unet(config))
        assert sizes.diffusers_unet(named, "x", config.head_channels) == config


def test_every_size_of_an_autoencoder_is_found():
    config = autoencoder.AutoencoderConfig(
        channels=32, channel_mult=(1, 3, 1), num_res_blocks=3, latent_channels=6
    )

    def create():
        return autoencoder.Autoencoder(config, rngs=nnx.Rngs(0))

    assert sizes.sgm_autoencoder(tensors_of(create, sgm.autoencoder(config)), "x") == config
    named = tensors_of(create, diffusers.autoencoder(config))
    assert sizes.diffusers_autoencoder(named, "x") == config


def test_every_size_of_a_tower_is_found():
    config = clip.VisionConfig(
        image_size=24, patch=8, width=192, layers=3, heads=3, mlp=50, output_dim=20
    )

    def create():
        return clip.VisionTransformer(config, rngs=nnx.Rngs(0))

    assert sizes.open_clip(tensors_of(create, clip_names.open_clip(config)), "x", None) == config
    named = tensors_of(create, clip_names.transformers(config))
    assert sizes.transformers(named, "x", None) == config
    more = dataclasses.replace(config, heads=6)
    assert sizes.transformers(named, "x", 6) == more
