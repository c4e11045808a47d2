"""Tests for dmpo_jax/locks.py: one writer a folder."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from dmpo_jax import locks

HOLD = """
import sys, time
from dmpo_jax import locks
with locks.hold(sys.argv[1], "encode"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "out"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def hold(folder):
    with locks.hold(folder, "train"):
        return sorted(p.name for p in folder.iterdir())


def test_a_second_writer_is_refused_by_name_and_changes_nothing(holder, tmp_path):
    before = (tmp_path / "out" / locks.NAME).read_bytes()
    words = rf"out is in use by encode \(process {holder.pid} on .*, since 20.*\): wait for its end"
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            hold(tmp_path / "out")
    assert (tmp_path / "out" / locks.NAME).read_bytes() == before
    holder.communicate("")
    assert hold(tmp_path / "out") == [locks.NAME]
    assert not list((tmp_path / "out").iterdir())


def test_a_killed_writers_folder_is_free_at_once(holder, tmp_path, caplog):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "out" / locks.NAME).exists()
    began = time.monotonic()
    hold(tmp_path / "out")
    assert time.monotonic() - began < 5
    assert f"encode (process {holder.pid}" in caplog.text
    assert "it is taken over" in caplog.text


def test_one_process_may_hold_a_folder_twice(tmp_path):
    with locks.hold(tmp_path, "train"):
        assert hold(tmp_path) == [locks.NAME]
        assert (tmp_path / locks.NAME).exists()  # still held
    assert not (tmp_path / locks.NAME).exists()


def test_an_error_inside_frees_the_folder(tmp_path):
    with pytest.raises(KeyError), locks.hold(tmp_path, "train"):
        raise KeyError
    assert hold(tmp_path) == [locks.NAME]


def of_another_host(folder, beats=0):
    content = {"job": "train", "host": "other", "process": 7, "since": "today", "beats": beats}
    (folder / locks.NAME).write_text(json.dumps(content))


@pytest.mark.parametrize("kind", [locks._Local, locks._Remote])
def test_another_machine_counts_while_its_heart_beats(kind, tmp_path, monkeypatch, caplog):
    """The kernel's lock does not reach it: the file alone tells."""
    monkeypatch.setattr(locks, "_Local", kind)
    monkeypatch.setattr(locks, "DEAD", 1.0)
    of_another_host(tmp_path)
    beating = threading.Timer(0.3, of_another_host, (tmp_path, 1))
    beating.start()
    with pytest.raises(ValueError, match=r"in use by train \(process 7 on other, since today\)"):
        hold(tmp_path)
    beating.join()
    hold(tmp_path)  # it has stopped
    assert "process 7 on other) has ended without releasing its lock" in caplog.text


def test_the_heart_beats_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.05)
    with locks.hold(tmp_path, "train"):
        deadline, beats = time.monotonic() + 10, 0
        while beats < 3 and time.monotonic() < deadline:
            beats = json.loads((tmp_path / locks.NAME).read_text() or "{}").get("beats", 0)
        about = json.loads((tmp_path / locks.NAME).read_text())
    assert beats >= 3
    assert about["process"] == os.getpid()


def test_of_many_at_once_one_wins(tmp_path):
    """Fifty rounds of four threads; each thread has an open file of its own, as processes have."""
    for i in range(50):
        folder, won, lost = epath.Path(tmp_path / str(i)), [], []
        folder.mkdir()
        ready = threading.Barrier(4)

        def claim(folder=folder, won=won, lost=lost, ready=ready):
            ready.wait()
            try:
                won.append(locks._Local(folder / locks.NAME, "train"))
            except ValueError as error:
                lost.append(str(error))

        threads = [threading.Thread(target=claim) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert len(lost) == 3
        won[0].release()
