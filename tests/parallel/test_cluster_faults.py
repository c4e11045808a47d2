"""Faults on real processes: training by launch/train.py, on one process or two on this machine.

Every run is of the same tiny model over two devices in all, so that runs on the same mesh are
compared bit for bit, and one process with two with a bound on rounding.
"""

import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from dmpo_jax import diffusers_io
from dmpo_jax.errors import INTERRUPTED
from dmpo_jax.parallel import processes
from tests.support import tiny
from tests.support.launched import Job, run_script

LONG = {"train__steps": 40, "log__checkpoint_every": 10, "log__validate_every": 0}
HEARTBEAT = 10  # s; JAX's own default is 100


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Where runs lie side by side, with one compilation cache."""
    return tmp_path_factory.mktemp("runs")


def run(made, workdir, count, **leaves):
    """A run to its end; status 0 on every process."""
    with Job(made, workdir, count=count, devices=2, **leaves) as job:
        ended = job.end()
    assert [status for status, _ in ended] == [0] * count, ended
    return [said for _, said in ended]


@pytest.fixture(scope="module")
def uninterrupted(made, base):
    """(on one process, on two) of the same config."""
    for count in (1, 2):
        run(made, base / f"whole_{count}", count, **LONG)
    return base / "whole_1", base / "whole_2"


def weights(workdir) -> dict[str, np.ndarray]:
    return diffusers_io.state_dict(diffusers_io.load_unet(workdir / "export"))


def losses(workdir) -> dict[int, float]:
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows}


def assert_same(workdir, other):
    """Bit for bit, and no step of the metrics lost or there twice."""
    ours, theirs = weights(workdir), weights(other)
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert losses(workdir) == losses(other)
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == LONG["train__steps"]


def assert_close(workdir, other):
    """The same data and noise: losses apart by rounding, which AdamW lets grow with the steps."""
    ours, theirs = losses(workdir), losses(other)
    assert list(ours) == list(theirs)
    early = [step for step in ours if step <= 5]
    np.testing.assert_allclose([ours[s] for s in early], [theirs[s] for s in early], rtol=1e-4)
    # Another order of the data, or other noise, changes single losses by a third and more.
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=0.05)


def checkpoints(workdir) -> list[int]:
    """Steps of the committed checkpoints: a kill may leave one that is not."""
    folders = (p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    return sorted(int(p.name) for p in folders if (p / "commit_success.txt").exists())


@pytest.mark.slow
def test_two_processes_are_one_to_rounding(uninterrupted):
    one, two = uninterrupted
    assert_close(two, one)


def wait_for_checkpoint(workdir, after: int, limit: float = 120) -> None:
    """A checkpoint is committed in the background, some steps after its own."""
    end = time.monotonic() + limit
    while not (found := checkpoints(workdir)) or found[-1] <= after:
        assert time.monotonic() < end, found
        time.sleep(0.1)


def damage_newest(workdir) -> int:
    """Flips a bit in the newest checkpoint's tree of arrays, which every read passes; its step.

    The files of single processes also hold what they replaced, which nothing reads any more.
    """
    newest = checkpoints(workdir)[-1]
    files = list((workdir / "checkpoints" / str(newest) / "state" / "d").iterdir())
    largest = max(files, key=lambda f: f.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 16
    largest.write_bytes(bytes(content))
    return newest


@pytest.mark.slow
def test_faults_in_turn_leave_the_run_as_if_there_were_none(made, base, uninterrupted):
    """SIGTERM to one of two, SIGKILL to the other and to the coordinator, a damaged checkpoint."""
    workdir = base / "faults"
    leaves = {**LONG, "distributed__heartbeat": HEARTBEAT}
    with Job(made, workdir, count=2, devices=2, **leaves) as job:
        job.wait_for_step(3)
        job.processes[1].send_signal(signal.SIGTERM)
        ended = job.end()
    assert [status for status, _ in ended] == [143, 143], ended
    (kept,) = checkpoints(workdir)
    assert f"stopped at step {kept}, saved" in ended[0][1]
    for killed in (1, 0):
        with Job(made, workdir, count=2, devices=2, **leaves) as job:
            job.wait_for_step(kept + 12)
            wait_for_checkpoint(workdir, after=kept)
            began = time.monotonic()
            job.processes[killed].kill()
            status, said = job.end(timeout=300)[1 - killed]
        took = time.monotonic() - began
        print(f"process {killed} killed: the other ended after {took:.1f} s, status {status}")
        # Ours, or JAX's own abort, whichever notices first.
        assert status in (processes.RESTART, 128 + signal.SIGABRT), said
        assert took < 6 * HEARTBEAT  # 2 at most on a machine that is not busy
        if killed == 1:
            assert f"resuming from step {kept}" in said  # process 0 says so
        assert checkpoints(workdir)[-1] > kept
        kept = checkpoints(workdir)[-1]
    damaged = damage_newest(workdir)
    before = checkpoints(workdir)[-2]
    said = run(made, workdir, 2, **leaves)
    assert f"checkpoint {damaged} is not valid" in said[0]
    assert "Traceback" not in "".join(said)
    assert f"resuming from step {before}" in said[0]
    assert_same(workdir, uninterrupted[1])


@pytest.mark.slow
def test_one_process_after_two_and_the_reverse(made, base, uninterrupted):
    workdir = base / "numbers"
    for count in (1, 2):
        done = max(checkpoints(workdir)) if (workdir / "checkpoints").exists() else 0
        with Job(made, workdir, count=count, devices=2, **LONG) as job:
            job.wait_for_step(done + 3)
            job.processes[0].send_signal(signal.SIGTERM)
            ended = job.end()
        assert [status for status, _ in ended] == [143] * count, ended
        assert not done or f"resuming from step {done}" in ended[0][1]
    said = run(made, workdir, 1, **LONG)
    assert "resuming from step" in said[0]
    assert_close(workdir, uninterrupted[0])


@pytest.fixture
def small_disk(base):
    """A file system of one checkpoint and a half."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    folder = base / "small"
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this system mounts no tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(count, made, small_disk):
    workdir = small_disk / "run"
    leaves = {**LONG, "log__tensorboard": False, "log__keep": 50, "log__checkpoint_every": 5}
    cache = {"JAX_COMPILATION_CACHE_DIR": str(small_disk.parent / "cache")}
    with Job(made, workdir, count=count, devices=2, environment=cache, **leaves) as job:
        ended = job.end()
    assert [status for status, _ in ended] == [1] * count, ended
    said = "".join(said for _, said in ended)
    assert "The disk is full: make room" in said
    assert "Traceback" not in said
    kept = checkpoints(workdir)
    assert kept
    if count == 1:
        shutil.rmtree(workdir / "checkpoints" / str(kept[0]))  # room
        with Job(made, workdir, count=count, devices=2, environment=cache, **leaves) as job:
            ended = job.end()
        assert f"resuming from step {kept[-1]}" in ended[0][1]


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_job(made, base):
    """SIGSTOP: no error, no end of a connection, just silence. The limit, thrice it where
    something may compile, is below the heartbeat's 100 s, at which JAX itself ends all."""
    workdir = base / "stopped"
    leaves = {**LONG, "train__steps": 100_000, "train__hang_limit": 30}
    with Job(made, workdir, count=2, devices=2, **leaves) as job:
        job.wait_for_step(15)
        began = time.monotonic()
        job.processes[1].send_signal(signal.SIGSTOP)
        said = job.processes[0].communicate(timeout=300)[0]
        status = job.processes[0].returncode
    print(f"process 1 stopped: process 0 ended after {time.monotonic() - began:.1f} s")
    assert status == processes.RESTART, said
    assert "(train.hang_limit): a process or a disk hangs" in said


GRADIENTS = """
import pathlib, sys
import jax, jax.numpy as jnp, numpy as np, optax
jax.config.update("jax_num_cpu_devices", int(sys.argv[4]))
from dmpo_jax.parallel import meshes, processes
from dmpo_jax.diffusers_io import placement
from dmpo_jax.jobs import train
from tests.support import tiny
processes.join()
meshes.SHARDED_FROM = 64  # or nothing of so small a model would be
config = tiny.make_config(sys.argv[1], sys.argv[2], mesh__fsdp=int(sys.argv[5]))
run, params = train.prepare(config, pathlib.Path("."))
keep = optax.GradientTransformation(  # for its state
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
)
built = run.step._replace(setup=run.step.setup._replace(tx=keep))
run = run._replace(step=built)
state = built.make_state(params)
# Also away from the reference, where rounding counts more: u is no longer small.
away = jax.jit(lambda s: (s.step + 0, {k: 1.01 * v for k, v in s.params.items()}))(state)
update = built.make_update(state)
batch = meshes.shard_batch(next(run.batches()), built.batch_sharding(), config.train.batch_size)
found = {}
for place in ("start", "moved"):
    state, _ = update(state, built.reference, batch, run.key)
    found |= {f"{place} {k}": placement.gather(v) for k, v in state.opt_state.items()}
    state = state._replace(step=away[0], params=away[1])
if jax.process_index() == 0:
    np.savez(sys.argv[3], **found)
"""


def gradients(made, out, count: int, devices: int, fsdp: int) -> dict[str, np.ndarray]:
    """One gradient at one state, by `count` processes of as many devices each."""
    run_script(GRADIENTS, *made, out, devices, fsdp, count=count, timeout=1200)
    return dict(np.load(out))


@pytest.mark.slow
def test_gradients_are_the_same_on_one_device_and_on_two_processes_of_four(made, tmp_path):
    alone = gradients(made, tmp_path / "1.npz", 1, 1, 1)
    for fsdp in (1, 8):
        shared = gradients(made, tmp_path / f"{fsdp}_2x4.npz", 2, 4, fsdp)
        assert set(shared) == set(alone)
        for place, bound in {"start": 1e-5, "moved": 3e-4}.items():  # as in test_step.py
            names = [name for name in alone if name.startswith(place)]
            scale = np.sqrt(sum(np.square(alone[k]).sum() for k in names))
            apart = np.sqrt(sum(np.square(shared[k] - alone[k]).sum() for k in names))
            print(f"2 processes x 4 devices, fsdp {fsdp}, {place}: {apart / scale:.1e}")
            assert scale > 0
            assert apart < bound * scale


@pytest.mark.slow
def test_an_alarm_stops_both_processes_at_one_update(made, base):
    leaves = {
        **LONG,
        "train__steps": 60,
        "reference__decay": 1.0,  # the reference never moves: an alarm at update 50
        "optimizer__learning_rate": 1e-5,
        "train__stop_on_alarm": True,
    }
    workdir = base / "alarm"
    with Job(made, workdir, count=2, devices=2, **leaves) as job:
        ended = job.end()
    assert [status for status, _ in ended] == [INTERRUPTED] * 2, ended
    assert "alarm reference at update 50" in ended[0][1]
    assert checkpoints(workdir)[-1] == 51
    run(made, workdir, 2, **leaves)
    assert sorted(losses(workdir)) == list(range(1, 61))
