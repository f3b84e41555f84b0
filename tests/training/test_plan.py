"""Plans of training steps: what they count, what they say, and what they refuse."""

import dataclasses
import os
import re
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny_generator
from jax.sharding import AbstractMesh

from v3d_jax import config, errors, state, train
from v3d_jax.data.loader import LoaderConfig
from v3d_jax.nn import generator
from v3d_jax.parallel import mesh as meshes
from v3d_jax.parallel import program, sharding, topology
from v3d_jax.parallel.mesh import MeshConfig
from v3d_jax.parallel.program import Collective
from v3d_jax.state import OptimConfig
from v3d_jax.training import parts, plan
from v3d_jax.training.objective import DataConfig

ROOT = Path(__file__).parents[2]
TINY = config.VideoTrainConfig(
    model=tiny_generator.CONFIG,
    data=DataConfig(loader=LoaderConfig(batch_size=8, num_frames=3)),
    dtype="float32",
)
GB = 10**9


def recipe(name: str) -> config.VideoTrainConfig:
    return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["config"]


def test_the_recipe_is_that_of_the_release():
    first, second = recipe("v3d_512_9frames"), recipe("v3d_512")
    for settings, frames in ((first, 9), (second, 18)):
        assert settings.model.num_frames == settings.data.loader.num_frames == frames
        assert settings.parts == ("unet",)
        assert (settings.loss.p_mean, settings.loss.p_std) == (1.5, 2.0)
        assert (settings.loss.drop_context, settings.loss.drop_latent) == (0.2, 0.2)
        rebuilt = dataclasses.replace(settings.model.unet, remat=False)
        assert rebuilt == generator.V3D_512.unet
    assert Path(second.run.init_from).parent == Path(first.run.dir)


def test_the_state_of_the_recipe_is_shared_out():
    """All of the UNet learns, 1.52 billion weights; the sums are those of docs/training.md."""
    settings = recipe("v3d_512")

    def fresh(key):
        made = parts.random(settings.model, jnp.bfloat16, key, settings.parts)
        return state.create(made, state.optimizer(settings.optim))

    begun, frozen = jax.eval_shape(fresh, jax.random.key(0)), plan.abstract_frozen(settings)
    assert list(begun.params) == ["unet"]
    count = sum(leaf.size for leaf in jax.tree.leaves(begun.params))
    assert count == pytest.approx(1.525e9, rel=1e-3)
    assert list(frozen.rest) == ["vision"]
    assert frozen.lpips is None
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for fsdp, gigabytes in ((64, "0.447"), (16, "1.727"), (8, "3.432")):
        mesh = AbstractMesh((1, fsdp, 1), meshes.AXES)
        lasting = (begun, frozen)
        size = program.bytes_per_device(lasting, sharding.weights(lasting, mesh))
        assert f"{size / GB:.3f}" == gigabytes
        assert gigabytes in text


REPORT = plan.Plan(
    topology=topology.find("v5e-4"),
    mesh={"data": 1, "fsdp": 4, "frames": 1},
    clips=4,
    memory=plan.Memory(1 * GB, 2 * GB, 1 * GB, GB // 2, 0, 3 * GB),
    flops=1.97e12,
    collectives=[Collective("all-gather", 3, 2 * GB)],
    compiled=True,
)


def test_a_plan_says_what_fits():
    text = plan.report(REPORT)
    assert "v5e-4: 4 chips as data 1 x fsdp 4 x frames 1; 4 clips a step" in text
    assert re.search(r"sum +7\.500 of 16\.911", text)
    assert "1.97 TFLOP, 0.010 s at its peak of 197 TFLOP/s" in text
    assert "all-gather: 3 a step, 2.000 GB" in text
    assert text.endswith("\nfits")
    full = REPORT._replace(memory=REPORT.memory._replace(temporaries=13 * GB))
    assert plan.report(full).endswith("\ndoes not fit")
    refused = REPORT._replace(compiled=False)
    assert plan.report(refused).endswith("\ndoes not fit: the compiler ran out of memory")


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.",
         20.5 * 2**30 - GB),
        ("RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (480.00M) exceeds "
         "available HBM (15.75G).", 480 * 2**20),
    ],
)  # fmt: skip
def test_a_refusal_for_memory_is_read(message, needed):
    assert plan._temporaries(jax.errors.JaxRuntimeError(message), GB) == needed


def test_another_refusal_is_not_swallowed():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        plan._temporaries(jax.errors.JaxRuntimeError("INTERNAL: of 4G"), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": MeshConfig(fsdp=3)}, "8 devices cannot be split into groups of 3"),
        ({"mesh": MeshConfig(frames=2)}, "3 frames cannot be split over 2 devices"),
        ({"optim": OptimConfig(accumulate=2)}, "8 clips in 2 parts cannot be split"),
        ({"parts": ("unet",)}, "leaves out vision: name a model"),
        ({"train_only": ("unet.*",)}, "--train-only leaves weights out"),
    ],
)
def test_settings_that_cannot_be_planned_are_one_line(changes, message):
    with pytest.raises(errors.UserError, match=message) as refused:
        plan.measure(dataclasses.replace(TINY, **changes), topology.find("v5e-8"), jax.devices())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/debug.py", "--plan", "v5e-7"], "unknown topology v5e-7: choose one of v5e-4"),
        (["configs/debug_vae.py", "--plan", "v5e-4"], "--plan is for video models: name"),
        (["configs/debug.py", "--plan"], "--plan needs the name of a topology"),
    ],
)
def test_the_command_refuses_in_one_line_with_status_2(arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit) as ended:
        train.cli()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("temporaries", "status"), [(1, None), (20 * GB, 2)])
def test_the_status_says_whether_it_fits(temporaries, status, monkeypatch, capsys):
    memory = REPORT.memory._replace(temporaries=temporaries)
    made = REPORT._replace(memory=memory)
    monkeypatch.setattr(plan, "make", lambda settings, name: made)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train", "configs/debug.py", "--plan", "v5e-4"])
    if status is None:
        train.main()
    else:
        with pytest.raises(SystemExit) as ended:
            train.main()
        assert ended.value.code == status
    assert capsys.readouterr().out == plan.report(made) + "\n"


@pytest.mark.slow
def test_a_plan_counts_what_a_step_takes():
    """Compiled for the devices that are here: twice the clips are twice the work."""
    first, second = (
        plan.measure(
            dataclasses.replace(
                TINY,
                mesh=MeshConfig(fsdp=2),
                data=DataConfig(loader=LoaderConfig(batch_size=clips, num_frames=3)),
            ),
            topology.find("v5e-8"),
            jax.devices(),
        )
        for clips in (8, 16)
    )
    assert second.flops == pytest.approx(2 * first.flops, rel=0.05)
    assert second.memory.temporaries > first.memory.temporaries
    assert second.memory.batch == 2 * first.memory.batch
    assert first.memory.optimizer == pytest.approx(2 * first.memory.parameters, abs=8)
    assert first.memory.average == first.memory.parameters
    assert {"all-gather", "all-reduce"} & {one.kind for one in first.collectives}
    assert first.fits


def run_plan(name: str, *arguments: str) -> str:
    """What the command prints, in a process of its own; skips where the compiler is not."""
    tpu = topology.find(name).chip.platform == "tpu"
    wheel, extra = ("libtpu", "tpu-aot") if tpu else ("jax-cuda13-plugin", "cuda")
    try:
        metadata.version(wheel)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{wheel} is not installed: pip install '.[{extra}]'")
    given = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    result = subprocess.run(
        [sys.executable, "-m", "v3d_jax.train", *arguments, "--plan", name],
        cwd=ROOT,
        # The tests' flags are a CPU's.
        env=os.environ | {"PYTHONPATH": os.pathsep.join(given), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    print(result.stdout)
    return result.stdout


def numbers_of(text: str) -> dict[str, float]:
    found = re.findall(r"^  (\w+) +([\d.]+)", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def aot(name: str, *rest: object) -> object:
    """A test's parameters, with the marker of the compiler that they need."""
    mark = "tpu_aot" if topology.find(name).chip.platform == "tpu" else "cuda_aot"
    return pytest.param(name, *rest, marks=getattr(pytest.mark, mark))


@pytest.mark.parametrize("name", [aot(name) for name in ("v5e-4", "v6e-4", "v5p-8", "h100-4")])
def test_the_command_plans_for_machines_that_are_not_here(name):
    """The smallest model on all axes; its weights are split, its frames gathered in layers."""
    arguments = "--mesh.fsdp 2 --mesh.frames 2 --data.loader.num-frames 2 --model.num-frames 2"
    text = run_plan(name, "configs/debug.py", *arguments.split())
    assert f"{name}: 4 chips as data 1 x fsdp 2 x frames 2" in text
    assert "all-gather: " in text
    numbers = numbers_of(text)
    assert numbers["optimizer"] == pytest.approx(2 * numbers["parameters"], abs=0.002)
    assert 0 < numbers["temporaries"] < 1
    assert text.endswith("fits\n")


# One clip a chip, and decimal GB of it, as in the table of docs/training.md.
@pytest.mark.parametrize(
    ("name", "clips", "gigabytes", "work", "kinds"),
    [
        aot("v5e-256", 256, 7.5, 89.2, {"all-gather", "all-reduce"}),
        aot("v6e-64", 64, 8.9, 89.2, {"all-gather", "all-reduce"}),
        aot("v5p-128", 64, 9.0, 89.2, {"all-reduce"}),
        aot("h200-64", 64, 22.2, 86.9, {"all-gather", "all-reduce", "reduce-scatter"}),
    ],
)
def test_the_published_size_fits(name, clips, gigabytes, work, kinds):
    """Three to eight minutes on two cores and up to 12 gigabytes of memory."""
    text = run_plan(name, "configs/v3d_512.py", "--data.loader.batch-size", str(clips))
    assert numbers_of(text)["sum"] == pytest.approx(gigabytes, rel=0.1)
    done = float(re.search(r"chip and step: ([\d.]+) TFLOP", text)[1])
    assert done == pytest.approx(work, rel=0.01)
    counts = dict(re.findall(r"^([a-z-]+): (\d+) a step", text, re.MULTILINE))
    assert set(counts) - {"collective-permute"} == kinds
    # Gradients are split as they are made, not all at the end.
    assert int(counts.get("reduce-scatter", 40)) >= 40
    assert text.endswith("fits\n")


@pytest.mark.cuda_aot
def test_a_plan_for_a_gpu_is_what_it_takes_there():
    """On an H200 this step's arguments and temporaries were 54.31 GB (docs/training.md)."""
    alone = "--data.loader.batch-size 1 --mesh.fsdp 1 --model.unet.remat none"
    text = run_plan("h200-1", "configs/v3d_512.py", *alone.split())
    assert numbers_of(text)["sum"] == pytest.approx(54.31, rel=0.01)
