"""Every command, killed at random, on a full disk, and beside another that writes the same folder.

`pytest -m slow -s tests/hostile/test_every_job.py` prints what was seen. A run of it takes half an
hour.
"""

import collections
import functools
import itertools
import os
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
def whole(given, tmp_path_factory):
    """job -> (the folder of an unbroken run, its seconds)."""

    @functools.cache
    def of(job):
        folder = tmp_path_factory.mktemp(f"whole_{job}")
        given.start(job, folder / "first").communicate()  # fills the compilation cache
        began = time.monotonic()
        process = given.start(job, folder / "out")
        said = process.communicate()[0]
        assert process.returncode == 0, said
        return folder / "out", time.monotonic() - began

    return of


def finish(given, job, out) -> str:
    process = given.start(job, out)
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 0, said
    return said


@pytest.mark.parametrize("job", JOBS)
def test_a_killed_job_ends_with_the_same_bytes(job, given, whole, tmp_path):
    """Three kills in a row before each rerun, at moments of the whole run's time."""
    want, seconds = whole(job)
    draw, killed = random.Random(job), 0
    for i in range(KILLS // 3):
        out = tmp_path / str(i)
        for _ in range(3):
            with given.start(job, out, start_new_session=True) as process:
                try:
                    process.wait(draw.uniform(0.2, 1.0) * seconds)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    killed += 1
        finish(given, job, out)
        assert contents(out) == contents(want)
    print(f"{job}: {killed} kills, {KILLS // 3} reruns, the same bytes each time")
    assert killed >= KILLS // 3


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
def test_a_full_disk_is_named_and_room_is_all_it_takes(job, given, whole, disk, tmp_path):
    want, seconds = whole(job)
    needed = sum(f.stat().st_blocks for f in want.rglob("*")) // 2  # kB
    said_by, slowest = {}, 0.0
    for k in range(1, FILLS + 1):
        folder = disk(max(4, needed * k // FILLS))
        out = folder / "out"
        began = time.monotonic()
        process = given.start(job, out)
        said = process.communicate(timeout=600)[0]
        slowest = max(slowest, time.monotonic() - began)
        if process.returncode == 0:
            break
        assert "Traceback" not in said, said
        assert str(folder) in said, said
        assert "No space left" in said or "disk is full" in said, said
        said_by[k] = process.returncode
    finish(given, job, disk(64 * needed) / "out")
    assert contents(out) == contents(want)
    assert said_by
    assert slowest < seconds + 60
    print(f"{job}: full at {len(said_by)} levels of {FILLS}, {slowest:.0f} s at most")


@pytest.mark.parametrize("first", [job for job in JOBS if job != "tfds"])
def test_second_writers_are_refused_and_change_nothing(first, given, whole, tmp_path):
    """Every other command tries, at many moments of the first one's runs."""
    _, seconds = whole(first)
    draw, moments, refused = random.Random(first), 0, collections.Counter()
    with Forked(tmp_path) as forked:
        for run in itertools.count():
            out = tmp_path / str(run)
            with given.start(first, out) as process:
                while held(process, out / locks.NAME) and moments < TRIALS:
                    for other in JOBS[:-1]:
                        status, said = forked.run(given.command(other, out))
                        assert status == 1, said
                        assert f"{out} is in use by {first} (process {process.pid} " in said
                        assert "Traceback" not in said
                        refused[other] += 1
                    moments += 1
                    process.send_signal(signal.SIGCONT)
                    time.sleep(draw.uniform(0, 2 * seconds / TRIALS))
                process.send_signal(signal.SIGCONT)
                said = process.communicate(timeout=600)[0]
            assert process.returncode == 0, said
            assert contents(out) == contents(whole(first)[0])
            if moments == TRIALS:
                break
    print(f"{first}: at {moments} moments of {run + 1} runs refused {dict(refused)}")


def test_a_second_build_is_refused_and_changes_nothing(given, whole, tmp_path):
    """TFDS's folder is of a data set, not of all that lie beside it."""
    out = tmp_path / "out"
    folder = out / "preference_pairs" / "x"
    with given.start("tfds", out) as process:
        assert held(process, folder / locks.NAME)
        said = given.start("tfds", out).communicate(timeout=300)[0]
        assert f"{folder} is in use by tfds build (process {process.pid} " in said
        assert "Traceback" not in said
        process.send_signal(signal.SIGCONT)
        said = process.communicate(timeout=600)[0]
    assert process.returncode == 0, said
    assert contents(out) == contents(whole("tfds")[0])


def held(process, lock) -> bool:
    """Waits for a job's lock and stops the job; False if it has ended, or gives the lock back."""
    while process.poll() is None:
        if lock.exists():
            process.send_signal(signal.SIGSTOP)
            return lock.exists()
        time.sleep(0.01)
    return False
