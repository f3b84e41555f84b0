"""Training some of the video model's parts and leaving the others alone."""

import dataclasses
from pathlib import Path

import fixtures
import jax
import numpy as np
import pytest
import random_lpips
import synthetic_orbits
import tiny_generator
from flax import nnx

from v3d_jax import config, errors, train
from v3d_jax.data.loader import LoaderConfig
from v3d_jax.diffusion.sampler import SamplingConfig
from v3d_jax.parallel.mesh import MeshConfig
from v3d_jax.state import OptimConfig
from v3d_jax.training.cached import CachedLatentsConfig
from v3d_jax.training.objective import DataConfig
from v3d_jax.training.perceptual import PerceptualConfig
from v3d_jax.weights import folder
from v3d_jax.weights import lpips as lpips_weights

# One level: what is trained takes long to compile, and no part depends on how many there are.
MODEL = dataclasses.replace(
    tiny_generator.CONFIG,
    autoencoder=dataclasses.replace(tiny_generator.CONFIG.autoencoder, channel_mult=(1,)),
)
PERCEPTUAL = PerceptualConfig(weight=1.0, frames=1, shrink=1, absolute=0.5)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A data set, and the model that a run begins with."""
    path = tmp_path_factory.mktemp("parts")
    synthetic_orbits.build(path / "data")
    params = nnx.to_pure_dict(tiny_generator.params(MODEL))
    folder.save(path / "model", MODEL, SamplingConfig(steps=1), params)
    return path


@pytest.fixture(autouse=True)
def fast_compile(monkeypatch):
    """A step is compiled for every two that run."""
    monkeypatch.setattr(jax, "jit", fixtures.jit)


def settings(files, run, init_from="model", **changes) -> config.VideoTrainConfig:
    return config.VideoTrainConfig(
        model=MODEL,
        latents=CachedLatentsConfig(str(files / "model"), folder=str(files)),
        data=DataConfig((str(files / "data"),), previews=0, loader=LoaderConfig(2, 3, threads=1)),
        optim=OptimConfig(lr=1e-3, warmup=1),
        run=config.RunConfig(
            str(run), steps=2, init_from=init_from and str(files / init_from), log_every=1
        ),
        mesh=MeshConfig(devices=1),
        dtype="float32",
        **{"perceptual": PERCEPTUAL, **changes},
    )


@pytest.mark.parametrize(
    ("parts", "target"), [(("decoder",), "pictures"), (("unet", "decoder"), "decoded")]
)
def test_the_parts_that_are_named_move_and_no_others(files, tmp_path, monkeypatch, parts, target):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(lpips_weights, "load", lambda net: random_lpips.vgg(rng))
    term = dataclasses.replace(PERCEPTUAL, target=target)
    train.train(settings(files, tmp_path / "run", parts=parts, perceptual=term))
    models = [folder.load(path) for path in (files / "model", tmp_path / "run" / "model")]
    assert [model.generator.autoencoder.frames_alone for model in models] == [False, True]
    before, after = (folder.flatten(model.params) for model in models)
    assert before.keys() == after.keys()
    names = {"decoder": "autoencoder.decoder."}
    moving = tuple(names.get(part, f"{part}.") for part in parts)
    for name, leaf in before.items():
        if not name.startswith(moving):
            np.testing.assert_array_equal(leaf, after[name], err_msg=name)
    for part in moving:
        kernels = [name for name in before if name.startswith(part) and name.endswith("kernel")]
        moved = [not np.array_equal(before[name], after[name]) for name in kernels]
        assert moved
        assert np.mean(moved) > 0.8
    logged = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert "absolute" in logged[0].split(",")
    assert len(logged) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": ()}, "--parts: name unet, vision or decoder, each once"),
        ({"parts": ("unet", "unet", "vision")}, "each once"),
        ({"parts": ("decoder",), "perceptual": PerceptualConfig()}, "set --perceptual.weight"),
        ({"parts": ("vision",), "init_from": None}, "leaves out unet: name a model that has it"),
        ({"parts": ("decoder",), "init_from": None}, "leaves out unet and vision"),
        (
            {"perceptual": dataclasses.replace(PERCEPTUAL, target="pictures", frames=4)},
            "--perceptual.frames 4: a clip has 3 frames",
        ),
    ],
)
def test_parts_that_cannot_learn_are_one_line(files, tmp_path, changes, message):
    with pytest.raises(errors.UserError, match=message):
        settings(files, tmp_path, **changes).objective()


def test_resting_parts_of_another_size_are_refused(files, tmp_path):
    network = dataclasses.replace(MODEL.unet, model_channels=64)
    wider = dataclasses.replace(MODEL, unet=network)
    chosen = settings(files, tmp_path, parts=("vision",), perceptual=PerceptualConfig())
    with pytest.raises(errors.UserError, match="model is a model of another size"):
        dataclasses.replace(chosen, model=wider).objective()
