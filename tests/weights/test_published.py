"""Published layouts: what is recognised, round trips to the bit, and what is refused by name."""

import dataclasses
import json
import os
import tracemalloc

import ml_dtypes
import numpy as np
import published_files as files
import pytest
import test_keymap
from published_files import HINTS, SVD, V3D, assert_same, values

from v3d_jax.errors import UserError
from v3d_jax.nn import generator
from v3d_jax.weights import clip as clip_names
from v3d_jax.weights import (
    export,
    folder,
    keymap,
    published,
    sgm,
)


@pytest.fixture
def pair(tmp_path):
    return files.pair(tmp_path)


def sparse(path, named):
    """A file of float32 zeros that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in named.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    return path


def test_published_sizes_are_recognised_in_all_layouts(tmp_path):
    svd = files.svd_shapes(generator.SVD_XT)
    assert len(svd) == 2446
    v3d = files.sgm_shapes(generator.V3D_512)
    assert len(v3d) == 1800
    # Held to tables that are written by hand from the published sizes.
    assert keymap.strip(v3d, sgm.UNET) == test_keymap.unet_tensors()
    assert keymap.strip(v3d, sgm.AUTOENCODER) == test_keymap.autoencoder_tensors()
    single = sparse(tmp_path / "svd_xt.safetensors", svd)
    alone = sparse(tmp_path / "V3D_512.safetensors", v3d)
    assert published.open_model(single).generator == generator.SVD_XT
    for path in (alone, tmp_path):
        model = published.open_model(path)
        assert model.generator == generator.V3D_512
        assert model.metadata["converted_from"] == ["V3D_512.safetensors", "svd_xt.safetensors"]
    for name, tensors in files.diffusers_shapes(generator.SVD_XT).items():
        stem = "model" if name == "image_encoder" else "diffusion_pytorch_model"
        if name == "vae":
            # Read to be folded, and therefore written in full.
            tensors = {key: x for key, x in tensors.items() if "quant_conv" not in key}
        sparse(tmp_path / "svd" / name / f"{stem}.safetensors", tensors)
    assert published.open_model(tmp_path / "svd").generator == generator.SVD_XT


def test_the_pair_is_v3d_with_the_other_files_tower(pair):
    model = published.open_model(pair, HINTS)
    assert model.generator == files.REDUCED
    found = values(model)
    ours = keymap.ours(sgm.unet(files.REDUCED.unet), keymap.strip(V3D, sgm.UNET))
    np.testing.assert_array_equal(found["unet.conv_in.kernel"], ours["conv_in.kernel"])
    tower = SVD["conditioner.embedders.0.open_clip.model.visual.class_embedding"]
    np.testing.assert_array_equal(found["vision.class_embedding"], tower)
    assert_same(values(published.open_model(pair.parent, HINTS)), found)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trips_are_exact_through_all_layouts(tmp_path, dtype):
    theirs = {name: np.asarray(x, dtype) for name, x in SVD.items()}
    path = files.save(tmp_path / "svd.safetensors", theirs)
    model = published.open_model(path, HINTS)
    assert model.generator == files.REDUCED
    folder.write(tmp_path / "ours", model)
    kept = folder.open_folder(tmp_path / "ours")
    assert_same(values(kept), values(model))
    export.write_diffusers(tmp_path / "diffusers", kept)
    there = published.open_model(tmp_path / "diffusers")
    assert_same(values(there), values(model))
    export.write_sgm(tmp_path / "again.safetensors", there)
    again = published.open_model(tmp_path / "again.safetensors")
    assert_same(values(again), values(model))
    assert again.generator == there.generator == kept.generator == model.generator
    assert again.sampling == model.sampling
    written = {name: np.asarray(x) for name, x in export.sgm_tensors(again).items()}
    assert set(written) == set(theirs)
    copied = ("conditioner.embedders.3.", "conditioner.embedders.0.open_clip.model.")
    for name, x in theirs.items():
        assert written[name].shape == x.shape
        assert written[name].dtype == x.dtype
        if not name.startswith(copied) or ".visual." in name:
            assert written[name].tobytes() == x.tobytes(), name


def test_a_conditioning_encoder_is_the_first_stages(pair):
    written = export.sgm_tensors(published.open_model(pair, HINTS))
    for name, x in keymap.strip(written, f"{sgm.AUTOENCODER}encoder.").items():
        other = written[f"conditioner.embedders.3.encoder.encoder.{name}"]
        np.testing.assert_array_equal(np.asarray(x), np.asarray(other))


@pytest.mark.parametrize("variant", ["plain", "fp16 beside", "shards"])
def test_diffusers_folders(tmp_path, variant):
    tensors = {
        name: files.fill(named) for name, named in files.diffusers_shapes(files.REDUCED).items()
    }
    path = files.diffusers_folder(tmp_path / "svd", files.REDUCED, tensors)
    expected = values(published.open_model(path, published.Hints(size=(16, 16))))
    for name in ("unet", "image_encoder"):
        stem = "model" if name == "image_encoder" else "diffusion_pytorch_model"
        if variant == "fp16 beside":
            halves = {key: x.astype(np.float16) for key, x in tensors[name].items()}
            files.save(path / name / f"{stem}.fp16.safetensors", halves)
        if variant == "shards":
            (path / name / f"{stem}.safetensors").unlink()
            files.shard(path / name, stem, tensors[name])
    model = published.open_model(path, published.Hints(size=(16, 16)))
    assert model.generator == files.REDUCED
    assert_same(values(model), expected)


def test_quant_conv_is_folded_into_the_last_convolution(tmp_path):
    tensors = {
        name: files.fill(named) for name, named in files.diffusers_shapes(files.REDUCED).items()
    }
    path = files.diffusers_folder(tmp_path / "svd", files.REDUCED, tensors)
    found = values(published.open_model(path, published.Hints(size=(16, 16))))
    vae = tensors["vae"]
    pixels = np.random.default_rng(0).standard_normal((64, 3, 3)).astype(np.float32)
    once = np.einsum("oihw,ihw->o", vae["encoder.conv_out.weight"], pixels)
    once = once + vae["encoder.conv_out.bias"]
    twice = vae["quant_conv.weight"][:, :, 0, 0] @ once + vae["quant_conv.bias"]
    kernel, bias = (found[f"autoencoder.encoder.conv_out.{name}"] for name in ("kernel", "bias"))
    got = np.einsum("hwio,ihw->o", kernel, pixels) + bias
    np.testing.assert_allclose(got, twice, rtol=1e-4, atol=1e-4)
    assert np.abs(twice - once).max() > 0.1


def test_towers_of_clips_own_files(tmp_path, pair):
    expected = values(published.open_model(pair, HINTS))
    root = "conditioner.embedders.0.open_clip.model."
    open_clip = {name: SVD[root + name] for name in files.tower_shapes(files.REDUCED)}
    ours = keymap.strip(expected, "vision.")
    theirs = keymap.theirs(clip_names.transformers(files.REDUCED.vision), ours)
    transformers = {name: np.ascontiguousarray(x) for name, x in theirs.items()}
    # Whole models have a text tower, older ones an index buffer.
    open_clip["transformer.resblocks.0.ln_1.weight"] = np.zeros(3, np.float32)
    transformers["text_model.final_layer_norm.weight"] = np.zeros(3, np.float32)
    transformers["vision_model.embeddings.position_ids"] = np.arange(5)
    (tmp_path / "svd_xt.safetensors").unlink()
    for path in (
        files.save(tmp_path / "a" / "open_clip_model.safetensors", open_clip),
        files.save(tmp_path / "b" / "model.safetensors", transformers),
    ):
        for given in (path, path.parent):
            hints = dataclasses.replace(HINTS, vision=given)
            assert_same(values(published.open_model(pair, hints)), expected)


def test_names_decide_and_not_where_they_are(tmp_path):
    """Bare state dicts of the networks, as training code may save them."""
    path = tmp_path / "model"
    for name, prefix in (
        ("unet", sgm.UNET),
        ("vae", sgm.AUTOENCODER),
        ("image_encoder", "conditioner.embedders.0.open_clip.model."),
    ):
        stem = "model" if name == "image_encoder" else "diffusion_pytorch_model"
        files.save(path / name / f"{stem}.safetensors", keymap.strip(SVD, prefix))
    whole = files.save(tmp_path / "svd.safetensors", SVD)
    assert_same(
        values(published.open_model(path, HINTS)), values(published.open_model(whole, HINTS))
    )


def test_shards_of_one_file(tmp_path):
    whole = files.save(tmp_path / "whole" / "svd.safetensors", SVD)
    index = files.shard(tmp_path / "shards", "svd", SVD)
    expected = values(published.open_model(whole, HINTS))
    for path in (index, index.parent):
        assert_same(values(published.open_model(path, HINTS)), expected)
    (index.parent / "svd-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"svd-00002-of-00003\.safetensors does not exist"):
        published.open_model(index, HINTS)
    index.write_text(json.dumps({"weight_map": {"a": "../svd.safetensors"}}))
    with pytest.raises(UserError, match="not a file beside it"):
        published.open_model(index, HINTS)


def test_settings_that_tensors_do_not_tell_travel_in_the_header(tmp_path, pair):
    model = published.open_model(pair, HINTS)
    sampling = dataclasses.replace(model.sampling, steps=3, sampler="heun")
    config = dataclasses.replace(model.generator, num_frames=5)
    export.write_sgm(
        tmp_path / "x.safetensors", model._replace(sampling=sampling, generator=config)
    )
    again = published.open_model(tmp_path / "x.safetensors")
    assert (again.sampling, again.generator) == (sampling, config)
    other = published.open_model(tmp_path / "x.safetensors", published.Hints(frames=7))
    assert other.generator == dataclasses.replace(config, num_frames=7)


def averages(tensors):
    return {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}": x + np.float32(3)
        for name, x in tensors.items()
        if name.startswith(sgm.UNET)
    }


def test_averaged_weights_take_the_places_of_the_raw_ones(tmp_path, pair):
    raw = values(published.open_model(pair, HINTS))
    ema = averages(V3D)
    # Parameters that were not trained have no average.
    del ema["model_ema.diffusion_modeltime_embed0weight"]
    counters = {"model_ema.decay": np.asarray(0.9), "model_ema.num_updates": np.asarray(7)}
    path = files.save(tmp_path / "ema" / "v3d.safetensors", V3D | ema | counters)
    hints = dataclasses.replace(HINTS, vision=tmp_path / "svd_xt.safetensors")
    model = published.open_model(path, hints)
    assert model.metadata["averaged_tensors"] == len(ema)
    for name, x in values(model).items():
        moved = name.startswith("unet.") and name != "unet.time_embed.linear1.kernel"
        np.testing.assert_array_equal(x, raw[name] + np.float32(3) if moved else raw[name])
    assert_same(values(published.open_model(path, dataclasses.replace(hints, ema=False))), raw)
    files.save(path, V3D | ema | {"model_ema.strange": np.zeros(2, np.float32)})
    with pytest.raises(UserError, match=r"1 unexpected: model_ema\.strange"):
        published.open_model(path, hints)


def test_no_two_published_names_share_an_average():
    named = files.sgm_shapes(generator.V3D_512)
    ema = {name: None for name in averages(dict.fromkeys(named, np.float32(0)))}
    kept, used = sgm.averaged(dict.fromkeys(named) | ema, sgm.UNET)
    assert len(used) == 1428
    assert set(kept) == set(named)


@pytest.mark.parametrize("write", [folder.write, export.write_sgm, export.write_diffusers])
def test_a_conversion_holds_few_tensors(tmp_path, pair, write):
    model = published.open_model(pair, HINTS)
    total = sum(x.nbytes for x in values(model).values())
    tracemalloc.start()
    try:
        write(tmp_path / "out", model)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < total / 3
