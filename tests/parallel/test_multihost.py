"""Two processes of four devices train what one process of eight does."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import synthetic_orbits
import test_train

from v3d_jax import train
from v3d_jax.training import parts, video

TESTS = Path(__file__).parents[1]
PROCESS = """
import dataclasses, sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 4)
sys.path.insert(0, {tests!r})
import test_train
from v3d_jax import train
from v3d_jax.parallel.multihost import MultihostConfig

if __name__ == "__main__":
    settings = test_train.settings(
        Path({data!r}), Path({run!r}), devices=0, steps=6, save_every=2
    )
    rank = int(sys.argv[1])
    multihost = MultihostConfig(coordinator={address!r}, num_processes=2, process_id=rank)
    trained = train.train(dataclasses.replace(settings, multihost=multihost))
    assert jax.device_count() == 8
"""


def start_two(program, folder, data, run):
    """Both processes of a program that takes its rank; their output is piped."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    script = folder / "process.py"
    script.write_text(
        program.format(tests=str(TESTS), data=str(data), run=str(run), address=address)
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS.parent)}
    return [
        subprocess.Popen(
            [sys.executable, str(script), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]


@pytest.mark.multiprocess
def test_two_processes_equal_one(tmp_path):
    data = synthetic_orbits.build(tmp_path / "data")
    run = tmp_path / "two"
    processes = start_two(PROCESS, tmp_path, data, run)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)

    train.train(test_train.settings(data, tmp_path / "one", devices=0, steps=6))
    models = [np.load(tmp_path / name / "model" / "colour.npz") for name in ("one", "two")]
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(models[1][name], models[0][name], rtol=1e-5, atol=1e-6)
    losses = [
        [float(row["loss"]) for row in test_train.rows(tmp_path / name / "log.csv")]
        for name in ("one", "two")
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert (run / "checkpoints" / "6").is_dir()

    # What two processes wrote, one goes on with.
    longer = test_train.settings(data, run, devices=0, steps=8, accept_changes=True)
    assert int(train.train(longer).step) == 8


STOPPED = """
import dataclasses, sys
from pathlib import Path
import jax
sys.path.insert(0, {tests!r})
import test_train
from v3d_jax import train
from v3d_jax.parallel.multihost import MultihostConfig

if __name__ == "__main__":
    settings = test_train.settings(Path({data!r}), Path({run!r}), devices=0, steps=10**6)
    multihost = MultihostConfig(
        coordinator={address!r}, num_processes=2, process_id=int(sys.argv[1])
    )
    train.train(dataclasses.replace(settings, multihost=multihost))
"""


@pytest.mark.multiprocess
def test_a_signal_to_one_process_stops_both_and_they_save(tmp_path):
    """JAX would take the signal for itself."""
    data, run = synthetic_orbits.build(tmp_path / "data"), tmp_path / "run"
    processes = start_two(STOPPED, tmp_path, data, run)
    try:
        deadline = time.monotonic() + 120
        while not (run / "log.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        processes[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    (saved,) = (run / "checkpoints").iterdir()
    assert int(saved.name) == int(test_train.rows(run / "log.csv")[-1]["step"])


# The packaged model at two frames a clip, from its own weights: every part of a real run but LPIPS.
MINI = """configs/mini.py --data.path {data} --latents.autoencoder {model} --run.init-from {model}
    --latents.folder {folder}/latents --run.dir {folder}/{run} --model.num-frames 2
    --data.loader.num-frames 2 --data.loader.batch-size 4 --data.previews 0
    --perceptual.weight 0 --optim.lr 1e-4 --optim.warmup 1 --optim.ema 0 --dtype float32
    --run.steps 6 --run.save-every 2 --run.log-every 1 --run.export-dtype float32"""
MODEL = TESTS.parent / "v3d_jax" / "assets" / "mini"


def train_mini(folder: Path, run: str, devices: int, *more: str) -> subprocess.Popen:
    """Starts the training command on so many simulated devices of a process."""
    given = MINI.format(data=folder / "data", model=MODEL, folder=folder, run=run).split()
    return subprocess.Popen(
        [sys.executable, "-m", "v3d_jax.train", *given, *more],
        cwd=TESTS.parent,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output = process.communicate(timeout=900)[0]
    assert process.returncode == 0, output[-3000:]
    return output


def weights(folder: Path) -> np.ndarray:
    """All that learns, in one row."""
    leaves = jax.tree.leaves(parts.load(folder, video.PARTS))
    return np.concatenate([np.asarray(leaf, np.float32).ravel() for leaf in leaves])


@pytest.mark.multiprocess
def test_the_mini_model_goes_on_after_a_kill_on_other_devices(tmp_path):
    """One process of four devices, against two of two until one is killed, then one of two."""
    synthetic_orbits.build(tmp_path / "data", train=4, heldout=0, size=256)
    finish(train_mini(tmp_path, "one", 4))

    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    together = ["--multihost.coordinator", address, "--multihost.num-processes", "2"]
    two = [
        train_mini(tmp_path, "two", 2, *together, "--multihost.process-id", str(rank))
        for rank in (0, 1)
    ]
    checkpoints = tmp_path / "two" / "checkpoints"
    try:
        while not (checkpoints / "2").exists() and two[1].poll() is None:
            time.sleep(0.1)
        two[1].kill()
        outputs = [process.communicate(timeout=300)[0] for process in two]
    finally:
        for process in two:
            process.kill()
    assert two[0].returncode != 0, outputs[0][-3000:]
    reached = max(int(saved.name) for saved in checkpoints.glob("[0-9]*"))
    assert 2 <= reached < 6
    assert f"step {reached} of 6" in finish(train_mini(tmp_path, "two", 2))

    runs = [test_train.rows(tmp_path / name / "log.csv") for name in ("one", "two")]
    losses = [[float(row["loss"]) for row in rows] for rows in runs]
    assert len(losses[1]) == 6
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    start, one, two = map(weights, (MODEL, tmp_path / "one/model", tmp_path / "two/model"))
    # Adam's first steps are as large for gradients that are rounding alone.
    assert np.linalg.norm(two - one) < 0.02 * np.linalg.norm(one - start)
