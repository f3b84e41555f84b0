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
from v3d_jax.parallel import mesh as meshes
from v3d_jax.parallel.mesh import MeshConfig
from v3d_jax.state import OptimConfig
from v3d_jax.training import autoencoder, plan, video
from v3d_jax.training import parts as learned
from v3d_jax.training.cached import CachedLatentsConfig
from v3d_jax.training.objective import DataConfig
from v3d_jax.training.perceptual import PerceptualConfig
from v3d_jax.weights import folder, packaged
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
    ("parts", "target"),
    [
        (("decoder",), "pictures"),
        pytest.param(("unet", "decoder"), "decoded", marks=pytest.mark.slow),
    ],
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
        ({"train_only": ("unet.*",), "init_from": None}, "--train-only leaves weights out"),
        ({"train_only": ("unet.ears.*",), "perceptual": PerceptualConfig()}, "names no weight"),
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


def test_weights_that_learn_and_those_that_rest_make_the_whole(files, tmp_path):
    """Gradients, moments and averages are of what matches; all else is read from the model."""
    chosen = settings(
        files,
        tmp_path,
        parts=("unet",),
        train_only=("unet.*.temporal.*",),
        perceptual=PerceptualConfig(),
    )
    objective = chosen.objective()
    learning = objective.load(files / "model")
    names = set(folder.flatten(learning))
    assert names
    assert all(name.startswith("unet.") and ".temporal." in name for name in names)
    begun = jax.eval_shape(objective.init, jax.random.key(0))
    assert set(folder.flatten(begun)) == names
    whole = folder.flatten(video.whole(learning, objective.frozen))
    expected = folder.flatten(folder.load(files / "model").params)
    assert whole.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(whole[name], leaf, err_msg=name)
    # What a plan assumes of data and resting weights is what a run has.
    planned = plan.abstract_frozen(chosen), plan.inputs(chosen)
    batch = next(train.batches_ahead(objective, chosen.data.loader, meshes.make(chosen.mesh), 0))[0]
    for abstract, found in zip(planned, (objective.frozen, batch), strict=True):
        assert jax.tree.structure(abstract) == jax.tree.structure(found)
        shapes = [jax.tree.map(np.shape, tree) for tree in (abstract, found)]
        assert shapes[0] == shapes[1]
    types = [{name: leaf.dtype for name, leaf in tree.items()} for tree in (planned[1], batch)]
    assert types[0] == types[1]


def test_names_that_no_weight_has_and_trees_that_overlap():
    tree = {"unet": {"mid": {"kernel": 1, "bias": 2}, "out": 3}}
    assert learned.split(tree, ()) == (tree, {})
    chosen, left = learned.split(tree, ("*.kernel", "unet.out"))
    assert chosen == {"unet": {"mid": {"kernel": 1}, "out": 3}}
    assert left == {"unet": {"mid": {"bias": 2}}}
    assert learned.join(chosen, left) == tree
    with pytest.raises(
        errors.UserError, match=r"--train-only \*.scale names no weight; .*unet.mid"
    ):
        learned.split(tree, ("*.kernel", "*.scale"))
    with pytest.raises(ValueError, match="same weight"):
        learned.join(chosen, tree)


def test_packaged_models_are_begun_with_by_name():
    opened = packaged.load("mini")
    found = learned.load(Path("mini"), ("unet", "decoder"))
    whole = nnx.to_pure_dict(opened.params)
    jax.tree.map(np.testing.assert_array_equal, found["unet"], whole["unet"])
    assert found.keys() == {"unet", "decoder"}
    described, params = autoencoder.load(Path("mini"))
    assert described == opened.generator.autoencoder
    assert params.keys() == whole["autoencoder"].keys()
