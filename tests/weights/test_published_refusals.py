"""What does not fit a published layout is refused by name, and nothing is half-written."""

import dataclasses
import json
import os
import pickle

import numpy as np
import published_files as files
import pytest
from published_files import HINTS, SVD, assert_same, values

from v3d_jax.errors import UserError
from v3d_jax.weights import export, folder, keymap, packaged, pickles, published


def refusal(path, hints=HINTS):
    with pytest.raises(UserError) as caught:
        published.open_model(path, hints)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def pair(tmp_path):
    return files.pair(tmp_path)


def test_what_does_not_fit_is_listed_by_name(tmp_path):
    broken = dict(SVD)
    del broken["model.diffusion_model.out.2.bias"]
    del broken["first_stage_model.decoder.conv_in.bias"]
    broken["model.diffusion_model.surplus"] = np.zeros(2, np.float32)
    broken["optimizer.state"] = np.zeros(2, np.float32)
    name = "conditioner.embedders.0.open_clip.model.visual.ln_pre.bias"
    broken[name] = np.zeros(3, np.float32)
    message = refusal(files.save(tmp_path / "svd.safetensors", broken))
    for part in (
        "2 missing: model.diffusion_model.out.2.bias, first_stage_model.decoder.conv_in.bias",
        "2 unexpected: optimizer.state, model.diffusion_model.surplus",
        f"1 of another shape: {name} (3,) not (128,)",
    ):
        assert part in message
    broken = dict(SVD) | {"optimizer.state": np.zeros(2, np.float32)}
    path = files.save(tmp_path / "svd.safetensors", broken)
    published.open_model(path, dataclasses.replace(HINTS, ignore=("optimizer.",)))


@pytest.mark.parametrize(
    "lost",
    [
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.input_blocks.2.0.op.weight",
        "model.diffusion_model.input_blocks.3.0.in_layers.2.weight",
        "model.diffusion_model.middle_block.1.norm.bias",
        "first_stage_model.encoder.down.1.block.0.conv2.weight",
        "first_stage_model.decoder.conv_out.time_mix_conv.weight",
    ],
)
def test_a_tensor_that_is_lost_is_named(tmp_path, lost):
    tensors = {name: x for name, x in SVD.items() if name != lost}
    assert lost.rpartition("diffusion_model.")[2] in refusal(
        files.save(tmp_path / "svd.safetensors", tensors)
    )


def test_networks_that_are_missing_or_there_twice_are_named(tmp_path, pair):
    (tmp_path / "svd_xt.safetensors").rename(tmp_path / "svd_xt.kept")
    message = refusal(pair)
    assert "V3D_512.ckpt has no image tower: put svd_xt.safetensors beside it" in message
    for name in ("one", "two"):
        files.save(tmp_path / f"{name}.safetensors", SVD)
    assert "several beside it: one.safetensors, two.safetensors" in refusal(pair)
    (tmp_path / "svd_xt.kept").rename(tmp_path / "svd_xt.safetensors")
    published.open_model(pair, HINTS)
    tower = keymap.strip(SVD, "conditioner.embedders.0.open_clip.model.")
    only = files.save(tmp_path / "tower" / "clip.safetensors", tower)
    assert "no video UNet in the names of sgm or diffusers, but image tower" in refusal(only)
    twice = files.prefixed("a.", tower) | files.prefixed("b.", tower)
    assert "more than one image tower" in refusal(
        files.save(tmp_path / "twice" / "clip.safetensors", twice)
    )
    (tmp_path / "V3D_512.ckpt").unlink()
    assert "should hold one model and holds one.safetensors, svd_xt" in refusal(tmp_path)
    assert "does not exist" in refusal(tmp_path / "nothing.ckpt")


def test_sizes_that_cannot_be_are_refused(tmp_path, pair):
    bad = dataclasses.replace(HINTS, head_channels=48)
    assert "64 channels do not divide into heads of 48: say how many" in refusal(pair, bad)
    bad = dataclasses.replace(HINTS, vision_heads=3)
    assert "128 channels do not divide into 3 heads" in refusal(pair, bad)
    assert "do not divide by" in refusal(pair, dataclasses.replace(HINTS, size=(15, 16)))


def test_other_activations_and_heads_are_refused(tmp_path):
    tensors = {
        name: files.fill(named) for name, named in files.diffusers_shapes(files.REDUCED).items()
    }
    path = files.diffusers_folder(tmp_path / "svd", files.REDUCED, tensors)
    for name, change, part in (
        ("image_encoder", {"hidden_act": "quick_gelu"}, "'quick_gelu', not SVD's gelu"),
        ("unet", {"num_attention_heads": [1, 0]}, "give no one size of heads"),
        ("unet", {"num_frames": "many"}, "num_frames is 'many'"),
        ("vae", {"scaling_factor": -1}, "scaling_factor is -1"),
    ):
        file = path / name / "config.json"
        text = file.read_text()
        file.write_text(json.dumps(json.loads(text) | change))
        assert part in refusal(path, published.Hints())
        file.write_text(text)


def test_a_planted_command_is_refused_and_never_runs(tmp_path):
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    for name, data in (("bare.ckpt", None), ("V3D_512.ckpt", {})):
        content = pickle.dumps({"state_dict": {"weight": Payload()}}, 2)
        path = tmp_path / name
        if data is None:
            path.write_bytes(content)
        else:
            files.torch_zip(path, content[2:-1], data)
        with pytest.raises(pickles.RefusedError, match=r"refused.*system"):
            packaged.open_model(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("write", "change", "part"),
    [
        (export.write_sgm, {"groups": 8}, "sgm cannot run this model: its unet.groups is 8"),
        (export.write_diffusers, {"groups": 8}, "diffusers cannot run this model"),
        (export.write_diffusers, {"channel_mult": (2, 4), "model_channels": 16}, "channel_mult"),
    ],
)
def test_settings_that_other_tools_lack_are_refused(tmp_path, pair, write, change, part):
    model = published.open_model(pair, HINTS)
    changed = dataclasses.replace(
        model.generator, unet=dataclasses.replace(model.generator.unet, **change)
    )
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match=part):
        write(path, model._replace(generator=changed))
    assert not path.exists()


@pytest.mark.parametrize("write", [export.write_sgm, export.write_diffusers])
def test_a_decoder_of_frames_alone_is_for_no_other_tool(tmp_path, pair, write):
    model = published.open_model(pair, HINTS)
    alone = dataclasses.replace(model.generator.autoencoder, frames_alone=True)
    changed = dataclasses.replace(model.generator, autoencoder=alone)
    with pytest.raises(UserError, match=r"its autoencoder\.frames_alone is True, and False there"):
        write(tmp_path / "x.safetensors", model._replace(generator=changed))


def test_the_mini_model_is_for_no_other_tool(tmp_path):
    model = packaged.open_model("mini")
    for write in (export.write_sgm, export.write_diffusers):
        with pytest.raises(UserError, match="cannot run this model"):
            write(tmp_path / "x.safetensors", model)


def test_nothing_is_half_written_or_overwritten(tmp_path, pair):
    model = published.open_model(pair, HINTS)
    name = list(model.tensors)[-1]
    shape = model.tensors[name].shape
    broken = model._replace(tensors={**model.tensors, name: np.full(shape, np.nan, np.float32)})
    there = sorted(tmp_path.iterdir())
    writers = (folder.write, export.write_sgm, export.write_diffusers)
    for write in writers:
        with pytest.raises(UserError, match="holds NaN or infinite weights"):
            write(tmp_path / "new", broken)
    assert sorted(tmp_path.iterdir()) == there
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("dear")
    for write in writers:
        with pytest.raises(UserError, match=r"exists.*choose another name"):
            write(tmp_path / "full", model)


def test_large_networks_are_cut_into_shards(tmp_path, pair, monkeypatch):
    model = published.open_model(pair, HINTS)
    monkeypatch.setattr(export, "SHARD_BYTES", 300_000)
    export.write_diffusers(tmp_path / "x", model)
    assert len(list((tmp_path / "x" / "unet").glob("*.safetensors"))) > 2
    assert (tmp_path / "x" / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert_same(values(published.open_model(tmp_path / "x")), values(model))
