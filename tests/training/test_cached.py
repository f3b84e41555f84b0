"""Training from stored latents and vectors does what it does when it encodes frames itself."""

import contextlib
import dataclasses
from pathlib import Path

import fixtures
import jax
import numpy as np
import pytest
import synthetic_orbits
import tiny_generator
from flax import nnx

from v3d_jax import config
from v3d_jax.data import latents, loader, orbits
from v3d_jax.diffusion.sampler import SamplingConfig
from v3d_jax.training import cached
from v3d_jax.training.cached import CachedLatentsConfig
from v3d_jax.training.objective import DataConfig
from v3d_jax.weights import folder

SIZE = 16


@pytest.fixture(autouse=True)
def fast_compile(monkeypatch):
    monkeypatch.setattr(jax, "jit", fixtures.jit)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A data set of 5 + 2 orbits and a model, whose latents and vectors are kept beside it."""
    path = tmp_path_factory.mktemp("cached")
    synthetic_orbits.build(path / "data", train=5, heldout=2, size=SIZE)
    params = nnx.to_pure_dict(tiny_generator.params())
    folder.save(path / "model", tiny_generator.CONFIG, SamplingConfig(steps=1), params)
    stored = CachedLatentsConfig(cache=latents.CacheConfig(SIZE))
    cached.write(path / "data", str(path / "model"), stored, np.dtype("float32"))
    return path


def objective(files, **changes):
    settings = config.VideoTrainConfig(
        model=tiny_generator.CONFIG,
        latents=CachedLatentsConfig(
            **{"autoencoder": str(files / "model"), "cache": latents.CacheConfig(SIZE), **changes}
        ),
        data=DataConfig((str(files / "data"),), loader=loader.LoaderConfig(4, 3, threads=1)),
        run=config.RunConfig(init_from=str(files / "model")),
        parts=("unet",),
        dtype="float32",
    )
    return settings.objective(), settings.data.loader


def test_stored_gives_the_loss_of_frames_encoded_now(files, tmp_path, monkeypatch):
    fresh, settings = objective(files, folder=str(tmp_path), save=False, tokens=False)

    def refuse(*arguments):
        raise AssertionError("encoded again")

    for name in ("encoder", "tower"):
        monkeypatch.setattr(cached, name, lambda *arguments: refuse)
    stored, _ = objective(files)
    losses, kinds = [], []
    for found in (fresh, stored):
        with contextlib.closing(loader.batches(found.clips, settings)) as stream:
            batch = next(stream)
        kinds.append(set(batch))
        params = found.load(files / "model")
        losses.append(jax.jit(found.loss)(params, found.frozen, batch, jax.random.key(0))[0])
    assert kinds[1] - kinds[0] == {"tokens"}
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert list(tmp_path.iterdir()) == []


def test_every_split_is_kept_once(files):
    names = sorted(path.name.partition("-")[0] for path in (files / "data").iterdir())
    assert names == ["latents", "latents", "orbits", "tokens", "tokens"]
    source = orbits.source(files / "data", "heldout")
    sizes = {np.load(path).shape for path in (files / "data").glob("tokens-*/tokens.npy")}
    assert sizes == {(len(source), 6, 1, 8), (5, 6, 1, 8)}


def test_vectors_follow_the_tower_and_its_settings(files, tmp_path):
    """Other weights or another preprocessing are encoded anew."""
    stored = CachedLatentsConfig(folder=str(tmp_path), cache=latents.CacheConfig(SIZE))
    source = orbits.source(files / "data", "heldout")
    cache = latents.LatentCache(
        latents=np.zeros((2, 6, 2, 2, 4), np.float16),
        images=np.zeros((2, 6, SIZE, SIZE, 3), np.uint8),
        azimuths=np.zeros((2, 6), np.float32),
        elevations=np.zeros(2, np.float32),
        names=["a", "b"],
        source=source,
    )
    vision = tiny_generator.CONFIG.vision
    params = nnx.to_pure_dict(tiny_generator.params())["vision"]
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    clip = dataclasses.replace(vision, preprocess="clip")
    tokens = [
        cached.add_tokens([cache], settings, weights, stored, np.dtype("float32"))[0].tokens
        for settings, weights in ((vision, params), (vision, other), (clip, params))
    ]
    assert len(list(tmp_path.iterdir())) == 3
    assert not np.array_equal(tokens[0], tokens[1])
    assert not np.array_equal(tokens[0], tokens[2])
