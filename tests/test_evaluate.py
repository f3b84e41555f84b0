"""Evaluation end to end on a tiny random generator and orbits in memory."""

import csv
import json

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax import errors, evaluate, pipeline
from v3d_jax.data import heldout, orbits, png
from v3d_jax.diffusion import sampler
from v3d_jax.evaluation import measure, objects
from v3d_jax.nn import autoencoder, clip, conditioner, generator, lpips, unet
from v3d_jax.ops import metrics
from v3d_jax.weights import folder
from v3d_jax.weights import lpips as lpips_weights

SIZE, VIEWS, COUNT = 32, 6, 3
TINY = generator.GeneratorConfig(
    unet=unet.UNetConfig(
        model_channels=32,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        head_channels=32,
        context_dim=8,
        vector_dim=4,
    ),
    autoencoder=autoencoder.AutoencoderConfig(channels=32, channel_mult=(1, 1), num_res_blocks=1),
    vision=clip.VisionConfig(
        image_size=8, patch=4, width=8, layers=1, heads=1, mlp=8, output_dim=8, preprocess="plain"
    ),
    conditioner=conditioner.ConditionerConfig(scalars=("azimuth",), dim=4),
    num_frames=COUNT,
    image_size=SIZE,
)
CONFIG = pipeline.Settings(TINY, sampler.SamplingConfig(steps=2, sigma_max=80.0))


class Memory(list):
    """Records in memory."""

    views, size = VIEWS, SIZE


def frames(seed):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (VIEWS, 4, 4, 3), np.uint8)
    return coarse.repeat(SIZE // 4, axis=1).repeat(SIZE // 4, axis=2)


def record(name, pictures):
    cameras = np.zeros((VIEWS, 4, 4), np.float32), np.zeros((VIEWS, 3, 3), np.float32)
    azimuths = np.zeros(VIEWS, np.float32)
    return orbits.Orbit(name, 0, [png.encode(p) for p in pictures], *cameras, azimuths, 0.0)


HELDOUT = Memory(record(f"new/{i}", frames(i)) for i in range(3))
# The second held-out object is in the training set under another name, started at another view.
TRAIN = Memory([*(record(f"old {i}", frames(50 + i)) for i in range(3))])
TRAIN.append(record("twin", np.roll(frames(1), 4, axis=0)))


@pytest.fixture(scope="module")
def params():
    """Random weights everywhere, the layers that start at zero included."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        fan_in = max(1, int(np.prod(leaf.shape[:-1])))
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) / np.sqrt(fan_in))

    return jax.tree.map(draw, folder.abstract_params(TINY))


@pytest.fixture
def model(tmp_path, params):
    path = tmp_path / "tiny"
    folder.save(path, TINY, CONFIG.sampling, params, metadata={"data": "noise"})
    return path


@pytest.fixture
def data(monkeypatch):
    splits = {"heldout": HELDOUT, "train": TRAIN}
    monkeypatch.setattr(orbits, "source", lambda path, split: splits[split])


@pytest.fixture
def no_lpips(monkeypatch):
    def load(net):
        raise lpips_weights.LPIPSUnavailable("LPIPS needs weights: install them")

    monkeypatch.setattr(lpips_weights, "load", load)


def random_lpips():
    rng = np.random.default_rng(0)
    widths = (3, 8, 8, 8, 8, 8)
    sides = (11, 5, 3, 3, 3)
    convs = tuple(
        lpips.Conv(
            jnp.asarray(0.1 * rng.standard_normal((side, side, i, o), np.float32)), jnp.zeros(o)
        )
        for side, i, o in zip(sides, widths, widths[1:], strict=False)
    )
    return lpips.LPIPSParams(convs, tuple(jnp.ones(o) for o in widths[1:]))


def made(params, seed=0):
    chosen = heldout.select(HELDOUT, SIZE)
    return list(objects.predict(CONFIG, params, None, chosen, TRAIN, batch=2, seed=seed))


def test_batched_generation_is_the_pipeline_object_by_object(params):
    inputs = jnp.stack([jnp.asarray(frames(i)[0], jnp.float32) / 255 for i in range(2)])
    keys = jax.random.split(jax.random.key(5), 2)
    batched = fixtures.jit(objects.generate, static_argnums=0)(CONFIG, params, inputs, keys)
    alone = fixtures.jit(pipeline.image_to_orbit, static_argnums=0)
    assert batched.shape == (2, COUNT, SIZE, SIZE, 3)
    for i in range(2):
        expected = alone(CONFIG, params, inputs[i], keys[i])
        np.testing.assert_allclose(batched[i], expected, atol=2e-4)
    assert np.abs(batched[0] - batched[1]).mean() > 1e-3


def test_score_leaves_the_first_frame_out_and_averages_the_rest():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (2, COUNT, SIZE, SIZE, 3), np.uint8) for _ in range(2))
    perceptual = random_lpips()
    score = fixtures.jit(objects.score)
    got = score(perceptual, jnp.asarray(a), jnp.asarray(b))
    x, y = (jnp.asarray(v[:, 1:], jnp.float32) / 255 for v in (a, b))
    np.testing.assert_allclose(got["psnr"], metrics.psnr(x, y).mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(got["ssim"], metrics.ssim(x, y).mean(axis=1), atol=1e-5)
    first = lpips.distance(perceptual, 2 * x[0] - 1, 2 * y[0] - 1).mean()
    np.testing.assert_allclose(got["lpips"][0], first, rtol=1e-4)
    a[:, 0] = 0
    changed = score(perceptual, jnp.asarray(a), jnp.asarray(b))
    jax.tree.map(np.testing.assert_array_equal, got, changed)


def test_exact_predictions_score_the_cap():
    same = jnp.asarray(frames(0)[None, :COUNT])
    got = fixtures.jit(objects.score)(None, same, same)
    assert got["psnr"] == measure.MAX_PSNR
    assert set(got) == {"psnr", "ssim"}
    np.testing.assert_allclose(got["ssim"], 1.0, atol=1e-5)


def test_predictors_see_what_they_should(params):
    predictions = made(params)
    assert len(predictions) == 3
    for i, prediction in enumerate(predictions):
        np.testing.assert_array_equal(prediction.truth, frames(i)[::2])
        repeated = prediction.frames[objects.REPEATED]
        np.testing.assert_array_equal(repeated, np.repeat(frames(i)[:1], COUNT, axis=0))
        assert tuple(prediction.frames) == tuple(prediction.scores) == objects.ROWS
    np.testing.assert_array_equal(predictions[1].frames[objects.NEAREST], predictions[1].truth)
    assert predictions[1].scores[objects.NEAREST]["psnr"] == pytest.approx(measure.MAX_PSNR)
    assert predictions[0].scores[objects.NEAREST]["psnr"] < 20

    true = jnp.asarray(predictions[2].truth, jnp.float32) / 255
    network = pipeline.networks(CONFIG, params).autoencoder
    rebuilt = network.decode(network.encode(2 * true - 1).mean[None])[0]
    ceiling = np.clip((rebuilt + 1) / 2, 0, 1) * 255
    np.testing.assert_allclose(predictions[2].frames[objects.CEILING], ceiling, atol=1.0)


def test_an_orbit_depends_on_the_seed_and_the_place_alone(params):
    first, other = made(params), made(params, seed=1)
    alone = fixtures.jit(pipeline.image_to_orbit, static_argnums=0)
    for i in range(3):
        assert (first[i].frames[objects.MODEL] != other[i].frames[objects.MODEL]).any()
        assert first[i].scores[objects.NEAREST] == other[i].scores[objects.NEAREST]
        key = jax.random.fold_in(jax.random.key(0), i)
        expected = alone(CONFIG, params, jnp.asarray(frames(i)[0], jnp.float32) / 255, key)
        np.testing.assert_allclose(first[i].frames[objects.MODEL], 255 * expected, atol=0.6)


def test_command_prints_a_table_and_writes_files(model, data, no_lpips, tmp_path, capsys):
    out = tmp_path / "out"
    evaluate.main(["--model", str(model), "--limit", "2", "--out", str(out), "--batch", "2"])
    printed = capsys.readouterr()
    assert printed.err.splitlines() == ["no LPIPS column: LPIPS needs weights: install them"]
    lines = printed.out.splitlines()
    assert "2 objects, 2 unseen views each" in lines[0]
    assert lines[1].split() == ["PSNR", "dB", "SSIM"]
    assert [line[: len(name)] for line, name in zip(lines[2:6], objects.ROWS, strict=True)] == [
        *objects.ROWS
    ]
    assert lines[6].startswith("PSNR is -")

    content = json.loads((out / "scores.json").read_text())
    assert content["sampling"]["steps"] == 2
    assert content["model_metadata"] == {"data": "noise"}
    assert content["lpips"] is None
    with (out / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    mean = np.mean([float(row["psnr"]) for row in rows if row["predictor"] == "model"])
    assert mean == pytest.approx(content["means"]["model"]["psnr"])
    assert f"{mean:.2f}" == lines[2].split()[-2]
    assert sorted(path.name for path in (out / "sheets").iterdir()) == [
        "000_new-0.png",
        "001_new-1.png",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny"]


def test_lpips_column_and_ratio(model, data, monkeypatch, capsys):
    nets = []

    def load(net):
        nets.append(net)
        return random_lpips()

    monkeypatch.setattr(lpips_weights, "load", load)
    evaluate.main(["--model", str(model), "--limit", "1", "--batch", "2", "--lpips", "vgg"])
    lines = capsys.readouterr().out.splitlines()
    assert nets == ["vgg"]
    assert lines[1].split() == ["PSNR", "dB", "SSIM", "LPIPS"]
    ratio = float(lines[2].split()[-1]) / min(float(line.split()[-1]) for line in lines[3:5])
    assert float(lines[6].split()[2]) == pytest.approx(ratio, rel=0.01)


def test_arguments_change_the_models_sampling(params):
    model = folder.Model(TINY, CONFIG.sampling, params, {})
    args = evaluate.EvaluateArgs(steps=9, guidance=(1.0, 2.0))
    changed = evaluate.configure(args, model).sampling
    assert (changed.steps, changed.guidance_min, changed.guidance_max) == (9, 1.0, 2.0)
    assert changed.sigma_max == 80.0
    assert evaluate.configure(evaluate.EvaluateArgs(), model).sampling == CONFIG.sampling


@pytest.mark.parametrize(
    ("protocol", "model"),
    [("orbits", "mini"), ("points", "mini"), ("scenes", "scene_mini"), ("rotation", "scene_mini")],
)
def test_the_packaged_model_of_the_protocol_is_scored_unless_another_is_named(
    protocol, model, monkeypatch
):
    asked = []

    def load(name):
        asked.append(name)
        raise errors.UserError("enough")

    monkeypatch.setattr(evaluate.packaged, "load", load)
    monkeypatch.setattr(evaluate.sparse, "check", lambda: None)
    with pytest.raises(errors.UserError, match="enough"):
        evaluate.main(["--protocol", protocol])
    assert asked == [model]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--model", "no such model"], "unknown model"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--out", "."], "exists already"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, part, data):
    with pytest.raises(errors.UserError, match=part) as caught:
        evaluate.main(arguments)
    assert "\n" not in str(caught.value)


def test_missing_data_names_the_command_that_makes_it(model, tmp_path):
    with pytest.raises(errors.UserError, match=r"python -m v3d_jax\.render"):
        evaluate.main(["--model", str(model), "--data-dir", str(tmp_path / "nowhere")])
