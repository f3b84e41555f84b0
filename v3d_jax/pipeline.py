"""One picture to an orbit video and 3D Gaussians: one pure function a stage, and all as one.

For a notebook, where a picture is a file's path:

    model = pipeline.load("mini")
    frames = pipeline.generate_orbit(model, "picture.png", jax.random.key(0))

Axes: `b` clip, `t` frame, `h w` image, `c` channel. Images are in [0, 1]; latents are the diffusion
model's (scaled, of about unit variance). `params` is the tree that `nnx.split` gives of a
`Generator`. Every function of settings can be jitted with them static:

    orbit = jax.jit(pipeline.image_to_orbit, static_argnums=0)
    frames = orbit(pipeline.Settings(generator_config, sampling_config), params, image, key)

`image_to_splats` goes on to the Gaussians in the same program. Scene models make frames along any
path from posed views: `v3d_jax.scene_pipeline`.
"""

import functools
import os
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key
from PIL import Image

from v3d_jax import console, errors
from v3d_jax.data import preprocess
from v3d_jax.diffusion import guidance, sampler
from v3d_jax.diffusion.guidance import Condition
from v3d_jax.nn import chunked_decoder, conditioner, generator, lpips
from v3d_jax.ops import camera, compiling
from v3d_jax.ops import image as images
from v3d_jax.parallel import sampling as parallel
from v3d_jax.splat import objective, recipe
from v3d_jax.splat.recipe import SplatConfig, Splats
from v3d_jax.weights import folder, packaged


@dataclass(frozen=True)
class ConditioningConfig:
    """Scalars that the model is told of, the same for all frames; the defaults are V3D's.

    `cond_aug` is also the standard deviation of the noise added to the picture's latent. A model
    reads those that its `ConditionerConfig` names, and "azimuth": degrees from frame 0.
    """

    fps_id: float = 1.0
    motion_bucket_id: float = 300.0
    cond_aug: float = 0.02
    elevation: float = 0.0


@dataclass(frozen=True)
class Settings:
    """Everything static about a run.

    `activations` is the networks' type; "auto" is float32 on a CPU and bfloat16 elsewhere.
    `decode_frames` > 0 decodes so many frames at a time, which takes less memory and changes the
    result, because the decoder then does not see beyond its chunk. `low_memory` does not change it:
    guidance's branches run in turn and the decoder in chunks within each layer. `devices` > 1
    splits branches and frames over so many.
    """

    generator: generator.GeneratorConfig
    sampling: sampler.SamplingConfig
    conditioning: ConditioningConfig = ConditioningConfig()
    activations: Literal["auto", "float32", "bfloat16"] = "auto"
    decode_frames: int = 0
    low_memory: bool = False
    devices: int = 1
    splats: SplatConfig = field(default_factory=SplatConfig)

    def __post_init__(self):
        if self.low_memory and self.devices > 1:
            raise ValueError("low_memory is for one device: several share the memory already")

    @property
    def dtype(self) -> Any:
        """The networks' type of activations on the default device."""
        automatic = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        return jnp.dtype(automatic if self.activations == "auto" else self.activations)


class Model(NamedTuple):
    """A model to run: its settings and, on the device, its weights as the networks use them."""

    settings: Settings
    params: Any


def load(name_or_path: str | os.PathLike, **changes: Any) -> Model:
    """A packaged model, a model folder or a published checkpoint, with its own sampling settings.

    `changes` are fields of `Settings` to set. Raises `UserError` as `weights.packaged.open_model`.
    """
    unread = packaged.open_model(name_or_path)
    settings = replace(Settings(unread.generator, unread.sampling), **changes)
    return Model(settings, read_params(settings, unread))


def read_params(settings: Settings, unread: folder.Unread, advance: Any = None) -> Any:
    """The weights of an opened model, in the types that networks use them in.

    `advance` is told 1 for every tensor.
    """
    params = nnx.to_pure_dict(folder.read(unread, advance, settings.dtype).params)
    mesh = device_mesh(settings)
    return jax.device_put(params) if mesh is None else parallel.repeat(params, mesh)


def device_mesh(settings: Settings) -> jax.sharding.Mesh | None:
    """The devices of a run if there are several; `UserError` if they cannot be used."""
    if settings.devices == 1:
        return None
    branches = 1 if np.all(frame_scale(settings) == 1.0) else 2
    return parallel.mesh(settings.devices, branches, settings.generator.num_frames)


def generate_orbit(
    model: Model,
    image: str | os.PathLike | Image.Image | Float[Array, "h w 3"] | Float[np.ndarray, "h w 3"],
    key: Key[Array, ""],
) -> Float[Array, "t h w 3"]:
    """The orbit video of a picture, frames in [0, 1]; frame 0 is the picture's own view.

    A path or a Pillow image is cut out and centred first (`data.preprocess`); an array is taken as
    `image_to_orbit` takes it. The first call compiles. Raises `UserError` for a picture that
    cannot be used, for an array of another size than the model's frames, and for a scene model.
    """
    if model.settings.generator.pixelnerf is not None:
        raise errors.UserError(
            "this is a scene model, which wants views: use scene_pipeline.views_to_frames"
        )
    height, width = model.settings.generator.frame_size
    if isinstance(image, str | os.PathLike | Image.Image):
        if height != width:
            raise errors.UserError(
                f"the model makes {width} x {height} frames and pictures are made square for it:"
                " give an array of that size"
            )
        prepared = preprocess.prepare(image, width)
        for note in prepared.notes:
            console.note(note)
        image = prepared.image / 255.0
    elif image.shape[:2] != (height, width):
        raise errors.UserError(
            f"an array of {image.shape[1]} x {image.shape[0]} pixels was given, the model takes"
            f" {width} x {height}: give a path to have it fitted"
        )
    return _image_to_orbit(model.settings, model.params, jnp.asarray(image, jnp.float32), key)


def encode_condition(
    settings: Settings, params: Any, image: Float[Array, "b h w 3"], key: Key[Array, ""]
) -> Condition:
    """What the UNet is conditioned on: tokens and latent of the picture, and the scalars."""
    network = networks(settings, params)
    pixels = images.to_network(image)
    latent = picture_latent(settings, network, pixels, key)
    context = network.vision(pixels).astype(jnp.float32)
    return Condition(context, latent, vector(settings, image.shape[0]))


def picture_latent(
    settings: Settings,
    network: generator.Generator,
    pixels: Float[Array, "b h w 3"],
    key: Key[Array, ""],
) -> Float[Array, "b i j c"]:
    """The latent that is concatenated to every frame's.

    A model told of `cond_aug` gets what SVD and V3D feed theirs: a sample of the posterior plus
    noise of that standard deviation, not scaled. Any other gets the posterior's mean, scaled as the
    latents it denoises.
    """
    posterior = network.autoencoder.encode(pixels)
    if "cond_aug" not in settings.generator.conditioner.scalars:
        return posterior.mean * settings.generator.autoencoder.scale_factor
    sample_key, noise_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, posterior.mean.shape)
    return posterior.sample(sample_key) + settings.conditioning.cond_aug * noise


def vector(settings: Settings, clips: int) -> Float[Array, "{clips} t a"]:
    """The scalars of every frame as sinusoids, by the names that the model's settings list.

    A scene's cameras go round nothing: their azimuth is 0, and the features tell where they are.
    """
    frames = settings.generator.num_frames
    turn = 0.0 if settings.generator.pixelnerf is not None else 360.0
    azimuth = jnp.arange(frames, dtype=jnp.float32) * (turn / frames)
    values = {}
    for name in settings.generator.conditioner.scalars:
        value = azimuth if name == "azimuth" else getattr(settings.conditioning, name)
        values[name] = jnp.broadcast_to(jnp.asarray(value, jnp.float32), (clips, frames))
    return conditioner.vector(settings.generator.conditioner, values)


def branch(settings: Settings, params: Any, condition: Condition) -> guidance.Branches:
    """The branches of guidance, with all that is the same at every step already computed.

    A context of one token decides cross-attention alone (`VideoUNet.answers`). `advance` does this
    itself if it is given a condition: a caller of single steps saves it by doing it once.
    """
    made = guidance.branches(condition, frame_scale(settings))
    tokens = made.condition.context
    if tokens.shape[1] != 1:
        return made
    answers = networks(settings, params).unet.answers(tokens[:, None])
    return guidance.Branches(made.condition._replace(context=answers))


def begin(
    settings: Settings, clips: int, key: Key[Array, ""]
) -> tuple[sampler.Trajectory, Float[Array, " n"]]:
    """Noise at the first of the noise levels, and the levels."""
    levels = sampler.sigmas(settings.sampling)
    noise = jax.random.normal(key, (clips, *settings.generator.latent_shape))
    return _everywhere(settings, sampler.begin(noise, levels[0])), levels


def _everywhere(settings: Settings, trajectory: sampler.Trajectory) -> sampler.Trajectory:
    """Whole on every device of a run, before a step and after it: all are then one program."""
    mesh = device_mesh(settings)
    return trajectory if mesh is None else parallel.repeat(trajectory, mesh)


def advance(
    settings: Settings,
    params: Any,
    condition: Condition | guidance.Branches,
    trajectory: sampler.Trajectory,
    levels: Float[Array, " n"],
) -> sampler.Trajectory:
    """Runs the sampler over some of the noise levels, so that a caller can report in between."""
    if isinstance(condition, Condition):
        condition = branch(settings, params, condition)
    network, mesh = networks(settings, params).unet, device_mesh(settings)
    denoise = guidance.denoiser(
        network if mesh is None else parallel.split_network(network, mesh),
        condition,
        frame_scale(settings),
        interval=settings.sampling.guidance_interval,
        in_turn=settings.low_memory,
    )
    return _everywhere(settings, sampler.advance(settings.sampling, denoise, trajectory, levels))


def frame_scale(settings: Settings) -> Any:
    """The guidance scale of every frame as a static numpy array [t]."""
    config = settings.sampling
    return guidance.frame_scale(
        config.guidance_shape,
        config.guidance_min,
        config.guidance_max,
        settings.generator.num_frames,
    )


def sample_latents(
    settings: Settings, params: Any, condition: Condition, key: Key[Array, ""]
) -> Float[Array, "b t i j c"]:
    """Latents of one clip for every picture in `condition`, all steps in one scan."""
    trajectory, levels = begin(settings, condition.latent.shape[0], key)
    return advance(settings, params, condition, trajectory, levels).x


def decode(
    settings: Settings, params: Any, latents: Float[Array, "b t i j c"]
) -> Float[Array, "b t h w 3"]:
    """Frames in [0, 1], decoded all together or in chunks of `decode_frames`."""
    autoencoder = networks(settings, params).autoencoder
    latents = latents / settings.generator.autoencoder.scale_factor
    mesh = device_mesh(settings)
    if mesh is not None:
        latents = parallel.split_frames(latents, mesh)
    count = latents.shape[1]
    chunk = settings.decode_frames or count
    parts = []
    for i in range(0, count, chunk):
        part = latents[:, i : i + chunk]
        if settings.low_memory and autoencoder.config.frames_alone:
            alone = jax.lax.map(autoencoder.decode, jnp.swapaxes(part, 0, 1)[:, :, None])
            parts.append(jnp.swapaxes(alone[:, :, 0], 0, 1))
        elif settings.low_memory:
            frames = 1 + (part.shape[1] % 2 == 0)
            decoded = chunked_decoder.decode(autoencoder.decoder, part, frames)
            parts.append(decoded.astype(part.dtype))
        else:
            parts.append(autoencoder.decode(part))
    return images.from_network(jnp.concatenate(parts, axis=1))


def image_to_orbit(
    settings: Settings, params: Any, image: Float[Array, "h w 3"], key: Key[Array, ""]
) -> Float[Array, "t h w 3"]:
    """The orbit video of one prepared picture: frame 0 is the picture's own view.

    `image` is composited on white and has the generator's frame size (`data.preprocess`).
    """
    condition_key, noise_key = split_key(key)
    condition = encode_condition(settings, params, image[None], condition_key)
    latents = sample_latents(settings, params, condition, noise_key)
    return decode(settings, params, latents)[0]


def split_key(key: Key[Array, ""]) -> tuple[Key[Array, ""], Key[Array, ""]]:
    """The keys of the conditioning and of the initial noise that `image_to_orbit` uses."""
    condition_key, noise_key = jax.random.split(key)
    return condition_key, noise_key


def image_to_splats(
    settings: Settings,
    params: Any,
    image: Float[Array, "h w 3"],
    key: Key[Array, ""],
    perceptual_params: lpips.LPIPSParams | None = None,
) -> Splats:
    """The whole method as one function to jit: orbit, masks from white, visual hull, fit.

    Without the parameters of LPIPS its term is left out. The frames are those of `image_to_orbit`
    with the same key.
    """
    frames = image_to_orbit(settings, params, image, key)
    height, width = settings.generator.frame_size
    cameras = camera.orbit(settings.generator.num_frames, width=width, height=height)
    network = None if perceptual_params is None else perceptual(settings.dtype)
    fit_key = jax.random.fold_in(key, 1)
    return recipe.from_frames(settings.splats, frames, cameras, fit_key, network, perceptual_params)


@functools.cache
def perceptual(dtype: Any) -> objective.Perceptual:
    """LPIPS as a fit takes it, its trunk running in `dtype`; the same object every time."""
    return objective.Perceptual(
        functools.partial(lpips.features, dtype=dtype),
        functools.partial(lpips.distance_to_features, dtype=dtype),
        functools.partial(lpips.in_dtype, dtype=dtype),
    )


def networks(settings: Settings, params: Any) -> generator.Generator:
    """The generator with these parameters; costs nothing inside a compiled function."""
    return nnx.merge(_graphdef(settings.generator, settings.dtype), params)


_image_to_orbit = jax.jit(image_to_orbit, static_argnums=0, compiler_options=compiling.OPTIONS)


@functools.cache
def _graphdef(config: generator.GeneratorConfig, dtype: Any) -> Any:
    return nnx.split(generator.abstract(config, dtype=dtype))[0]
