"""Tests for dmpo_jax/parallel/processes.py and training/stopping.py: what needs no training run."""

import os
import socket
import subprocess
import sys

import pytest

from dmpo_jax.parallel import processes
from tests.support import launched

ADDRESS = "10.0.0.1:8476"
FULL = {
    "JAX_COORDINATOR_ADDRESS": ADDRESS,
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "2",
}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


def find(environ, coordinator="", count=0, index=-1):
    return processes.find_peers(coordinator, count, index, environ)


@pytest.fixture
def slurm(monkeypatch):
    """JAX's own detection reads the real environment."""
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    return SLURM


def test_one_process_joins_nobody():
    assert find({}) is None
    assert find({}, count=1) is None
    assert find({**FULL, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None


def test_settings_go_before_the_environment():
    assert find(FULL) == (ADDRESS, 4, 2, "as set")
    assert find({}, ADDRESS, 4, 2) == (ADDRESS, 4, 2, "as set")
    assert find(FULL, "other:1", 8, 5) == ("other:1", 8, 5, "as set")


def test_a_cluster_says_what_is_not_set(slurm, monkeypatch):
    assert find(os.environ) == (None, 2, None, "Slurm")
    assert find(os.environ, coordinator=ADDRESS) == (ADDRESS, 2, None, "Slurm")
    assert find(os.environ, count=1) is None  # one of many that is to run by itself
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert find(os.environ) is None


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("JAX_COORDINATOR_ADDRESS", "distributed.coordinator"),
        ("JAX_NUM_PROCESSES", "distributed.processes"),
        ("JAX_PROCESS_ID", "distributed.process_id"),
    ],
)
def test_half_a_setting_is_refused(missing, words):
    environ = {name: value for name, value in FULL.items() if name != missing}
    with pytest.raises(ValueError, match=rf"but {words} \({missing}\) is not"):
        find(environ)


def test_settings_that_cannot_be(slurm):
    with pytest.raises(ValueError, match="must be HOST:PORT, but got 'node3'"):
        find(FULL, coordinator="node3")
    with pytest.raises(ValueError, match="below the number of processes, 4, but got 4"):
        find(FULL, index=4)
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES must be a whole number, but got 'x'"):
        find({**FULL, "JAX_NUM_PROCESSES": "x"})


def test_a_task_alone_on_its_node_takes_every_gpu():
    gpus = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert processes.local_devices({**gpus, "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}) == [0, 1, 2, 3]
    assert processes.local_devices({**gpus, "SLURM_STEP_TASKS_PER_NODE": "1"}) == [0, 1, 2, 3]
    assert processes.local_devices({**gpus, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}) is None
    assert processes.local_devices({**gpus, "SLURM_STEP_TASKS_PER_NODE": "16"}) is None
    assert processes.local_devices(gpus) is None


WATCHED = """
import time
from dmpo_jax.training import stopping

with stopping.Watchdog(0):  # no limit
    time.sleep(0.2)
with stopping.Watchdog(0.1):
    pass
time.sleep(0.5)  # training has ended: nothing is watched
with stopping.Watchdog(1) as watchdog:
    time.sleep(1.5)  # the first update may compile: thrice as long
    for i in range(2, 17):
        watchdog.alive(f"update {i}")
        time.sleep(0.1)
    watchdog.alive("a checkpoint", slow=True)
    time.sleep(1.5)
    print("spared", flush=True)
    watchdog.alive("update 17")
    time.sleep(60)
"""


@pytest.mark.long
def test_the_watchdog_ends_what_hangs_and_spares_what_moves():
    run = subprocess.run(
        [sys.executable, "-c", WATCHED],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(launched.ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.stdout == "spared\n", run.stderr
    assert run.returncode == processes.RESTART
    assert "update 17 has not come to an end within 1 s (train.hang_limit)" in run.stderr
    assert 'File "<string>", line 19 in <module>' in run.stderr  # where it stands


JOIN = """
import sys
from dmpo_jax.parallel import processes
processes.join(coordinator=sys.argv[1], processes=2, process_id=int(sys.argv[2]), join_limit=2)
"""


@pytest.mark.parametrize(
    ("index", "words"),
    [(0, "not all of the 2 processes have come to"), (1, "process 0 does not answer at")],
)
def test_who_waits_in_vain_is_told_so(index, words):
    address = f"127.0.0.1:{launched.free_port()}"
    run = subprocess.run(
        [sys.executable, "-c", JOIN, address, str(index)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(launched.ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == processes.RESTART, run.stderr
    assert f"{words} {address} within 2 s (distributed.join_limit)" in run.stderr


def test_a_port_in_use_is_said(capsys):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as ended:
            processes.join(coordinator=f"127.0.0.1:{port}", processes=2, process_id=0)
    assert ended.value.code == processes.RESTART
    said = capsys.readouterr().err
    assert f"cannot listen on port {port} of distributed.coordinator: Address already in" in said


def test_messages_cannot_write_to_the_terminal(capsys):
    with pytest.raises(SystemExit):
        processes.end(1, "no file \x1b]0;owned\x07\r\x9b2J\u202e.png,\n\tnaïve 猫")
    said = capsys.readouterr().err
    assert said == r"no file \x1b]0;owned\x07\r\x9b2J\u202e.png," + "\n\tnaïve 猫\n"


FAIL = """
import sys, jax
from dmpo_jax.parallel import processes
jax.config.update("jax_num_cpu_devices", 1)
processes.join()
if jax.process_index() == 1:
    processes.end(1, "the disk of process 1 is full")
processes.barrier("which process 1 never comes to")
"""


@pytest.mark.long
def test_all_end_with_the_words_and_status_of_the_first_that_fails():
    first, _ = launched.run_script(FAIL, statuses=[1, 1])
    assert "process 1 has failed, so this one ends: the disk of process 1 is full" in first.errors


LOST = """
import os, sys, time, jax
from jax.experimental import multihost_utils
from dmpo_jax.parallel import processes
jax.config.update("jax_num_cpu_devices", 1)
processes.join()
processes.barrier("both are here")
processes.ANSWER = 3
if sys.argv[1] == "gone" and jax.process_index() == 1:
    os._exit(9)
if sys.argv[1] == "alone" and jax.process_index() == 1:
    processes.barrier("process 0 has said it")
    os._exit(0)
try:
    if sys.argv[1] == "gone":
        for i in range(100):
            processes.barrier(f"which process 1 never comes to {i}")
    if sys.argv[1] == "both":
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug, which both have")
    raise ValueError("the model folder '/nccl/gloo/heartbeat' is not complete")
except Exception as error:
    print(processes.is_lost_peer(error), flush=True)
    if sys.argv[1] != "gone":
        processes.barrier("process 0 has said it")
        time.sleep(2 * (jax.process_index() == 0))  # the store ends with process 0
    os._exit(0)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("what", "lost"), [("gone", "True"), ("both", "False"), ("alone", "False")]
)
def test_a_process_that_does_not_answer_is_lost(what, lost):
    first, _ = launched.run_script(LOST, what, statuses=[0, 9] if what == "gone" else [0, 0])
    assert first.output.splitlines()[-1] == lost
