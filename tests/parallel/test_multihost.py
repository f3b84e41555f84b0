"""Two processes of four devices train what one process of eight does."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import synthetic_orbits
import test_train

from v3d_jax import train

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
        Path({data!r}), Path({run!r}), devices=0, noise=0.0, steps=6, save_every=2
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

    # Noise goes by a clip's place in the batch, where two processes' clips are in another order.
    train.train(test_train.settings(data, tmp_path / "one", devices=0, noise=0.0, steps=6))
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
    longer = test_train.settings(data, run, devices=0, noise=0.0, steps=8, accept_changes=True)
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
