"""A real run whose TensorBoard file hangs at its opening, or fails at the first row.

`pytest -m slow -s tests/hostile/test_hanging_logs.py` prints the seconds of each.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import pytest

from dmpo_jax.parallel import processes
from dmpo_jax.training.background import CLOSE_SECONDS
from tests.support import launched, tiny
from tests.support.launched import Job

pytestmark = pytest.mark.slow
SECONDS = 1800  # in which the run must open its event file
STEPS: dict[str, Any] = {"log__checkpoint_every": 10**6, "log__validate_every": 0, "log__every": 1}
SAID = {
    "opening": "TensorBoard hangs: the last of it is not written",
    "writing": "TensorBoard failed and is off for the rest of the run",
}
STUCK = """
import sys, time
import dmpo_jax as dj
class Stuck:
    name, every = "a hook", 5
    def __call__(self, state, update):
        time.sleep(600)
dj.train(sys.argv[1], sys.argv[2], hooks=[Stuck()])
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(params=SAID)
def stuck(request, base):
    """A workdir whose event file is a pipe that nobody opens, or one that is written.

    Opening the first hangs. The second cannot be brought to a disk (fsync), which fails.
    """
    workdir = base / f"{request.node.name}"
    folder = workdir / "tensorboard"
    folder.mkdir(parents=True)
    now, held = int(time.time()), []
    for second in range(now, now + SECONDS):  # the name holds the time of its opening
        pipe = folder / f"events.out.tfevents.{second:010d}.{socket.gethostname()}"
        os.mkfifo(pipe)
        if request.param == "writing":
            held.append(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK))
    yield workdir, SAID[request.param]
    for file in held:
        os.close(file)


def test_sigterm_saves_and_ends(made, stuck):
    stuck, warning = stuck
    with Job(made, stuck, count=1, devices=2, train__steps=100_000, **STEPS) as job:
        job.wait_for_step(300)
        began = time.monotonic()
        job.processes[0].send_signal(signal.SIGTERM)
        ((status, said),) = job.end(timeout=300)
    took = time.monotonic() - began
    print(f"SIGTERM: ended after {took:.1f} s")
    assert status == 128 + signal.SIGTERM, said
    assert ", saved; the same command resumes" in said
    assert warning in said
    assert "Traceback" not in said
    assert took < CLOSE_SECONDS + 15
    assert [p.name for p in (stuck / "checkpoints").iterdir() if p.name.isdigit()]


def test_a_run_ends_and_the_watchdog_is_still(made, stuck):
    """Its limit, thrice it at the end, is below what TensorBoard is waited for."""
    stuck, warning = stuck
    leaves: dict[str, Any] = {**STEPS, "train__steps": 1000, "train__hang_limit": 5}
    with Job(made, stuck, count=1, devices=2, **leaves) as job:
        job.wait_for_step(1000)
        began = time.monotonic()
        ((status, said),) = job.end(timeout=300)
    print(f"the end of a run: {time.monotonic() - began:.1f} s")
    assert status == 0, said
    assert warning in said
    assert time.monotonic() - began < CLOSE_SECONDS + 30  # with the export


def test_the_watchdog_ends_a_run_that_hangs_too(made, stuck):
    stuck, _ = stuck
    leaves: dict[str, Any] = {
        **STEPS,
        "train__steps": 1000,
        "train__hang_limit": 5,
        "mesh__cpu_devices": 2,
    }
    config = launched.write_config(stuck.parent / "stuck.py", made, **leaves)
    environment = {
        **os.environ,
        "PYTHONPATH": str(launched.ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(stuck.parent / "cache"),
    }
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", STUCK, config, stuck],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    print(f"the watchdog: {time.monotonic() - began:.1f} s from the start")
    assert done.returncode == processes.RESTART, done.stderr
    assert "what follows update 5 has not come to an end within 15 s" in done.stderr
