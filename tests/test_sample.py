import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_generator
from PIL import Image

from v3d_jax import console, errors, pipeline, sample, splatting, surfacing
from v3d_jax.data import preprocess
from v3d_jax.diffusion import sampler
from v3d_jax.diffusion.sampler import SamplingConfig
from v3d_jax.splat import gaussians
from v3d_jax.weights import folder

FILES = {"input.png", "frames", "orbit.mp4", "transforms.json", "preview.png", "report.json"}
ISOLATED = """
import sys
import v3d_jax.sample
from jax._src import xla_bridge
heavy = {"grain", "tensorflow_datasets", "trimesh", "array_record", "tensorflow", "torch"}
heavy |= {"skimage", "fast_simplification", "xatlas"}
print(xla_bridge.backends_are_initialized(), sorted(heavy & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    sampling = SamplingConfig(steps=2, sampler="dpmpp_2m", guidance_min=1.0, guidance_max=2.0)
    folder.save(path, tiny_generator.CONFIG, sampling, tiny_generator.params())
    return str(path)


@pytest.fixture
def picture(tmp_path):
    rgba = np.zeros((48, 64, 4), np.uint8)
    rgba[10:40, 20:50] = (200, 60, 30, 255)
    rgba[15:20, 25:30] = (20, 60, 230, 255)
    path = tmp_path / "toy.png"
    Image.fromarray(rgba).save(path)
    return path


def arguments(model, *images, **changes):
    changes.setdefault("cache", False)
    return sample.SampleArgs(images=tuple(images), model=model, **changes)


def frames(path):
    return np.stack([np.asarray(Image.open(file)) for file in sorted((path / "frames").iterdir())])


def fails(monkeypatch, capsys, *arguments):
    """Runs the command line; returns its one line on stderr."""
    monkeypatch.setattr(sys, "argv", ["sample", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        sample.cli()
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_orbit_of_a_picture_and_of_the_packaged_example(tmp_path, model, picture, capsys):
    (toy,) = sample.run(arguments(model, picture, out=tmp_path / "out"))
    (example,) = sample.run(arguments(model, out=tmp_path / "out"))
    captured = capsys.readouterr()
    for stage in ("encode", "sample", "decode"):
        assert stage in captured.err
    assert "2/2" in captured.err
    assert f"{toy}: 3 frames" in captured.out
    assert (toy, example) == (tmp_path / "out" / "toy", tmp_path / "out" / "example")
    for path in (toy, example):
        assert {file.name for file in path.iterdir()} == FILES
        assert frames(path).shape == (3, 16, 16, 3)
    assert np.abs(frames(toy).astype(int) - frames(example)).max() > 10
    report = json.loads((toy / "report.json").read_text())
    assert report["sampling"]["steps"] == 2
    assert report["device"]["platform"] == "cpu"
    assert set(report["seconds"]) == {"load", "prepare", "encode", "sample", "decode"}
    assert report["peak_memory"]["host"] > 10**8
    assert report["versions"]["jax"] == jax.__version__
    transforms = json.loads((toy / "transforms.json").read_text())
    assert [frame["file_path"] for frame in transforms["frames"]] == [
        f"frames/{index:03d}.png" for index in range(3)
    ]


def test_command_line_gives_the_frames_of_the_pipeline(tmp_path, model, picture):
    (path,) = sample.run(arguments(model, picture, out=tmp_path / "out", seed=5))
    loaded = folder.load(model)
    image = preprocess.prepare(picture, 16).image.astype(np.float32) / 255.0
    settings = pipeline.Settings(loaded.generator, loaded.sampling)
    orbit = jax.jit(pipeline.image_to_orbit, static_argnums=0)
    expected = orbit(settings, loaded.params, jax.numpy.asarray(image), jax.random.key(5))
    assert np.abs(frames(path) - 255.0 * np.asarray(expected)).max() <= 0.6


@pytest.mark.slow
def test_splats_of_a_picture(tmp_path, model, picture, capsys):
    given = splatting.SplatArgs(gaussians=60, fit_steps=10)
    (path,) = sample.run(
        arguments(model, picture, out=tmp_path / "out", stages="video,splats", splats=given)
    )
    assert "60 Gaussians" in capsys.readouterr().out
    assert {file.name for file in path.iterdir()} == FILES | {"splats.ply", "splats.mp4"}
    assert gaussians.load_ply(path / "splats.ply").means.shape == (60, 3)
    report = json.loads((path / "report.json").read_text())
    assert {"load", "decode", *splatting.STAGES} <= set(report["seconds"])
    assert report["splats"]["psnr"] > 0
    assert report["splats"]["lpips"] is None  # frames are too small for it
    (alone,) = sample.run(arguments(model, picture, out=tmp_path / "alone"))
    np.testing.assert_array_equal(frames(path), frames(alone))


def test_a_failed_mesh_leaves_the_rest(tmp_path, model, picture, monkeypatch):
    def no_surface(args, frames, key, seconds):
        raise errors.UserError("the fitted field has no surface")

    monkeypatch.setattr(surfacing, "reconstruct", no_surface)
    monkeypatch.setattr(splatting, "check_frames", lambda frames: None)
    with pytest.raises(errors.UserError, match="toy has no mesh: the fitted field has no surface"):
        sample.run(arguments(model, picture, out=tmp_path / "out", stages="video,mesh"))
    path = tmp_path / "out" / "toy"
    assert {file.name for file in path.iterdir()} == FILES
    assert "mesh" not in json.loads((path / "report.json").read_text())


def test_same_seed_same_files(tmp_path, model, picture):
    def run(seed, name):
        (path,) = sample.run(arguments(model, picture, out=tmp_path / name, seed=seed))
        return path

    first, again, other = run(1, "a"), run(1, "b"), run(2, "c")
    for name in ("input.png", "orbit.mp4", "transforms.json", "preview.png", "frames/001.png"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
    assert np.abs(frames(first).astype(int) - frames(other)).max() > 2


def test_a_picture_does_not_depend_on_its_place(tmp_path, model, picture):
    (alone,) = sample.run(arguments(model, picture, out=tmp_path / "a"))
    both = sample.run(arguments(model, sample.EXAMPLE, picture, out=tmp_path / "b"))
    assert [path.name for path in both] == ["example", "toy"]
    np.testing.assert_array_equal(frames(alone), frames(both[1]))


def test_settings_of_the_command_line_replace_the_models(model):
    loaded = folder.load(model)
    own = sample.configure(arguments(model), loaded)
    assert own.sampling == loaded.sampling
    changed = sample.configure(
        arguments(model, steps=7, sampler="heun", schedule="ays", guidance=(1.5, 3.0)), loaded
    ).sampling
    assert (changed.steps, changed.sampler, changed.schedule) == (7, "heun", "ays")
    assert (changed.guidance_min, changed.guidance_max) == (1.5, 3.0)
    assert changed.sigma_max == loaded.sampling.sigma_max


def test_the_fast_preset_and_what_replaces_parts_of_it(model):
    loaded = folder.load(model)
    slow = loaded._replace(sampling=SamplingConfig(guidance_max=4.0))
    made = sample.configure(arguments(model, preset="fast"), slow).sampling
    assert (made.steps, made.sampler, made.schedule) == (9, "dpmpp_2m", "ays")
    levels = sampler.sigmas(made)[:-1]
    low, high = made.guidance_interval
    assert int(((levels > low) & (levels <= high)).sum()) == 6
    assert made.guidance_max == 4.0
    made = sample.configure(arguments(model, preset="fast", steps=8), slow).sampling
    assert (made.steps, made.schedule) == (8, "ays")
    with pytest.raises(errors.UserError, match="samples in 2 steps already"):
        sample.configure(arguments(model, preset="fast"), loaded)


def test_low_memory_and_devices_reach_the_pipeline(model):
    loaded = folder.load(model)
    for changes in ({"low_memory": True}, {"devices": 2}):
        made = sample.configure(arguments(model, **changes), loaded)
        assert made == dataclasses.replace(sample.configure(arguments(model), loaded), **changes)


@pytest.mark.slow
def test_low_memory_and_devices_give_the_same_pictures(tmp_path, model, picture):
    (plain,) = sample.run(arguments(model, picture, out=tmp_path / "plain"))
    for name, changes in (("low", {"low_memory": True}), ("two", {"devices": 2})):
        (made,) = sample.run(arguments(model, picture, out=tmp_path / name, **changes))
        assert np.abs(frames(made).astype(int) - frames(plain)).max() <= 1
        report = json.loads((made / "report.json").read_text())
        assert {key: report[key] for key in changes} == changes


def test_what_a_user_can_get_wrong_is_one_line(tmp_path, model, picture, monkeypatch, capsys):
    def line(*arguments):
        return fails(monkeypatch, capsys, *arguments, "--out", tmp_path / "out", "--no-cache")

    def with_model(*arguments):
        return line(*arguments, "--model", model)

    (tmp_path / "text.png").write_text("text")
    (tmp_path / "zero.png").write_bytes(b"")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("RGBA", (32, 32)).save(tmp_path / "clear.png")
    assert "does not exist" in with_model(tmp_path / "absent.png")
    assert "not a picture" in with_model(tmp_path / "text.png")
    assert "empty" in with_model(tmp_path / "zero.png")
    assert "1 x 1" in with_model(tmp_path / "dot.png")
    assert "transparent everywhere" in with_model(picture, tmp_path / "clear.png")
    assert "would both be written" in with_model(picture, tmp_path / "toy.jpg")
    assert "'cake' is not available" in with_model("--stages", "video,cake")
    assert "give video,splats" in with_model("--stages", "splats")
    assert "give video,mesh" in with_model("--stages", "mesh")
    assert "--faces 9" in with_model("--faces", "9")
    assert "--surface-steps 0" in with_model("--surface-steps", "0")
    assert "--gaussians 3" in with_model("--gaussians", "3")
    assert "--degree 4" in with_model("--degree", "4")
    assert "--steps 0" in with_model("--steps", "0")
    assert "--devices 0" in with_model("--devices", "0")
    assert "9 devices are asked for, 8 are here" in with_model("--devices", "9")
    assert "choose one of 1, 2, 3, 6" in with_model("--devices", "4")
    assert "leave it or --devices out" in with_model("--devices", "2", "--low-memory")
    assert "in 2 steps already" in with_model("--preset", "fast")
    assert "--border" in with_model("--border", "1.5")
    assert "--seed" in with_model("--seed", "-1")
    assert "--guidance" in with_model("--guidance", "1", "inf")
    assert "unknown model 'mimi'" in line(picture, "--model", "mimi")
    assert "not a model folder" in line(picture, "--model", tmp_path)
    assert not (tmp_path / "out").exists()


def test_nan_is_reported(tmp_path, model, picture, monkeypatch):
    monkeypatch.setattr(sample, "_decode", lambda *args: jax.numpy.full((1, 3, 16, 16, 3), np.nan))
    with pytest.raises(errors.UserError, match="NaN"):
        sample.run(arguments(model, picture, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_import_starts_no_backend_and_loads_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", ISOLATED], capture_output=True, text=True)
    assert done.stdout.strip() == "False []", done.stderr


def test_module_runs_as_a_program(tmp_path):
    command = [sys.executable, "-m", "v3d_jax.sample", "--model", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("kept", [True, False])
def test_compiled_programs_are_kept_in_the_users_cache_folder(tmp_path, monkeypatch, kept):
    changed = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_remove_custom_partitioning_ptr_from_cache_key",
    )
    before = [getattr(jax.config, name) for name in changed]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "elsewhere" if kept else None)
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", False)
    try:
        console.enable_cache()
        found = jax.config.jax_compilation_cache_dir
        assert found == ("elsewhere" if kept else str(tmp_path / "v3d_jax" / "jax"))
        assert kept or Path(found).is_dir()
        assert jax.config.jax_remove_custom_partitioning_ptr_from_cache_key
    finally:
        for name, value in zip(changed, before, strict=True):
            jax.config.update(name, value)
