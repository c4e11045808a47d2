"""launch/train.py as one or several real processes on this machine, over a tiny pipeline."""

import os
import pathlib
import socket
import subprocess
import sys
import time
from typing import NamedTuple

from dmpo_jax.config import configs
from tests.support import tiny

ROOT = pathlib.Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def write_config(file: pathlib.Path, made: tuple[str, str], **leaves) -> pathlib.Path:
    """A config file over the tiny model and pairs; `leaves` as in tiny.make_config."""
    plain = configs.flatten(configs.defaults())
    flat = configs.flatten(tiny.make_config(*made, **leaves))
    changed = {k: v for k, v in flat.items() if v is not None and v != plain.get(k)}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        "from dmpo_jax import config, families\n"
        "from tests.support import outside_family\n"
        "families.register(outside_family.FAMILY)\n"
        "def get_config():\n"
        "    plain = config.flatten(config.defaults())\n"
        f"    return config.from_flat({{**plain, **{changed!r}}})\n"
    )
    return file


def identity(port: int, index: int, count: int) -> dict[str, str]:
    """The environment that makes a process one of `count`."""
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
    }


class Ended(NamedTuple):
    """The end of a process: `status` as subprocess gives it, output and errors."""

    status: int
    output: str
    errors: str


def run_script(
    script: str, *arguments, count: int = 2, timeout: float = 180, statuses=None
) -> list[Ended]:
    """Runs a Python script as `count` processes that `processes.join()` makes one job.

    Asserts that each ends with its number of `statuses`; by default all with 0.
    """
    port = free_port()
    shared = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            env={**shared, **identity(port, i, count)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    try:
        said = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    ended = [Ended(p.returncode, *words) for p, words in zip(running, said, strict=True)]
    assert [one.status for one in ended] == (statuses or [0] * count), ended
    return ended


class Job:
    """`count` processes of one launch line. A context manager, which leaves none behind.

    devices: in all, shared evenly. environment: of each, beside what tells them apart.
    """

    def __init__(
        self,
        made,
        workdir,
        *,
        count: int,
        devices: int,
        flags: tuple[str, ...] = (),
        environment: dict | None = None,
        **leaves,
    ):
        self.workdir = workdir
        leaves = {"mesh__cpu_devices": devices // count, **leaves}
        file = write_config(workdir.parent / f"config_{count}.py", made, **leaves)
        port = free_port()
        self.processes = []
        for i in range(count):
            self.processes.append(
                subprocess.Popen(
                    [
                        sys.executable,
                        "launch/train.py",
                        f"--config={file}",
                        f"--workdir={workdir}",
                        *flags,
                    ],
                    cwd=ROOT,
                    env={
                        **os.environ,
                        "PYTHONPATH": str(ROOT),
                        "JAX_PLATFORMS": "cpu",
                        # One for each number of devices: XLA's programs for CPUs are of a kind.
                        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache"),
                        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                        **(identity(port, i, count) if count > 1 else {}),
                        **(environment or {}),
                    },
                    start_new_session=True,  # what stops one must not end the tests
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *exception) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()  # also closes the pipe, which a process never read keeps open

    def wait_for_step(self, step: int, timeout: float = 1200) -> None:
        deadline = time.monotonic() + timeout
        metrics = self.workdir / "metrics.jsonl"
        while time.monotonic() < deadline and all(p.poll() is None for p in self.processes):
            if metrics.exists() and f'"step": {step},' in metrics.read_text():
                return
            time.sleep(0.01)
        raise AssertionError(f"step {step} was not reached: {self.end(1)}")

    def end(self, timeout: float = 1200) -> list[tuple[int, str]]:
        """(status, output) of each process, as shells give it: 128 + the signal."""
        found = []
        for process in self.processes:
            try:
                said = process.communicate(timeout=timeout)[0]
            except subprocess.TimeoutExpired:
                process.kill()
                said = process.communicate()[0] + "\n(killed by the test)"
            code = process.returncode
            found.append((code if code >= 0 else 128 - code, said))
        return found
