"""The command that converts checkpoints, and published checkpoints as `--model` of `sample`."""

import os
import pickle
import subprocess
import sys

import jax
import numpy as np
import published_files as files
import pytest
import tiny_generator
from published_files import SVD, V3D, assert_same, values
from safetensors import numpy as safetensors_numpy

from v3d_jax import convert, sample
from v3d_jax.diffusion.sampler import SamplingConfig
from v3d_jax.weights import folder, published, sgm

KNOWN = ["--frames", "3", "--size", "16", "16", "--head-channels", "16"]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    convert.cli()


def fails(monkeypatch, capsys, *arguments):
    """Runs the command line; returns its one line on stderr."""
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *arguments)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_from_the_pair_to_ours_and_on_to_every_layout(tmp_path, monkeypatch, capsys):
    pair = files.pair(tmp_path / "in")
    ours, single, there = (tmp_path / name for name in ("ours", "x.safetensors", "svd"))
    run(monkeypatch, pair, ours, *KNOWN)
    captured = capsys.readouterr()
    assert "converting: 100%" in captured.err
    counts = {name: 0 for name in ("unet", "autoencoder", "vision")}
    for name, x in values(folder.open_folder(ours)).items():
        counts[name.partition(".")[0]] += x.size
    assert "3 frames of 16 x 16" in captured.out
    assert ", ".join(f"{name} {count:,}" for name, count in counts.items()) in captured.out
    run(monkeypatch, ours, single, "--layout", "sgm")
    run(monkeypatch, single, there, "--layout", "diffusers", "--dtype", "bfloat16")
    written = safetensors_numpy.load_file(single)
    for name, x in V3D.items():
        np.testing.assert_array_equal(written[name], x)
    halves = values(published.open_model(there))
    for name, x in values(folder.open_folder(ours)).items():
        assert halves[name].dtype.name == "bfloat16"
        np.testing.assert_allclose(halves[name].astype(np.float32), x, rtol=2**-8)


def test_half_precision_keeps_what_it_cannot_hold(tmp_path, monkeypatch):
    tensors = {**SVD, "model.diffusion_model.out.2.bias": np.full(4, 1e5, np.float32)}
    path = files.save(tmp_path / "svd.safetensors", tensors)
    run(monkeypatch, path, tmp_path / "ours", "--dtype", "float16", *KNOWN)
    found = values(folder.open_folder(tmp_path / "ours"))
    assert {name for name, x in found.items() if x.dtype != np.float16} == {"unet.conv_out.bias"}
    np.testing.assert_array_equal(found["unet.conv_out.bias"], np.full(4, 1e5, np.float32))


def test_one_line_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    pair = files.pair(tmp_path)
    there = sorted(tmp_path.iterdir())

    def line(*arguments):
        return fails(monkeypatch, capsys, *arguments)

    new = tmp_path / "new"
    assert "unknown model" in line(tmp_path / "nothing.ckpt", new)
    assert "both SRC and DST" in line(tmp_path, tmp_path)
    assert "named *.safetensors" in line(pair, new, "--layout", "sgm")
    assert "--layout sgm makes a file" in line(pair, tmp_path / "x.safetensors")
    assert "--frames 0: at least 1" in line(pair, new, "--frames", "0")
    assert "--size: two positive" in line(pair, new, "--size", "0", "1")
    assert "takes no hints" in line("mini", new, "--frames", "3")
    assert "mini.safetensors" not in line("mini", new, "--layout", "diffusers")
    assert "svd_xt.safetensors exists" in line(
        pair, tmp_path / "svd_xt.safetensors", "--layout", "sgm", *KNOWN
    )
    (tmp_path / "svd_xt.safetensors").rename(tmp_path / "kept")
    assert "no image tower: put svd_xt.safetensors beside it" in line(pair, new, *KNOWN)
    (tmp_path / "kept").rename(tmp_path / "svd_xt.safetensors")
    cut = pair.read_bytes()
    pair.write_bytes(cut[: len(cut) // 2])
    assert "V3D_512.ckpt: " in line(pair, new, *KNOWN)
    assert sorted(tmp_path.iterdir()) == there


def test_a_planted_command_is_refused_and_never_runs(tmp_path):
    """In a process of its own, as a user would run it."""
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    path = tmp_path / "V3D_512.ckpt"
    path.write_bytes(pickle.dumps({"state_dict": {"w": Payload()}}))
    command = [sys.executable, "-m", "v3d_jax.convert", path, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path}: refused")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_a_model_of_ours_keeps_its_bits(tmp_path, monkeypatch):
    folder.save(
        tmp_path / "tiny", tiny_generator.CONFIG, SamplingConfig(steps=3), tiny_generator.params()
    )
    run(monkeypatch, tmp_path / "tiny", tmp_path / "copy")
    first, second = (folder.open_folder(tmp_path / name) for name in ("tiny", "copy"))
    assert first[:2] == second[:2]
    assert_same(values(second), values(first))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that was trained here, as ours and as a file for other tools."""
    path = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)

    def draw(leaf):
        fan_in = max(1, int(np.prod(leaf.shape[:-1])))
        return (rng.standard_normal(leaf.shape) / np.sqrt(fan_in)).astype(np.float32)

    params = jax.tree.map(draw, folder.abstract_params(files.REDUCED))
    sampling = SamplingConfig(steps=1, guidance_min=1.0, guidance_max=1.0)
    folder.save(path / "ours", files.REDUCED, sampling, params)
    convert.run(convert.ConvertArgs(path / "ours", path / "model.safetensors", "sgm"))
    return path


@pytest.mark.slow
def test_sample_runs_published_files(trained, tmp_path, capsys):
    for model in ("ours", "model.safetensors"):
        sample.run(sample.SampleArgs(out=tmp_path / model, model=str(trained / model), cache=False))
    assert "load" in capsys.readouterr().err
    first, second = (
        (tmp_path / model / "example" / "frames" / "001.png").read_bytes()
        for model in ("ours", "model.safetensors")
    )
    assert first == second


def test_frames_that_are_not_square_are_refused_before_anything_is_read(tmp_path):
    path = files.save(
        tmp_path / "svd_xt.safetensors",
        SVD,
    )
    with pytest.raises(convert.errors.UserError, match=r"1024 x 576 frames; orbits are square"):
        sample.run(sample.SampleArgs(out=tmp_path / "out", model=str(path), cache=False))


def test_names_of_what_is_lost_reach_the_user(tmp_path, monkeypatch, capsys):
    lost = f"{sgm.UNET}out.2.bias"
    tensors = {name: x for name, x in SVD.items() if name != lost}
    path = files.save(tmp_path / "svd.safetensors", tensors)
    line = fails(monkeypatch, capsys, path, tmp_path / "out", *KNOWN)
    assert f"{path} does not fit the model: 1 missing: {lost}" in line
