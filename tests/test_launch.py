"""The launch scripts print what they would run, ask for what they need, and pass signals on."""

import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = "configs/debug.py"
TRAIN = ["-m", "v3d_jax.train", CONFIG, "--run.dir", "/mnt/v3d/my run"]
TPU = {"NAME": "orbits", "ZONE": "z", "TYPE": "v4-32", "STORAGE": "10.0.0.2:/v3d"}


def launch(script, *arguments, **environment):
    """What a script prints; a variable of None is not set."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    given = {name: value for name, value in environment.items() if value is not None}
    return subprocess.run(
        ["bash", str(ROOT / "launch" / script), *arguments],
        env={**kept, "DRY_RUN": "1", **given},
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )


def commands(done):
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_one_process_here():
    assert commands(launch("local.sh", *TRAIN[2:])) == [["python", *TRAIN]]


def test_several_processes_here_find_each_other():
    found = commands(launch("local.sh", *TRAIN[2:], PROCESSES="2", PORT="1234"))
    shared = ["--multihost.coordinator", "localhost:1234", "--multihost.num-processes", "2"]
    wanted = [
        ["python", *TRAIN, *shared, "--multihost.process-id", number] for number in ("0", "1")
    ]
    assert found == wanted


def test_slurm_submits_itself_and_trains_in_the_job():
    (submit,) = commands(launch("slurm.sh", *TRAIN[2:], NODES="2", GPUS="4"))
    assert submit[0] == "sbatch"
    assert submit[-4:] == ["launch/slurm.sh", *TRAIN[2:]]
    options = dict(itertools.pairwise(submit))
    assert (options["--nodes"], options["--ntasks-per-node"]) == ("2", "4")
    assert "--requeue" in submit
    inside = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT)}
    (step,) = commands(launch("slurm.sh", *TRAIN[2:], **inside))
    assert step[:5] == ["srun", "--output", "0", "--error", "0"]
    assert step[-7:] == ["python", *TRAIN, "--multihost.distributed"]


def test_a_pod_is_asked_for_set_up_and_trained_on():
    done = launch("tpu_pod.sh", *TRAIN[2:], **TPU, RUNTIME="base", SPOT="1")
    created, mounted, copied, installed, trained = commands(
        subprocess.CompletedProcess([], done.returncode, done.stdout.rpartition("done;")[0])
    )
    assert created[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "orbits"]
    assert "--spot" in created
    assert "10.0.0.2:/v3d" in mounted[-1]
    assert copied[-1] == "orbits:"
    assert "pip install" in installed[-1]
    remote = shlex.split(trained[-1].rpartition("exec ")[2])
    assert remote == ["venv/bin/python", *TRAIN, "--multihost.distributed"]
    assert "--worker all" in " ".join(trained)


def test_a_cluster_gets_one_workload():
    (create,) = commands(launch("gke.sh", *TRAIN[2:], **TPU, CLUSTER="tpus", IMAGE="python:3.11"))
    assert create[:4] == ["xpk", "workload", "create", "--workload"]
    options = dict(itertools.pairwise(create))
    assert (options["--tpu-type"], options["--num-slices"]) == ("v4-32", "1")
    inside = shlex.split(create[-1].rpartition("exec ")[2])
    assert inside == ["python", *TRAIN, "--multihost.distributed"]


@pytest.mark.parametrize("script", ["local.sh", "slurm.sh", "tpu_pod.sh", "gke.sh"])
def test_what_is_missing_is_one_line(script):
    complete = {**TPU, "RUNTIME": "base", "CLUSTER": "tpus", "IMAGE": "python:3.11"}
    done = launch(script, "configs/nowhere.py", **complete)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: name a config file")
    if script in ("tpu_pod.sh", "gke.sh"):
        done = launch(script, CONFIG, **{**complete, "ZONE": None})
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: set ZONE")


def test_a_signal_reaches_all_processes_and_is_waited_for(tmp_path):
    """With programs in the place of Python that end a little after SIGTERM, with a status."""
    fake = tmp_path / "python"
    fake.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, signal, sys, time\n"
        "rank = sys.argv[-1]\n"
        "def end(*_):\n"
        "    time.sleep(0.3)\n"
        f"    pathlib.Path({str(tmp_path)!r}, 'saved' + rank).touch()\n"
        "    sys.exit(int(rank) * 5)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"pathlib.Path({str(tmp_path)!r}, 'began' + rank).touch()\n"
        "print('rank', rank, flush=True)\n"
        "time.sleep(30)\n"
    )
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PROCESSES": "2"}
    process = subprocess.Popen(
        ["bash", str(ROOT / "launch" / "local.sh"), CONFIG],
        env={**environment, "LOGS": str(tmp_path / "logs")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 20
    while len(list(tmp_path.glob("began*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, complained = process.communicate(timeout=20)
    assert process.returncode == 5
    assert {path.name for path in tmp_path.glob("saved*")} == {"saved0", "saved1"}
    assert said == "rank 0\n"
    assert (tmp_path / "logs" / "process-1.log").read_text() == "rank 1\n"
    assert "the other processes' output" in complained
