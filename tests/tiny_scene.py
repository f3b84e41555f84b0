"""The smallest scene model, and views and cameras around the origin for it."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny_generator
from flax import nnx

from v3d_jax.nn import generator, pixelnerf, resunet
from v3d_jax.ops import camera
from v3d_jax.weights import folder

CONFIG = generator.scene(
    tiny_generator.CONFIG,
    pixelnerf.PixelNeRFConfig(
        encoder=resunet.ResUNetConfig(channels=8, blocks=(1, 1), norm="layer"),
        sampling="disparity",
        samples=4,
        near=0.5,
        far=6.0,
        deviation=True,
        position="view",
        carried=("colors", "latents"),
        hidden=24,
        features=6,
        blend=4,
    ),
)


def params():
    """As `tiny_generator.params`, in plain dicts."""
    return nnx.to_pure_dict(tiny_generator.params(CONFIG))


def cameras(frames: int = CONFIG.num_frames, clips: int = 1) -> camera.Camera:
    """An arc [b, t] of 20 degrees a frame, as far from the origin as normalised cameras are."""
    size = CONFIG.image_size
    one = camera.orbit(18, width=size, height=size, radius=1.5)
    return jax.tree.map(lambda x: jnp.stack([x[:frames]] * clips), one)


def views(count: int = 2, valid: int = 2, clips: int = 1) -> pixelnerf.Views:
    """Pictures of noise at the first frames' cameras."""
    rng = np.random.default_rng(1)
    shape = (clips, count, CONFIG.image_size, CONFIG.image_size, 3)
    images = jnp.asarray(rng.uniform(-1.0, 1.0, shape), jnp.float32)
    given = jnp.broadcast_to(jnp.arange(count) < valid, (clips, count))
    return pixelnerf.Views(images, cameras(count, clips), given)


def save_models(path, sampling):
    """This model and the smallest one of objects, in folders `scene` and `object`; the path."""
    folder.save(path / "scene", CONFIG, sampling, params())
    objects = nnx.to_pure_dict(tiny_generator.params())
    folder.save(path / "object", tiny_generator.CONFIG, sampling, objects)
    return path
