"""The packaged scene model: what ships, how large it is, and that it sees from elsewhere."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic_scenes

from v3d_jax import pipeline, scene_pipeline
from v3d_jax.data import clips, orbits
from v3d_jax.nn import generator, pixelnerf
from v3d_jax.ops import image
from v3d_jax.weights import folder, packaged

LIMIT = 16_000_000  # bytes of weights beside the mini's


def test_the_packaged_model_is_the_preset_beside_the_mini():
    path = packaged.resolve("scene_mini")
    assert sum(file.stat().st_size for file in path.glob("*.safetensors")) <= LIMIT
    assert json.loads((path / folder.CONFIG).read_text())["base"] == "../mini"
    model = folder.load(path)
    preset = generator.SCENE_MINI
    scale = model.generator.autoencoder.scale_factor
    autoencoder = dataclasses.replace(preset.autoencoder, scale_factor=scale, frames_alone=True)
    assert model.generator == dataclasses.replace(preset, autoencoder=autoencoder)
    weights = folder.flatten(model.params)
    assert all(np.isfinite(leaf).all() for leaf in weights.values())
    # The image tower is the mini's, which does not know the PixelNeRF.
    mini = folder.flatten(folder.load(packaged.resolve("mini")).params)
    shared = [name for name in weights if name.startswith("vision.")]
    assert shared
    assert all(np.array_equal(weights[name], mini[name]) for name in shared)
    assert any(name.startswith("pixelnerf.") for name in weights)


@pytest.mark.slow
def test_frames_between_the_views_are_nearer_the_truth_than_any_view():
    """A painted sky, ten degrees a frame: views 0, 2 and 4 are given."""
    settings, params = pipeline.load("scene_mini")
    side, given, asked = settings.generator.image_size, [0, 2, 4], [0, 1, 3]
    record, seen = synthetic_scenes.scene(0, side), synthetic_scenes.cameras(0, side)
    truth = orbits.pixels(record, np.arange(synthetic_scenes.VIEWS))[..., :3] / 255.0
    moved = clips.normalise(np.asarray(seen.world_to_camera, np.float64))[0]

    def chosen(places):
        cameras = seen._replace(world_to_camera=jnp.asarray(moved, jnp.float32))
        return jax.tree.map(lambda x: x[None, np.asarray(places)], cameras)

    # A model makes so many frames at a time; the last are repeated.
    targets = chosen([*asked, *[asked[-1]] * (settings.generator.num_frames - len(asked))])
    pictures = image.to_network(jnp.asarray(truth[None, given], jnp.float32))
    views = pixelnerf.Views(pictures, chosen(given), jnp.ones((1, len(given)), bool))
    whole = jax.jit(scene_pipeline.views_to_frames, static_argnums=0)
    frames = np.asarray(whole(settings, params, views, targets, jax.random.key(0)))[0]

    def psnr(a, b):
        return -10.0 * np.log10(np.mean(np.square(a - b)))

    for place, index in enumerate(asked):
        nearest = max(psnr(truth[view], truth[index]) for view in given if view != index)
        assert psnr(frames[place], truth[index]) > nearest + 2.0
