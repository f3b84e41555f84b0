"""The whole image-to-orbit model: UNet, autoencoder and image tower with their settings.

A scene model has a PixelNeRF besides, which tells its UNet where the cameras are.

The presets are constants: `SVD_XT` and `V3D_512` are the published models, `MINI` is small enough
to train on one device and to ship with the package in int8. `SCENE_512` and `SCENE_MINI` are the
latter two as scene models.
"""

import dataclasses
import functools
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# Classes by name, because the fields below are called what the modules are.
from v3d_jax.nn.autoencoder import Autoencoder, AutoencoderConfig
from v3d_jax.nn.clip import VisionConfig, VisionTransformer
from v3d_jax.nn.conditioner import ConditionerConfig
from v3d_jax.nn.pixelnerf import PixelNeRF, PixelNeRFConfig
from v3d_jax.nn.resunet import ResUNetConfig
from v3d_jax.nn.unet import UNetConfig, VideoUNet


@dataclass(frozen=True)
class GeneratorConfig:
    """Sizes of the networks, the conditioning scalars, and the clips they are for.

    `image_size` is a side in pixels, or (height, width). With `pixelnerf` it is a scene model,
    whose UNet takes the PixelNeRF's features as its last channels. Sizes that cannot fit together
    raise a ValueError.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    conditioner: ConditionerConfig = field(default_factory=ConditionerConfig)
    num_frames: int = 18
    image_size: int | tuple[int, int] = 512
    pixelnerf: PixelNeRFConfig | None = None

    def __post_init__(self):
        latent = self.autoencoder.latent_channels
        features = 0 if self.pixelnerf is None else self.pixelnerf.features
        pairs = (
            ("unet.in_channels", self.unet.in_channels, 2 * latent + features),
            ("unet.out_channels", self.unet.out_channels, latent),
            ("unet.context_dim", self.unet.context_dim, self.vision.output_dim),
            ("unet.vector_dim", self.unet.vector_dim, self.conditioner.vector_dim),
        )
        for name, given, needed in pairs:
            if given != needed:
                raise ValueError(f"{name} is {given}, but the other parts need {needed}")
        factor = self.autoencoder.factor * 2 ** (len(self.unet.channel_mult) - 1)
        if any(side % factor for side in self.frame_size):
            raise ValueError(f"frames of {self.frame_size} pixels do not divide by {factor}")

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of a frame in pixels."""
        if isinstance(self.image_size, int):
            return (self.image_size, self.image_size)
        return self.image_size

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Frames, height, width and channels of one clip's latents."""
        height, width = (side // self.autoencoder.factor for side in self.frame_size)
        return (self.num_frames, height, width, self.autoencoder.latent_channels)


def scene(
    config: GeneratorConfig, pixelnerf: PixelNeRFConfig, latent_channels: int | None = None
) -> GeneratorConfig:
    """An object model's settings as those of a scene model, whose UNet is wider at its input.

    With `latent_channels` its autoencoder is one of so many.
    """
    latent = latent_channels or config.autoencoder.latent_channels
    return dataclasses.replace(
        config,
        unet=dataclasses.replace(
            config.unet, in_channels=2 * latent + pixelnerf.features, out_channels=latent
        ),
        autoencoder=dataclasses.replace(config.autoencoder, latent_channels=latent),
        pixelnerf=pixelnerf,
    )


SVD_XT = GeneratorConfig(num_frames=25, image_size=(576, 1024))
V3D_512 = GeneratorConfig(num_frames=18, image_size=512)
MINI = GeneratorConfig(
    unet=UNetConfig(
        model_channels=32,
        channel_mult=(2, 4, 5),
        num_res_blocks=1,
        attention_resolutions=(1, 2, 4),
        head_channels=32,
        context_dim=128,
        vector_dim=256,
        groups=8,
    ),
    # In 32 groups of one channel, normalisation would take away how far a colour is from another.
    autoencoder=AutoencoderConfig(
        channels=32, channel_mult=(1, 2, 3, 3), num_res_blocks=1, groups=8
    ),
    vision=VisionConfig(
        image_size=128,
        patch=16,
        width=192,
        layers=6,
        heads=6,
        mlp=768,
        output_dim=128,
        output="tokens",
        preprocess="plain",
    ),
    conditioner=ConditionerConfig(scalars=("azimuth",)),
    num_frames=18,
    image_size=256,
)
# Rooms reach beyond any cube around the path, so samples are spread in disparity.
SCENE_512 = scene(V3D_512, PixelNeRFConfig(sampling="disparity"))
# A room has detail everywhere, where half of an object's picture is white: more latent channels.
SCENE_MINI = scene(
    MINI,
    PixelNeRFConfig(
        encoder=ResUNetConfig(channels=32, blocks=(2, 2, 2), norm="layer"),
        sampling="disparity",
        samples=48,
        near=0.375,
        far=18.0,
        deviation=True,
        position="view",
        carried=("colors", "latents"),
        hidden=64,
        features=48,
        blend=16,
    ),
    latent_channels=16,
)


class Generator(nnx.Module):
    """Holds the networks; `v3d_jax.pipeline` composes them."""

    def __init__(self, config: GeneratorConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.unet = VideoUNet(config.unet, dtype=dtype, rngs=rngs)
        self.autoencoder = Autoencoder(config.autoencoder, dtype=dtype, rngs=rngs)
        self.vision = VisionTransformer(config.vision, dtype=dtype, rngs=rngs)
        if config.pixelnerf is not None:
            self.pixelnerf = PixelNeRF(config.pixelnerf, dtype=dtype, rngs=rngs)


def abstract(config: GeneratorConfig, *, dtype: Any = jnp.float32) -> Generator:
    """The generator with shapes in place of arrays: no memory, no computation.

    Tracing the constructor takes seconds at the published size, so it is done once for all clips
    and types of activations, which are put in afterwards.
    """
    side = config.autoencoder.factor * 2 ** (len(config.unet.channel_mult) - 1)
    model = nnx.merge(*_traced(dataclasses.replace(config, num_frames=1, image_size=side)))
    model.config = config
    for _, module in nnx.iter_modules(model):
        if "dtype" in vars(module):
            module.dtype = dtype
    return model


@functools.lru_cache(maxsize=8)
def _traced(config: GeneratorConfig) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: Generator(config, rngs=nnx.Rngs(0))))


def cast_weights(names: Collection[str]) -> set[str]:
    """Of all weights, by dotted path, those that layers cast to the type of activations.

    These are kernels with their biases, and the image tower's embeddings: held in that type they
    give the same results and are not cast again at every use. Norms and blends stay in float32.
    """
    held = set(names)

    def is_cast(name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        beside_kernel = leaf == "bias" and f"{module}.kernel" in held
        return leaf == "kernel" or beside_kernel or leaf.endswith("_embedding")

    return {name for name in held if is_cast(name)}


def num_parameters(module: nnx.Module) -> int:
    """Parameters of a module, concrete or abstract."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
