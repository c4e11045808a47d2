"""Every command, killed at random, on a full disk, and beside another that writes the same folder.

`pytest -m slow -s tests/hostile/test_every_job.py` prints what was seen. A run of it takes half an
hour.
"""

import collections
import functools
import itertools
import os
import pathlib
import random
import signal
import subprocess
import time

import pytest

from dmpo_jax import locks
from tests.support.every_job import JOBS, contents, make_given
from tests.support.forked import Forked

pytestmark = pytest.mark.slow
KILLS, FILLS, TRIALS = 15, 20, 50  # of each job


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return make_given(tmp_path_factory.mktemp("every_job"))


@pytest.fixture(scope="module")
def forked(given, tmp_path_factory):
    with Forked(tmp_path_factory.mktemp("said"), given.environment()) as forked:
        yield forked


@pytest.fixture(scope="module")
def start(given, forked):
    """(job, out) -> the job, running."""

    def start(job, out):
        name, *flags = given.command(job, out)
        return forked.start(name, flags)

    return start


@pytest.fixture(scope="module")
def finish(start):
    def finish(job, out):
        status, said = start(job, out).end()
        assert status == 0, said

    return finish


@pytest.fixture(scope="module")
def whole(finish, tmp_path_factory):
    """job -> (the folder of an unbroken run, its seconds)."""

    @functools.cache
    def of(job):
        folder = tmp_path_factory.mktemp(f"whole_{job}")
        finish(job, folder / "first")  # fills the compilation cache
        began = time.monotonic()
        finish(job, folder / "out")
        return folder / "out", time.monotonic() - began

    return of


@pytest.mark.parametrize("job", JOBS)
def test_a_killed_job_ends_with_the_same_bytes(job, start, finish, whole, tmp_path):
    """Three kills in a row before each rerun, at moments of the whole run's time."""
    want, seconds = whole(job)
    draw, killed = random.Random(job), 0
    for rerun in itertools.count():
        out = tmp_path / str(rerun)
        for _ in range(3):
            killed += start(job, out).kill_after(draw.uniform(0, 1) * seconds)
        finish(job, out)
        assert contents(out) == contents(want)
        if killed >= KILLS:
            break
    print(f"{job}: {killed} kills, {rerun + 1} reruns, the same bytes each time")


@pytest.fixture
def disk(tmp_path):
    """size in kB -> a file system of that size, larger at each call."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def sized(kilobytes: int):
        option = "remount," if os.path.ismount(folder) else ""
        mount = ["mount", "-t", "tmpfs", "-o", f"{option}size={kilobytes}k", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a small tmpfs needs root, and a system that has it")
        return folder

    yield sized
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


@pytest.mark.parametrize("job", JOBS)
def test_a_full_disk_is_named_and_room_is_all_it_takes(job, start, finish, whole, disk):
    want, seconds = whole(job)
    needed = sum(f.stat().st_blocks for f in want.rglob("*")) // 2  # kB
    said_by, slowest = {}, 0.0
    for k in range(1, FILLS + 1):
        folder = disk(max(4, needed * k // FILLS))
        out = folder / "out"
        began = time.monotonic()
        status, said = start(job, out).end()
        slowest = max(slowest, time.monotonic() - began)
        if status == 0:
            break
        assert "Traceback" not in said, said
        assert str(folder) in said, said
        assert "No space left" in said or "disk is full" in said, said
        said_by[k] = status
    finish(job, disk(64 * needed) / "out")
    assert contents(out) == contents(want)
    assert said_by
    assert slowest < seconds + 60
    print(f"{job}: full at {len(said_by)} levels of {FILLS}, {slowest:.0f} s at most")


@pytest.mark.parametrize("first", JOBS)
def test_second_writers_are_refused_and_change_nothing(first, start, whole, tmp_path):
    """Every other command tries, at many moments of the first one's runs.

    A TFDS build holds the folder of its data set alone: others may lie beside it. A second build
    takes a whole data set as it is, even before the first has given its lock back.
    """
    want, seconds = whole(first)
    draw, moments, refused = random.Random(first), 0, collections.Counter()
    for run in itertools.count():
        out = tmp_path / str(run)
        folder = out / "preference_pairs" / "x" if first == "tfds" else out
        running = start(first, out)
        while moments < TRIALS and held(running.pid, folder / locks.NAME):
            for other in [first] if first == "tfds" else JOBS[:-1]:
                status, said = start(other, out).end()
                if first == "tfds" and "Reusing dataset" in said:
                    assert status == 0, said
                    refused["(taken whole)"] += 1
                    continue
                assert status == 1, said
                assert f"{folder} is in use by {first}" in said
                assert f"(process {running.pid} " in said
                assert "Traceback" not in said
                refused[other] += 1
            moments += 1
            os.kill(running.pid, signal.SIGCONT)
            time.sleep(draw.uniform(0, 2 * seconds / TRIALS))
        os.kill(running.pid, signal.SIGCONT)
        status, said = running.end()
        assert status == 0, said
        assert contents(out) == contents(want)
        if moments == TRIALS:
            break
    print(f"{first}: at {moments} moments of {run + 1} runs refused {dict(refused)}")


def held(pid, lock) -> bool:
    """Waits for a job's lock and stops the job; False if it has ended, or given the lock back."""
    state = pathlib.Path(f"/proc/{pid}/stat")
    while state.read_text().rpartition(")")[2].split()[0] != "Z":
        if lock.exists():
            os.kill(pid, signal.SIGSTOP)
            return lock.exists()
        time.sleep(0.01)
    return False
