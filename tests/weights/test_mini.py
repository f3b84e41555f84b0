"""The packaged model: what ships, how large it is, and that it is what the preset says."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from v3d_jax import sample
from v3d_jax.nn import generator
from v3d_jax.weights import folder, packaged

LIMIT = 24_000_000  # bytes of weights


def test_the_packaged_model_is_the_preset_in_eight_bits():
    path = packaged.resolve("mini")
    assert sum(file.stat().st_size for file in path.glob("*.safetensors")) <= LIMIT
    model = folder.load(path)
    scale = model.generator.autoencoder.scale_factor
    # Training measures the scale, and teaches the decoder to take frames alone.
    autoencoder = dataclasses.replace(
        generator.MINI.autoencoder, scale_factor=scale, frames_alone=True
    )
    assert model.generator == dataclasses.replace(generator.MINI, autoencoder=autoencoder)
    assert all(np.isfinite(leaf).all() for leaf in folder.flatten(model.params).values())


@pytest.mark.parametrize("name", packaged.names())
def test_its_card_and_settings_name_its_data_and_no_machine(name):
    path = packaged.resolve(name)
    card = (path / "README.md").read_text(encoding="utf-8")
    for needed in ("CC-BY-SA 3.0", "sweethome3d-furniture", "megaglest-data", "LPIPS"):
        assert needed in card
    metadata = json.loads((path / folder.CONFIG).read_text())["metadata"]
    assert metadata["steps"] > 0
    assert not {"run", "data", "latents"} & set(metadata["training"])


@pytest.mark.slow
def test_the_example_becomes_an_orbit(tmp_path):
    (made,) = sample.run(sample.SampleArgs(out=tmp_path, cache=False))
    frames = [np.asarray(Image.open(file)) for file in sorted((made / "frames").iterdir())]
    assert [frame.shape for frame in frames] == [(256, 256, 3)] * 18
    # The background stays white, and the object is in every frame.
    for frame in frames:
        assert frame[:8].min() > 200
        assert (frame.min(axis=2) < 200).mean() > 0.05
