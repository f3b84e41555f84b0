"""The training loop on a small data set: resuming, stopping, diverging, and the two experiments."""

import contextlib
import csv
import dataclasses
import json
import os
import runpy
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic_orbits
from flax import nnx
from PIL import Image

from v3d_jax import checkpoint, config, console, errors, pipeline, state, train
from v3d_jax.data import loader, orbits
from v3d_jax.nn import autoencoder as networks
from v3d_jax.parallel import mesh as meshes
from v3d_jax.state import OptimConfig
from v3d_jax.training import autoencoder, objective, record
from v3d_jax.weights import folder

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return synthetic_orbits.build(tmp_path_factory.mktemp("orbits") / "data")


@dataclasses.dataclass(frozen=True)
class ColourTrainConfig(config.AutoencoderTrainConfig):
    """A colour matrix that turns noisy frames into clean ones: everything a model has, in 12."""

    noise: float = 0.1

    def objective(self) -> objective.Objective:
        clips = loader.FrameClips(orbits.source(self.data.path[0]))
        batch, _ = objective.preview_batch(self.data, clips, None)

        def predict(params, frames):
            return frames @ params["kernel"] + params["bias"].reshape(1, 1, 1, 1, 3)

        def loss(params, frozen, batch, key):
            frames = batch["frames"].astype(jnp.float32) / 255.0
            noisy = frames + self.noise * jax.random.normal(key, frames.shape)
            error = predict(params, noisy) - frozen["gain"] * frames
            return jnp.mean(jnp.square(error)), {"bias": params["bias"][0]}

        def preview(params, frozen, batch, key):
            frames = batch["frames"].astype(jnp.float32) / 255.0
            images = predict(params, frames)
            return images, {"mse": jnp.mean(jnp.square(images - frames), axis=(1, 2, 3, 4))}

        def init(key):
            return {"kernel": jax.random.normal(key, (3, 3)), "bias": jnp.zeros(3)}

        def export(path, params, metadata, dtype):
            path.mkdir(exist_ok=True)
            np.savez(path / "colour.npz", **params)

        def load(path):
            with np.load(path / "colour.npz") as file:
                return dict(file)

        return objective.Objective(
            init=init,
            load=load,
            loss=loss,
            frozen={"gain": np.float32(1.0)},
            clips=clips,
            preview=preview,
            preview_batch=batch,
            heldout=0,
            export=export,
        )


def settings(data: Path, run: Path, *, optim=None, devices: int = 1, noise: float = 0.1, **changes):
    debug = runpy.run_path(str(CONFIGS / "debug_vae.py"))["config"]
    fields = {field.name: getattr(debug, field.name) for field in dataclasses.fields(debug)}
    begun = ColourTrainConfig(**fields, noise=noise)
    defaults = {"steps": 8, "log_every": 2, "sample_every": 8, "save_every": 100, "dir": str(run)}
    return dataclasses.replace(
        begun,
        data=dataclasses.replace(begun.data, path=(str(data),)),
        optim=optim or OptimConfig(lr=0.1, warmup=2),
        run=dataclasses.replace(begun.run, **{**defaults, **changes}),
        mesh=dataclasses.replace(begun.mesh, devices=devices),
    )


def host(tree):
    return jax.tree.map(np.array, tree)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, host(a), host(b))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def signal_at(monkeypatch, steps: set[int]):
    """Sends this process a SIGTERM while the given steps are under way."""
    add = record.Record.add

    def signalled(self, step, metrics, orbits):
        add(self, step, metrics, orbits)
        if step in steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(record.Record, "add", signalled)


@pytest.mark.parametrize("params", ["float32", "bfloat16"])
def test_a_run_cut_in_three_equals_an_unbroken_one_to_the_bit(data, tmp_path, monkeypatch, params):
    optim = OptimConfig(lr=0.1, warmup=2, params=params)
    unbroken = train.train(settings(data, tmp_path / "unbroken", optim=optim))
    assert unbroken.params["kernel"].dtype == params
    signal_at(monkeypatch, {3, 4})
    cut = settings(data, tmp_path / "cut", optim=optim)
    assert [int(train.train(cut).step) for _ in range(2)] == [3, 4]
    resumed = train.train(cut)
    assert int(resumed.step) == 8
    assert_equal(resumed, unbroken)

    wanted, found = (rows(tmp_path / name / "log.csv") for name in ("unbroken", "cut"))
    assert [row["step"] for row in wanted] == ["2", "4", "6", "8"]
    assert [row["step"] for row in found] == ["2", "3", "4", "6", "8"]
    for row in wanted[2:]:
        again = next(other for other in found if other["step"] == row["step"])
        assert {**again, "clips_per_s": 0} == {**row, "clips_per_s": 0}
    images = [tmp_path / name / "samples" / "0000008.png" for name in ("unbroken", "cut")]
    assert images[0].read_bytes() == images[1].read_bytes()
    with Image.open(images[0]) as grid:
        assert grid.size == (3 * 16, 16)
    models = [np.load(tmp_path / name / "model" / "colour.npz") for name in ("unbroken", "cut")]
    np.testing.assert_array_equal(models[0]["kernel"], np.asarray(unbroken.ema["kernel"]))
    np.testing.assert_array_equal(models[0]["kernel"], models[1]["kernel"])


def test_training_lowers_the_loss_and_follows_the_data(data, tmp_path):
    train.train(settings(data, tmp_path / "run", steps=60))
    losses = [float(row["loss"]) for row in rows(tmp_path / "run" / "log.csv")]
    assert losses[-1] < 0.1 * losses[0]


def test_the_time_limit_saves_and_ends_before_the_first_step(data, tmp_path):
    run = tmp_path / "run"
    assert int(train.train(settings(data, run, time_limit=0.0)).step) == 0
    assert (run / "checkpoints" / "0").is_dir()
    assert not (run / "model").exists()
    assert int(train.train(settings(data, run)).step) == 8


def test_a_trace_is_written_where_it_is_asked_for(data, tmp_path):
    run = tmp_path / "run"
    train.train(settings(data, run, steps=13, profile_steps=2))
    (trace,) = (run / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
    train.train(settings(data, tmp_path / "none", steps=2))
    assert not (tmp_path / "none" / "profile").exists()


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "log.csv"
    table = record.Table(path, 0)
    for step in (2, 4, 6):
        table.append({"step": step, "loss": 0.5})
    table = record.Table(path, 4)
    table.append({"step": 5, "loss": 0.25, "lpips": 1.0})
    assert rows(path) == [
        {"step": "2", "loss": "0.5", "lpips": ""},
        {"step": "4", "loss": "0.5", "lpips": ""},
        {"step": "5", "loss": "0.25", "lpips": "1"},
    ]


def test_divergence_names_step_and_orbits_and_saves_nothing(data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    drawn = {}
    add = record.Record.add

    def poisoned(self, step, metrics, orbits):
        drawn[step] = orbits
        if step == 6:
            metrics = {**metrics, "grad_norm": jnp.asarray(jnp.nan)}
        add(self, step, metrics, orbits)

    monkeypatch.setattr(record.Record, "add", poisoned)
    with pytest.raises(errors.UserError, match="grad_norm is nan at step 6") as caught:
        train.train(settings(data, run, save_every=2, log_every=7))
    for index in drawn[6]:
        assert f"{index} disc-{index}" in str(caught.value)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "4"]


def test_a_learning_rate_that_explodes_is_noticed(data, tmp_path):
    optim = OptimConfig(lr=1e30, warmup=0, decay="constant")
    with pytest.raises(errors.UserError, match=r"is (inf|nan) at step [23],"):
        train.train(settings(data, tmp_path / "run", optim=optim))


def test_other_settings_do_not_continue_a_run_unless_asked(data, tmp_path):
    run = tmp_path / "run"
    train.train(settings(data, run, time_limit=0.0))
    optim = OptimConfig(lr=0.2, warmup=2)
    with pytest.raises(errors.UserError, match=r"optim\.lr was 0\.1, now 0\.2"):
        train.train(settings(data, run, optim=optim))
    # How it runs and what it writes may change.
    changed = settings(data, run, log_every=1, time_limit=0.0)
    assert int(train.train(changed).step) == 0
    changed = settings(data, run, optim=optim, accept_changes=True, steps=2)
    assert int(train.train(changed).step) == 2


def test_a_folder_of_something_else_is_left_alone(data, tmp_path):
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(errors.UserError, match="is not a run"):
        train.train(settings(data, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_starts_from_a_model(data, tmp_path):
    given = {"kernel": np.eye(3, dtype=np.float32), "bias": np.full(3, 0.25, np.float32)}
    np.savez(tmp_path / "colour.npz", **given)
    begun = train.train(settings(data, tmp_path / "run", time_limit=0.0, init_from=str(tmp_path)))
    assert_equal(begun.params, given)
    assert_equal(begun.ema, given)
    # What it can do is seen before it learns; a run from nothing has nothing to show.
    assert [int(row["step"]) for row in rows(tmp_path / "run" / "previews.csv")] == [0]
    half = settings(
        data,
        tmp_path / "half",
        optim=OptimConfig(params="bfloat16"),
        time_limit=0.0,
        init_from=str(tmp_path),
    )
    begun = train.train(half)
    assert begun.params["kernel"].dtype == jnp.bfloat16
    assert_equal(begun.ema, given)
    np.savez(tmp_path / "colour.npz", kernel=np.eye(4, dtype=np.float32), bias=given["bias"])
    with pytest.raises(errors.UserError, match="another size"):
        train.train(settings(data, tmp_path / "other", init_from=str(tmp_path)))


def test_a_batch_must_divide_by_the_devices(data, tmp_path):
    with pytest.raises(errors.UserError, match="8 clips cannot be split over 3 devices"):
        train.train(settings(data, tmp_path / "run", devices=3))


def test_on_eight_devices_the_loop_does_what_it_does_on_one(data, tmp_path):
    one = train.train(settings(data, tmp_path / "one"))
    eight = train.train(settings(data, tmp_path / "eight", devices=8))
    for name, leaf in one.params.items():
        np.testing.assert_allclose(np.asarray(eight.params[name]), leaf, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a config file first"),
        (["--optim.lr", "1"], "name a config file first"),
        (["configs/nowhere.py"], "configs/nowhere.py is no file"),
        ([__file__.replace("test_train", "conftest")], "must assign `config`"),
    ],
)
def test_a_config_file_is_needed(arguments, message):
    with pytest.raises(errors.UserError, match=message):
        config.load(arguments)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.py")))
def test_config_files_take_overrides(name):
    path = str(CONFIGS / f"{name}.py")
    loaded = config.load([path, "--optim.lr", "0.125", "--run.time-limit", "450"])
    assert loaded.optim.lr == 0.125
    assert loaded.run.time_limit == 450
    assert loaded.data == config.load([path]).data
    assert json.loads(json.dumps(config.describe(loaded)))["optim"]["lr"] == 0.125


def test_a_misspelt_override_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        config.load([str(CONFIGS / "debug.py"), "--optim.lrr", "1"])
    assert caught.value.code == 2
    assert "--optim.lr" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "kept"), [([], 1), ([train.PLAN, "v5e-8"], 0)])
def test_a_run_keeps_its_programs_for_the_next(monkeypatch, more, kept):
    calls = []
    monkeypatch.setattr(console, "enable_cache", lambda: calls.append("cache"))
    monkeypatch.setattr(train, "train", lambda settings: calls.append("train"))
    monkeypatch.setattr(train.plan, "make", lambda *_: calls.append("plan"))
    monkeypatch.setattr(train.plan, "report", lambda planned: sys.exit(0))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["train", str(CONFIGS / "mini.py"), *more])
    with contextlib.suppress(SystemExit):
        train.main()
    assert calls == (["cache", "train"] if kept else ["plan"])


def test_missing_data_is_one_line(tmp_path, monkeypatch, capsys):
    arguments = [str(CONFIGS / "debug_vae.py"), "--data.path", str(tmp_path / "none")]
    arguments += ["--run.dir", str(tmp_path / "run"), "--mesh.devices", "1"]
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit) as caught:
        train.cli()
    assert caught.value.code == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    assert "none" in message


def test_a_damaged_record_ends_training_in_one_line(tmp_path):
    """Found by a thread that reads ahead; what was saved before stays."""
    path = synthetic_orbits.build(tmp_path / "data")
    shard = next(path.rglob("*train*array_record-00000"))
    data = bytearray(shard.read_bytes())
    data[8000:8064] = bytes(64)  # in one of the records behind those that are previewed
    shard.write_bytes(data)
    with pytest.raises(errors.UserError, match=r"record \d+ of 'train' in .* is damaged"):
        train.train(settings(path, tmp_path / "run", steps=20))


def test_data_sets_are_joined_and_must_agree(data, tmp_path):
    other = synthetic_orbits.build(tmp_path / "other", train=3, heldout=0)
    config = objective.DataConfig(path=(str(data), str(other)))
    assert [len(source) for source in objective.train_sources(config)] == [10, 3]
    larger = synthetic_orbits.build(tmp_path / "larger", train=1, heldout=0, size=24)
    config = objective.DataConfig(path=(str(data), str(larger)))
    with pytest.raises(errors.UserError, match=r"larger has 6 views of 24 pixels, .* 6 of 16: "):
        objective.train_sources(config)
    with pytest.raises(errors.UserError, match="no data set is named"):
        objective.train_sources(objective.DataConfig(path=()))


def debug(name: str, data: Path, run: Path, *overrides: str):
    arguments = [str(CONFIGS / f"{name}.py"), "--data.path", str(data), "--run.dir", str(run)]
    return config.load([*arguments, "--mesh.devices", "1", *overrides])


@pytest.mark.slow
def test_the_autoencoder_resumes_to_the_bit(data, tmp_path, monkeypatch):
    short = ("--run.steps", "3", "--data.previews", "0")
    unbroken = train.train(debug("debug_vae", data, tmp_path / "unbroken", *short))
    signal_at(monkeypatch, {1})
    cut = debug("debug_vae", data, tmp_path / "cut", *short)
    assert int(train.train(cut).step) == 1
    assert_equal(train.train(cut), unbroken)

    described, params = autoencoder.load(tmp_path / "cut" / "model")
    assert_equal(params, host(unbroken.ema))
    # The scale factor makes the data's latents of unit deviation.
    clips = loader.FrameClips(orbits.source(data))
    blank = nnx.eval_shape(lambda: networks.Autoencoder(described, rngs=nnx.Rngs(0)))
    model = nnx.merge(nnx.split(blank)[0], params)
    frames = np.concatenate([clips.clip(i, np.array([0, 2, 4]))["frames"] for i in range(10)])
    latents = model.encode(jnp.asarray(frames, jnp.float32) / 127.5 - 1.0).mean
    assert float(jnp.std(latents * described.scale_factor)) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("params", ["float32", "bfloat16"])
def test_from_pictures_to_a_model_that_samples(data, tmp_path, params):
    train.train(debug("debug_vae", data, tmp_path / "vae"))
    overrides = ("--latents.autoencoder", str(tmp_path / "vae" / "model"))
    overrides += ("--latents.folder", str(tmp_path), "--optim.params", params)
    more = synthetic_orbits.build(tmp_path / "more", train=2, heldout=0)
    overrides += ("--data.path", str(data), str(more))
    settings = debug("debug", data, tmp_path / "video", *overrides)
    trained = train.train(settings)
    # Ten orbits, two more and two held out were encoded once.
    assert len(list(tmp_path.glob("latents-*"))) == 3
    previews = rows(tmp_path / "video" / "previews.csv")
    assert set(previews[0]) == {
        "step",
        *(f"{what}_{split}" for what in ("loss", "psnr") for split in ("train", "heldout")),
    }
    with Image.open(tmp_path / "video" / "samples" / "0000006.png") as grid:
        assert grid.size == (3 * 16, 4 * 16)  # two clips, each above its sample

    model = folder.load(tmp_path / "video" / "model")
    whole = folder.flatten(model.params)
    for name, leaf in folder.flatten(trained.ema).items():
        np.testing.assert_array_equal(np.asarray(whole[name]), np.asarray(leaf))
    assert model.generator.autoencoder.scale_factor != 0.18215
    image = jnp.full((16, 16, 3), 0.5)
    generate = jax.jit(pipeline.image_to_orbit, static_argnums=0)
    sampling = pipeline.Settings(model.generator, model.sampling)
    orbit = generate(sampling, model.params, image, jax.random.key(0))
    assert orbit.shape == (3, 16, 16, 3)
    assert bool(jnp.all(jnp.isfinite(orbit)))
    # Everything that was trained has moved, the image tower included.
    begun = folder.flatten(
        train.begin(
            dataclasses.replace(settings, run=dataclasses.replace(settings.run, dir="none")),
            settings.objective(),
            state.optimizer(settings.optim),
            checkpoint.Checkpoints(tmp_path / "empty"),
            meshes.make(settings.mesh),
        ).state.params
    )
    moved = folder.flatten(trained.params)
    still = [name for name, leaf in begun.items() if np.array_equal(leaf, moved[name])]
    assert not any(name.startswith("vision") and name.endswith("kernel") for name in still)
