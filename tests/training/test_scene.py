"""Training the scene model: its clips, where the gradient goes, starting, resuming, refusing."""

import csv
import dataclasses
import functools
import io
import os
import signal
from pathlib import Path

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import random_lpips
import synthetic_scenes
import tiny_generator
import tiny_scene
from flax import nnx
from PIL import Image

from v3d_jax import config, errors, pipeline, state, train
from v3d_jax.data import loader, paths
from v3d_jax.data.latents import CacheConfig
from v3d_jax.data.loader import LoaderConfig
from v3d_jax.data.posed import SourceConfig
from v3d_jax.diffusion.loss import LossConfig
from v3d_jax.diffusion.sampler import SamplingConfig
from v3d_jax.nn import generator
from v3d_jax.parallel import mesh as meshes
from v3d_jax.parallel import program, sharding
from v3d_jax.parallel.mesh import MeshConfig
from v3d_jax.state import OptimConfig
from v3d_jax.training import parts as learned
from v3d_jax.training import plan, record, scene, video
from v3d_jax.training.cached import CachedLatentsConfig
from v3d_jax.training.conditioning import ConditionConfig
from v3d_jax.training.objective import DataConfig
from v3d_jax.training.perceptual import PerceptualConfig
from v3d_jax.training.scene import SceneConfig
from v3d_jax.weights import folder

# One level, as in test_parts: what is trained takes long to compile.
OBJECT = dataclasses.replace(
    tiny_generator.CONFIG,
    autoencoder=dataclasses.replace(tiny_generator.CONFIG.autoencoder, channel_mult=(1,)),
)
MODEL = generator.scene(OBJECT, tiny_scene.CONFIG.pixelnerf)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A data set, an object model and a scene model."""
    path = tmp_path_factory.mktemp("scenes")
    synthetic_scenes.build(path / "data")
    for name, model in (("object", OBJECT), ("scene", MODEL)):
        params = nnx.to_pure_dict(tiny_generator.params(model))
        folder.save(path / name, model, SamplingConfig(steps=1), params)
    return path


@pytest.fixture(autouse=True)
def fast_compile(monkeypatch):
    monkeypatch.setattr(jax, "jit", fixtures.jit)


def settings(
    files, run, init_from="object", *, previews=1, steps=3, **changes
) -> config.SceneTrainConfig:
    defaults = {
        "model": MODEL,
        "scene": SceneConfig(SourceConfig(1, 3)),
        "parts": ("unet", "pixelnerf"),
        "mesh": MeshConfig(devices=1),
    }
    return config.SceneTrainConfig(
        latents=CachedLatentsConfig(
            str(files / "object"), folder=str(files), cache=CacheConfig(image_size=16)
        ),
        data=DataConfig(
            (str(files / "data"),), previews=previews, loader=LoaderConfig(2, 3, threads=1)
        ),
        sampling=SamplingConfig(steps=2, guidance_max=2.0, guidance_min=1.0),
        optim=OptimConfig(lr=1e-2, warmup=1),
        run=config.RunConfig(
            str(run),
            steps=steps,
            init_from=init_from and str(files / init_from),
            log_every=1,
            sample_every=steps,
        ),
        dtype="float32",
        **{**defaults, **changes},
    )


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def signal_at(monkeypatch, step: int) -> None:
    """Sends this process a SIGTERM while a step is under way."""
    add = record.Record.add

    def signalled(self, now, metrics, orbits):
        add(self, now, metrics, orbits)
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(record.Record, "add", signalled)


@pytest.mark.slow
def test_a_run_begins_with_an_object_model_and_learns(files, tmp_path):
    train.train(settings(files, tmp_path / "run", previews=0, steps=2))
    logged = rows(tmp_path / "run" / "log.csv")
    assert len(logged) == 2
    assert all(0.0 < float(row["rgb"]) < 1.0 for row in logged)
    made, begun = folder.load(tmp_path / "run" / "model"), folder.load(files / "object")
    assert made.generator == MODEL
    after, before = folder.flatten(made.params), folder.flatten(begun.params)
    for name, leaf in before.items():
        if not name.startswith("unet."):
            np.testing.assert_array_equal(after[name], leaf, err_msg=name)
    kernel = np.asarray(after["unet.conv_in.kernel"])
    assert kernel.shape[2] == 14
    assert np.abs(kernel[:, :, 8:]).max() > 0.0
    fresh = folder.flatten(learned.load(files / "object", ("pixelnerf",), MODEL))
    kernels = [name for name in fresh if name.endswith("kernel")]
    moved = [not np.array_equal(after[name], fresh[name]) for name in kernels]
    assert len(moved) > 8
    assert np.mean(moved) > 0.9


@pytest.mark.slow
def test_a_run_that_was_cut_equals_an_unbroken_one_to_the_bit(files, tmp_path, monkeypatch):
    unbroken = train.train(settings(files, tmp_path / "unbroken"))
    signal_at(monkeypatch, 1)
    cut = settings(files, tmp_path / "cut")
    assert int(train.train(cut).step) == 1
    resumed = train.train(cut)
    assert int(resumed.step) == 3
    assert jax.tree.structure(resumed) == jax.tree.structure(unbroken)
    jax.tree.map(np.testing.assert_array_equal, resumed, unbroken)
    assert {"psnr_heldout", "loss_train"} <= set(rows(tmp_path / "cut" / "previews.csv")[0])
    images = [tmp_path / name / "samples" / "0000003.png" for name in ("unbroken", "cut")]
    assert images[0].read_bytes() == images[1].read_bytes()
    with Image.open(images[0]) as grid:
        assert grid.size == (3 * 16, 4 * 16)


def test_a_few_steps_from_an_object_model_reach_the_pixelnerf(files, tmp_path):
    """By the denoising loss alone: first the UNet learns to listen, then what it is told."""
    chosen = settings(files, tmp_path, scene=SceneConfig(SourceConfig(2, 3), rgb_weight=0.0))
    objective = chosen.objective()
    drawn = objective.clips.draw(0, np.arange(3), np.random.default_rng(0))
    batch = jax.tree.map(lambda x: jnp.asarray(x)[None], drawn)
    assert batch["valid"].sum() >= 2
    optimizer = state.optimizer(dataclasses.replace(chosen.optim, weight_decay=0.0))
    step = fixtures.jit(functools.partial(state.train_step, objective.loss, optimizer, 0.9))
    begun = state.create(objective.load(files / "object"), optimizer)
    states, rate = [begun], jnp.asarray(1e-2)
    for _ in range(3):
        after, metrics = step(states[-1], objective.frozen, batch, jax.random.key(3), rate)
        assert 0.0 < float(metrics["rgb"]) < 1.0
        states.append(after)
    names = folder.flatten(begun.params)
    kernels = [n for n in names if n.startswith("pixelnerf.") and n.endswith("kernel")]
    kernels = [name for name in kernels if ".blend." not in name]  # of decoded frames alone
    assert len(kernels) > 8

    def moved(before: int, after: int) -> set[str]:
        one, other = (folder.flatten(states[i].params) for i in (before, after))
        return {name for name in names if not np.array_equal(one[name], other[name])}

    assert not moved(0, 1) & set(kernels)
    assert set(kernels) <= moved(1, 2)
    listening = np.asarray(states[1].params["unet"]["conv_in"]["kernel"])[:, :, 8:]
    assert np.all(np.abs(listening).max(axis=(0, 1, 3)) > 0.0)
    assert int(states[-1].step) == 3


def test_comparing_pictures_teaches_the_blend_and_how_near_things_are(files, tmp_path):
    objective = settings(files, tmp_path, init_from="scene").objective()
    drawn = objective.clips.draw(0, np.arange(3), np.random.default_rng(0))
    places = np.asarray([2], np.int32)
    drawn |= {"pictures": objective.clips.pictures(0, places), "places": places}
    batch = jax.tree.map(lambda x: jnp.asarray(x)[None], drawn)
    given = nnx.to_pure_dict(folder.load(files / "scene").params)
    of_scene = functools.partial(scene.condition, SceneConfig(SourceConfig(1, 3), rgb_weight=0.0))
    compared = PerceptualConfig(1.0, "pictures", 1, 1, ("vgg",), absolute=1.0)
    networks = (random_lpips.vgg(np.random.default_rng(0)),)

    def difference(params):
        """From the pictures, of which the denoising loss knows nothing."""
        model = pipeline.networks(pipeline.Settings(MODEL, SamplingConfig()), params)
        terms = (LossConfig(), ConditionConfig(), (networks, compared))
        key = jax.random.key(0)
        _, metrics = video.video_loss(model, batch, key, *terms, conditioner=of_scene)
        return metrics["absolute"]

    slope = fixtures.jit(jax.grad(difference))(given)
    for name, leaf in folder.flatten(slope["pixelnerf"]).items():
        assert np.isfinite(leaf).all(), name
        assert np.any(leaf) or not name.endswith("kernel"), name


def test_clips_are_parts_of_the_path_with_sources_among_them(files, tmp_path):
    clips = settings(files, tmp_path).objective().clips
    rng = np.random.default_rng(0)
    counts, steps = set(), set()
    for _ in range(40):
        order = clips.path(3, rng)
        steps.add(int(order[1] - order[0]))
        assert len(set(np.diff(order))) == 1
        drawn = clips.draw(1, order, rng)
        places, valid = drawn["source_places"], drawn["valid"]
        counts.add(int(valid.sum()))
        assert places[0] == 0
        assert len(set(places[valid])) == valid.sum()
        assert drawn["sources"].shape == (3, 16, 16, 3)
        scene_record = synthetic_scenes.scene(1, 16)
        whole = np.stack([np.asarray(Image.open(io.BytesIO(f))) for f in scene_record.frames])
        np.testing.assert_array_equal(drawn["sources"], whole[order[places]])
        np.testing.assert_array_equal(drawn["small"], whole[order])
        looked_at = paths.depth(drawn["world_to_camera"].astype(np.float64), 0)
        np.testing.assert_allclose(looked_at, 1.5, rtol=1e-5)
        turned = scene_record.world_to_camera[order][:, :3, :3]
        np.testing.assert_allclose(drawn["world_to_camera"][:, :3, :3], turned, atol=1e-6)
    assert counts == {1, 2, 3}
    assert steps == {-2, -1, 1, 2}
    only = clips.clip(1, np.arange(3))
    assert only["valid"].tolist() == [True, False, False]


def test_weights_of_a_network_that_learns_whole_and_of_one_that_learns_in_part(files, tmp_path):
    """As the mini scene model is trained; with what rests they make a whole scene model."""
    chosen = settings(files, tmp_path, train_only=("pixelnerf.*", "unet.conv_in.*"))
    objective = chosen.objective()
    learning = objective.load(files / "object")
    names = set(folder.flatten(learning))
    assert {"unet.conv_in.kernel", "unet.conv_in.bias"} == {n for n in names if n[:4] == "unet"}
    whole = folder.flatten(video.whole(learning, objective.frozen))
    expected = folder.flatten(folder.abstract_params(MODEL))
    assert {name: leaf.shape for name, leaf in whole.items()} == {
        name: leaf.shape for name, leaf in expected.items()
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": OBJECT}, "this model has no pixelnerf"),
        ({"scene": SceneConfig(SourceConfig(1, 4))}, "max-sources 4: a clip has 3 frames"),
        ({"parts": ("unet", "unet")}, "name unet, vision, pixelnerf or decoder, each once"),
        ({"parts": ("unet",), "init_from": None}, "leaves out vision and pixelnerf"),
    ],
)
def test_what_cannot_be_trained_is_one_line(files, tmp_path, changes, message):
    with pytest.raises(errors.UserError, match=message):
        settings(files, tmp_path, **changes).objective()


def test_a_batch_in_the_loss_is_what_its_cameras_see(files, tmp_path):
    """Colours painted far away, found in the source pictures by the targets' own rays."""
    clips = settings(files, tmp_path).objective().clips
    batch = clips.draw(2, np.arange(3), np.random.default_rng(5))
    batch = jax.tree.map(lambda x: jnp.asarray(x)[None], batch)
    views, targets = scene.posed_views(batch)
    places = np.asarray(batch["source_places"])[0]
    for field, whole in zip(views.cameras, targets, strict=True):
        np.testing.assert_array_equal(field[0], np.asarray(whole)[0, places])
    assert float(views.images.min()) >= -1.0
    assert float(views.images.max()) > 0.5
    assert targets.width[0, 0] == 16


@pytest.mark.slow
def test_loss_and_gradient_on_several_devices_equal_those_on_one(files, tmp_path):
    """Split by clip and weight, and by frame; statistics of the features are the whole batch's."""
    objective = settings(files, tmp_path, "scene").objective()
    params, rng = objective.load(files / "scene"), np.random.default_rng(0)
    drawn = [objective.clips.draw(index, np.arange(3), rng) for index in range(4)]
    batch = {name: np.stack([clip[name] for clip in drawn]) for name in drawn[0]}
    assert len(np.unique(batch["valid"].sum(axis=1))) > 1

    def gradient(**layout: int):
        mesh = meshes.make(MeshConfig(**layout))
        placements = sharding.weights(params, mesh, small=2**8)
        everywhere = sharding.replicated(mesh)

        def step(params, frozen, batch, key):
            value, _, grads = state.gradients(
                objective.loss, params, frozen, batch, key, placements=placements
            )
            return value, grads

        compiled = fixtures.jit(
            sharding.on_mesh(step, mesh),
            in_shardings=(placements, everywhere, sharding.batch(mesh), everywhere),
            out_shardings=(everywhere, placements),
        )
        value, grads = compiled(
            sharding.put(params, placements),
            objective.frozen,
            sharding.put_batch(batch, mesh),
            jax.random.key(0),
        )
        return float(value), jax.tree.map(np.asarray, grads)

    value, grads = gradient(devices=1)
    norm = float(optax.tree.norm(grads))
    assert float(optax.tree.norm(grads["pixelnerf"])) > 1e-3 * norm
    for layout in ({"devices": 4, "fsdp": 2}, {"devices": 6, "frames": 3}):
        sharded, others = gradient(**layout)
        assert sharded == pytest.approx(value, rel=1e-5)
        difference = jax.tree.map(np.subtract, others, grads)
        assert float(optax.tree.norm(difference)) < 3e-5 * norm


def test_a_plan_expects_the_batches_that_come(files, tmp_path):
    given = settings(files, tmp_path / "run")
    batch = next(loader.batches(given.objective().clips, given.data.loader))
    expected = plan.inputs(given)
    found = {name: (value.shape, value.dtype) for name, value in batch.items()}
    assert found == {name: (leaf.shape, leaf.dtype) for name, leaf in expected.items()}


def test_a_plan_counts_the_scene_model(files, tmp_path):
    """Its PixelNeRF learns as well, and its work is in the step's."""
    given = settings(files, tmp_path / "run")
    mesh = meshes.make(given.mesh, jax.devices()[:1])
    traced, memory = plan.trace(given, mesh, "cpu")
    fields = {f.name: getattr(given, f.name) for f in dataclasses.fields(config.VideoTrainConfig)}
    objects = config.VideoTrainConfig(**{**fields, "model": OBJECT, "parts": ("unet",)})
    other, less = plan.trace(objects, mesh, "cpu")
    assert program.flops(traced.jaxpr) > 1.01 * program.flops(other.jaxpr)
    encoder = jax.eval_shape(
        lambda key: learned.random(MODEL, "float32", key, ("pixelnerf",)), jax.random.key(0)
    )
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(encoder))
    added = 4 * 3 * 3 * 6 * OBJECT.unet.model_channels  # a kernel's inputs for the features
    assert memory.parameters - less.parameters == size + added
    assert memory.batch > less.batch
