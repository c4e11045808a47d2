"""Every command, killed at random, on a full disk, and beside another that writes the same folder.

`pytest -m slow -s tests/hostile/test_every_job.py` prints what was seen. A run of it takes half an
hour.
"""

import functools
import os
import random
import signal
import subprocess
import time

import pytest

from dmpo_jax import locks
from tests.support.every_job import JOBS, contents, make_given

pytestmark = pytest.mark.slow
KILLS, FILLS = 15, 20  # of each job


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
def test_a_second_writer_is_refused_and_changes_nothing(first, given, whole, tmp_path):
    """Every other command tries while the first one runs."""
    out, refused = tmp_path / "out", 0
    others = [job for job in JOBS if job != "tfds"]
    with given.start(first, out) as process:
        while not (out / locks.NAME).exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)  # it holds the folder all the while
        for other in others:
            second = given.start(other, out)
            said = second.communicate(timeout=300)[0]
            assert second.returncode == 1, said
            assert f"{out} is in use by {first} (process {process.pid} " in said
            assert "Traceback" not in said
            refused += 1
        process.send_signal(signal.SIGCONT)
        said = process.communicate(timeout=600)[0]
    assert process.returncode == 0, said
    assert contents(out) == contents(whole(first)[0])
    print(f"{first}: {refused} other writers refused")
