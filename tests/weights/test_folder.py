"""Model folders: round trips, size, and what a damaged or foreign folder is told."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import numpy as safetensors_numpy

from v3d_jax import errors
from v3d_jax.diffusion import sampler
from v3d_jax.nn import autoencoder, clip, conditioner, generator, unet
from v3d_jax.weights import folder, packaged, settings

TINY = generator.GeneratorConfig(
    unet=unet.UNetConfig(
        model_channels=32,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        head_channels=32,
        context_dim=8,
        vector_dim=4,
        attention_impl="xla",
    ),
    autoencoder=autoencoder.AutoencoderConfig(channels=32, channel_mult=(1, 1), num_res_blocks=1),
    vision=clip.VisionConfig(
        image_size=8, patch=4, width=8, layers=1, heads=1, mlp=8, output_dim=8, preprocess="plain"
    ),
    conditioner=conditioner.ConditionerConfig(scalars=("azimuth",), dim=4),
    num_frames=3,
    image_size=(16, 32),
)
SAMPLING = sampler.SamplingConfig(steps=7, sampler="dpmpp_2m", guidance_max=2.5)


def random_params(config):
    """Weights as large as an initialiser's, without running one."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        fan_in = max(1, int(np.prod(leaf.shape[:-1])))
        return (rng.standard_normal(leaf.shape, np.float32) / np.sqrt(fan_in)).astype(np.float32)

    return jax.tree.map(draw, folder.abstract_params(config))


@pytest.fixture(scope="module")
def params():
    return random_params(TINY)


@pytest.fixture
def saved(tmp_path, params):
    path = tmp_path / "model"
    folder.save(path, TINY, SAMPLING, params, metadata={"data": "synthetic"})
    return path


def rewrite(path, change):
    """Applies `change` to the folder's tensors in place."""
    tensors = safetensors_numpy.load_file(path / "model.safetensors")
    change(tensors)
    safetensors_numpy.save_file(tensors, path / "model.safetensors")


def reconfigure(path, change):
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def refusal(path):
    with pytest.raises(errors.UserError) as caught:
        folder.load(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_float32_round_trip_is_exact(saved, params):
    model = folder.load(saved)
    assert model.generator == TINY
    assert model.sampling == SAMPLING
    assert model.metadata == {"data": "synthetic"}
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    abstract = generator.abstract(TINY)
    graphdef, state = nnx.split(abstract)
    assert jax.tree.structure(model.params) == jax.tree.structure(state)
    nnx.merge(graphdef, model.params)


def test_everybody_may_read_the_weights(saved):
    for path in saved.glob("*.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o644


def test_tensors_are_named_by_dotted_paths(saved):
    names = set(safetensors_numpy.load_file(saved / "model.safetensors"))
    assert {"unet.conv_in.kernel", "vision.blocks.0.norm1.scale"} <= names
    assert names == set(folder.flatten(folder.abstract_params(TINY)))


def test_plain_dicts_are_the_same_tree(tmp_path, params):
    folder.save(tmp_path / "m", TINY, SAMPLING, nnx.to_pure_dict(params))
    jax.tree.map(np.testing.assert_array_equal, folder.load(tmp_path / "m").params, params)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_half_precision_rounds_once(tmp_path, params, dtype, tolerance):
    folder.save(tmp_path / "m", TINY, SAMPLING, params, dtype=dtype)
    for got, expected in zip(
        jax.tree.leaves(folder.load(tmp_path / "m").params), jax.tree.leaves(params), strict=True
    ):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=1e-7)


def test_float16_never_overflows(tmp_path, params):
    large = jax.tree.map(lambda leaf: leaf + 1e5 * (leaf.ndim == 1), params)
    folder.save(tmp_path / "m", TINY, SAMPLING, large, dtype="float16")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(folder.load(tmp_path / "m").params))


def test_quantised_round_trip_stays_within_half_a_step(tmp_path, params):
    folder.save(tmp_path / "m", TINY, SAMPLING, params, quantize=True, clip="max")
    stored = safetensors_numpy.load_file(tmp_path / "m" / "model.safetensors")
    loaded = folder.flatten(folder.load(tmp_path / "m").params)
    small = 0
    for name, expected in folder.flatten(params).items():
        if stored[name].dtype == np.int8:
            bound = stored[name + ".scale"] * 0.5 * (1 + 1e-5)
            assert (np.abs(loaded[name] - expected) <= bound).all()
        else:
            assert stored[name].dtype == np.float16
            np.testing.assert_allclose(loaded[name], expected, rtol=2**-11, atol=1e-7)
            small += 1
    assert 0 < small < len(loaded)


def test_mini_fits_in_24_megabytes(tmp_path):
    path = tmp_path / "mini"
    params = random_params(generator.MINI)
    folder.save(path, generator.MINI, SAMPLING, params, quantize=True, clip="max")
    size = sum(file.stat().st_size for file in path.iterdir())
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count < size <= 24_000_000


def test_large_models_are_cut_into_several_files(tmp_path, params, monkeypatch):
    monkeypatch.setattr(folder, "SHARD_BYTES", 300_000)
    folder.save(tmp_path / "m", TINY, SAMPLING, params)
    files = sorted(file.name for file in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 1
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    jax.tree.map(np.testing.assert_array_equal, folder.load(tmp_path / "m").params, params)
    (tmp_path / "m" / files[-1]).unlink()
    assert "missing" in refusal(tmp_path / "m")


def test_saving_replaces_a_model_and_leaves_nothing_behind(saved, params):
    folder.save(saved, TINY, dataclasses.replace(SAMPLING, steps=9), params)
    assert folder.load(saved).sampling.steps == 9
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_old_model(saved, params):
    broken = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), params)
    with pytest.raises(errors.UserError, match="NaN or infinite"):
        folder.save(saved, TINY, SAMPLING, broken)
    folder.load(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_saving_over_something_else_is_refused(tmp_path, params):
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(errors.UserError, match="not a model folder"):
        folder.save(tmp_path, TINY, SAMPLING, params)


def test_all_misfits_are_listed_by_name(saved):
    def change(tensors):
        del tensors["unet.conv_in.kernel"]
        tensors["unet.surplus"] = np.zeros(2, np.float32)
        tensors["unet.conv_in.bias"] = np.zeros(3, np.float32)

    rewrite(saved, change)
    message = refusal(saved)
    assert "1 missing: unet.conv_in.kernel" in message
    assert "1 unexpected: unet.surplus" in message
    assert "1 of another shape: unet.conv_in.bias (3,) not (32,)" in message


def test_int8_without_scales_is_refused(saved):
    rewrite(saved, lambda t: t.update({"unet.conv_in.bias": np.zeros(32, np.int8)}))
    assert "unet.conv_in.bias.scale" in refusal(saved)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda c: c.update(format="other"), "format 'other'"),
        (lambda c: c["generator"]["unet"].update(width=3), "unknown width"),
        (lambda c: c["generator"]["unet"].update(channel_mult=[1, "2"]), "channel_mult[1]"),
        (lambda c: c["generator"]["unet"].update(remat=1), "expected bool"),
        (lambda c: c["generator"].update(image_size=[16]), "image_size"),
        (lambda c: c["generator"]["unet"].update(context_dim=9), "context_dim is 9"),
        (lambda c: c["sampling"].update(sampler="magic"), "one of euler"),
        (lambda c: c.pop("sampling"), "missing sampling"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(saved, change, part):
    reconfigure(saved, change)
    assert part in refusal(saved)


def test_unreadable_files_are_named(saved, tmp_path):
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "not a whole safetensors file" in refusal(saved)
    (saved / "model.safetensors").unlink()
    assert "weights are missing" in refusal(saved)
    (saved / "config.json").write_text("{")
    assert "cannot be read" in refusal(saved)
    assert "not a model folder" in refusal(tmp_path / "nowhere")


def test_settings_left_out_take_their_defaults():
    data = settings.to_json(TINY)
    del data["conditioner"], data["unet"]["attention_impl"], data["unet"]["vector_dim"]
    with pytest.raises(errors.UserError, match="vector_dim"):
        settings.from_json(generator.GeneratorConfig, settings.to_json(TINY) | {"conditioner": {}})
    built = settings.from_json(unet.UNetConfig, data["unet"])
    assert built == dataclasses.replace(TINY.unet, attention_impl=None, vector_dim=768)


@pytest.mark.parametrize("config", [generator.SVD_XT, generator.V3D_512, generator.MINI, TINY])
def test_every_preset_survives_json(config):
    text = json.dumps(settings.to_json(config))
    assert settings.from_json(generator.GeneratorConfig, json.loads(text)) == config


def test_names_and_paths_of_models(saved, monkeypatch):
    monkeypatch.setattr(packaged, "ASSETS", saved.parent)
    assert packaged.names() == ("model",)
    assert packaged.resolve("model") == saved
    assert packaged.resolve(str(saved)) == saved
    assert packaged.load("model").generator == TINY
    with pytest.raises(errors.UserError, match="did you mean model"):
        packaged.resolve("modle")
    with pytest.raises(errors.UserError, match=r"no config\.json"):
        packaged.resolve(saved.parent)
