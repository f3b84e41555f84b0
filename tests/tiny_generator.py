"""The smallest generator that has every part, with random weights, for tests of whole runs."""

import jax
import numpy as np

from v3d_jax.nn import autoencoder, clip, conditioner, generator, unet
from v3d_jax.weights import folder

CONFIG = generator.GeneratorConfig(
    unet=unet.UNetConfig(
        model_channels=32,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        head_channels=32,
        context_dim=8,
        vector_dim=8,
        attention_impl="xla",
    ),
    autoencoder=autoencoder.AutoencoderConfig(
        channels=32, channel_mult=(1, 1), num_res_blocks=1, scale_factor=0.5
    ),
    vision=clip.VisionConfig(
        image_size=8, patch=4, width=8, layers=1, heads=1, mlp=8, output_dim=8, preprocess="plain"
    ),
    conditioner=conditioner.ConditionerConfig(scalars=("azimuth",), dim=8),
    num_frames=3,
    image_size=16,
)


def params(config: generator.GeneratorConfig = CONFIG):
    """Weights of an initialiser's size, none of them zero, the same at every call."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        fan_in = max(1, int(np.prod(leaf.shape[:-1])))
        return (rng.standard_normal(leaf.shape, np.float32) / np.sqrt(fan_in)).astype(np.float32)

    return jax.tree.map(draw, folder.abstract_params(config))
