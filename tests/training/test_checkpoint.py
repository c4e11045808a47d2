"""Tests for dmpo_jax/training/checkpoint.py."""

import gc
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dmpo_jax.errors import UserError
from dmpo_jax.training import checkpoint, checksums
from dmpo_jax.training.verify import verify_checkpoints
from tests.support import launched

IDENTITY = {"objective": {"name": "dmpo", "beta": 2000.0}, "seed": 0, "jobs": ("train",)}


@pytest.fixture(autouse=True)
def _collect_garbage():
    """So that it complains here and not in another module's test."""
    yield
    gc.collect()


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    skipped: Any


def make_state(seed, width=32):
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "down_blocks.0.conv.kernel": jax.random.normal(keys[0], (64, width)),
        "down_blocks.0.conv.bias": jax.random.normal(keys[1], (width,), jnp.bfloat16),
    }
    return State(jnp.int32(seed), params, optax.adamw(1e-3).init(params), jnp.int32(0))


def abstract(state, sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state
    )


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def opened(folder, **kwargs):
    return checkpoint.Checkpoints(folder, **{"keep": 3, "identity": IDENTITY} | kwargs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints 1 and 2; tests break copies of it."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with opened(folder) as checkpoints:
        checkpoints.save(1, make_state(1))
        checkpoints.save(2, make_state(2))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def test_round_trip_keeps_the_newest_and_starts_from_none(tmp_path):
    with opened(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore(abstract(make_state(0))) is None
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step))
        checkpoints.save(3, make_state(3))  # again: no error, no second write
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]
    with opened(tmp_path, keep=2) as checkpoints:
        step, state = checkpoints.restore(abstract(make_state(0)))
        assert step == 3
        assert_same(state, make_state(3))


def test_the_state_may_be_donated_at_once(tmp_path):
    change = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 + 7, s), donate_argnums=0)
    state = State(jnp.int32(1), {"w": jnp.arange(2.0**20)}, (), jnp.int32(0))
    with opened(tmp_path) as checkpoints:
        want = jax.tree.map(np.array, state)
        checkpoints.save(1, state)
        state = change(state)
        assert_same(checkpoints.restore(abstract(state))[1], want)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(bytes(content))


BREAKAGES = {
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "delete": pathlib.Path.unlink,
    "flip": flip,
}


@pytest.mark.long
@pytest.mark.parametrize("breakage", BREAKAGES)
def test_one_broken_file_never_goes_unnoticed(breakage, saved, tmp_path):
    """Every file of the newest checkpoint in turn: its exact values, or those before."""
    files = [f.relative_to(saved) for f in sorted((saved / "2").rglob("*")) if f.is_file()]
    fallen = 0
    for i, file in enumerate(files):
        folder = pathlib.Path(shutil.copytree(saved, tmp_path / str(i)))
        BREAKAGES[breakage](folder / file)
        said = []
        with opened(folder, warn=said.append) as checkpoints:
            step, state = checkpoints.restore(abstract(make_state(0)))
            assert_same(state, make_state(step))
            assert (step == 1) == bool(said), file
            if step == 1:
                fallen += 1
                assert "checkpoint 2 " in said[0]
                assert "checkpoint 1" in said[0]
                assert (folder / "2.corrupt").is_dir()
                assert checkpoints.steps() == [1]
                checkpoints.save(2, make_state(2))  # the step is free again
                checkpoints.wait()
                assert_same(checkpoints.restore(abstract(state))[1], make_state(2))
    assert 3 <= fallen < len(files)  # some files hold nothing that a restore needs


@pytest.mark.long
def test_a_damaged_tree_of_many_arrays_is_one_error(tmp_path, capfd):
    """Each of hundreds of reads fails: all have ended when the first is reported."""
    state = {f"w{i}": jnp.full(8, i) for i in range(400)}
    said = []
    with opened(tmp_path, warn=said.append) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.save(2, state)
    for file in (tmp_path / "2" / "state" / "d").iterdir():
        flip(file)
    assert [bool(fault) for _, fault in verify_checkpoints(tmp_path)] == [False, True]
    with opened(tmp_path, warn=said.append) as checkpoints:
        assert checkpoints.restore(state)[0] == 1
    assert "checkpoint 2 is not valid" in said[0]
    assert "Traceback" not in capfd.readouterr().err


def test_an_emptied_folder_and_a_lost_array_file_are_passed_over(folder):
    shutil.rmtree(folder / "2" / "state")
    (folder / "5").mkdir()
    said = []
    with opened(folder, warn=said.append) as checkpoints:
        assert checkpoints.restore(abstract(make_state(0)))[0] == 1
    assert len(said) == 2
    assert said[0].startswith("checkpoint 5 ")


def test_all_broken_is_an_error_every_time(folder):
    for step in ("1", "2"):
        shutil.rmtree(folder / step / "index")
    for _ in range(2):  # the first refusal must not make the second look like a new run
        with opened(folder) as checkpoints, pytest.raises(UserError, match="no checkpoint in"):
            checkpoints.restore(abstract(make_state(0)))


def test_another_state_is_a_mismatch_and_not_corruption(folder):
    said = []
    with opened(folder, warn=said.append) as checkpoints:
        with pytest.raises(
            ValueError, match=r"kernel.*float32\[64, 32\], the run float32\[64, 4\]"
        ):
            checkpoints.restore(abstract(make_state(0, width=4)))
        other = make_state(0)
        other.params["extra"] = jnp.zeros(3)
        with pytest.raises(ValueError, match=r"extra.*has nothing, the run float32\[3\]"):
            checkpoints.restore(abstract(other))
        with pytest.raises(ValueError, match="sharding on every leaf"):
            checkpoints.restore(jax.eval_shape(lambda: make_state(0)))
        assert checkpoints.steps() == [1, 2]
        assert not said
        assert checkpoints.restore(abstract(make_state(0)))[0] == 2


def test_saved_on_eight_devices_restored_on_one_and_back(tmp_path):
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def shard(x):
        return NamedSharding(
            mesh, PartitionSpec("data", "fsdp") if x.ndim == 2 else PartitionSpec()
        )

    want = make_state(5)
    state = jax.tree.map(lambda x: jax.device_put(x, shard(x)), want)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(5, state)
        one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
        _, single = checkpoints.restore(abstract(want, one))
        assert_same(single, want)
        assert {x.sharding for x in jax.tree.leaves(single)} == {one}
        checkpoints.save(6, single)
        _, back = checkpoints.restore(abstract(state))
        assert_same(back, want)
        assert back.params["down_blocks.0.conv.kernel"].sharding == shard(np.zeros((1, 1)))


def test_another_identity_is_refused_key_by_key(folder):
    other = {"objective": {"name": "dmpo", "beta": 5000.0}, "batch": 8, "jobs": ["train"]}
    with pytest.raises(ValueError, match="another --workdir") as error:
        opened(folder, identity=other)
    message = str(error.value)
    assert "objective.beta: 2000.0 there, 5000.0 now" in message
    assert "batch: '(not set)' there, 8 now" in message
    assert "seed: 0 there" in message
    assert "jobs" not in message
    assert "objective.name" not in message


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool", "float16"])
def test_checksum_sees_one_bit_and_an_exchange(dtype):
    x = np.array(jax.random.bernoulli(jax.random.key(0), 0.5, (6, 5))).astype(jnp.dtype(dtype))
    base = int(checksums.checksum(x))
    for i in range(x.size):
        y = x.copy()
        y.view(np.uint8).reshape(x.size, -1)[i, -1] ^= 1
        assert int(checksums.checksum(y)) != base
    if len(np.unique(x[0])) > 1:
        assert int(checksums.checksum(x[:, ::-1])) != base
    assert int(checksums.checksum(np.zeros((0, 3), x.dtype))) == 0


SAVE_FOREVER = """
import sys, jax.numpy as jnp
from dmpo_jax.training.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=2, identity={})
for step in range(1, 1000):
    checkpoints.save(step, {"w": jnp.full((1 << 22,), step, jnp.float32)})
"""


@pytest.mark.long
def test_a_kill_while_saving_leaves_the_one_before(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, tmp_path / "c"])
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:  # until one is whole and another half-written
            names = [f.name for f in (tmp_path / "c").glob("*")]
            if any(n.isdigit() for n in names) and any("tmp" in n for n in names):
                break
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    said = []
    want = jax.ShapeDtypeStruct(
        (1 << 22,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    with opened(tmp_path / "c", identity={}, warn=said.append) as checkpoints:
        step, state = checkpoints.restore({"w": want})
        assert not said
        assert (np.asarray(state["w"]) == step).all()
    assert not [f for f in (tmp_path / "c").glob("*") if "tmp" in f.name]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one and a half of the checkpoints below."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root, and a system that has it")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk_is_told_soon_and_keeps_the_checkpoint_before(small_disk):
    def state(step):
        noise = np.random.default_rng(step).random(2**19, np.float32)  # does not compress
        return {"w": jnp.asarray(noise)}

    checkpoints = opened(small_disk)
    checkpoints.save(1, state(1))
    checkpoints.wait()
    checkpoints.check()
    checkpoints.save(2, state(2))

    def check_for_a_minute():  # as the loop does after every update
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            checkpoints.check()
            time.sleep(0.01)

    with pytest.raises(checkpoint.SaveError, match=r"The disk is full: .* valid one is 1:"):
        check_for_a_minute()
    with opened(small_disk, read_only=True) as checkpoints:
        step, got = checkpoints.restore(abstract(state(0)))
        assert step == 1
        assert_same(got, state(1))


def test_reading_leaves_what_is_being_written_and_passes_over_what_is_broken(folder, caplog):
    (folder / "3.orbax-checkpoint-tmp").mkdir()  # as of a run that is saving just now
    cut(max((folder / "2" / "state").rglob("d/*"), key=lambda f: f.stat().st_size))
    before = sorted(f.relative_to(folder) for f in folder.rglob("*"))
    said = []
    with opened(folder, read_only=True, warn=said.append) as checkpoints:
        params = {"params": abstract(make_state(0).params)}
        step, got = checkpoints.restore_part(params)
        assert step == 1
        assert_same(got["params"], make_state(1).params)
        assert said[0].startswith("checkpoint 2 is not valid (")
        with pytest.raises(UserError, match=r"is valid \(2: "):
            checkpoints.restore_part(params, step=2)
    assert sorted(f.relative_to(folder) for f in folder.rglob("*")) == before
    assert "read only" not in caplog.text  # Orbax warns of what was asked for
    with pytest.raises(ValueError, match="there are no checkpoints in"):
        opened(folder / "none", read_only=True)


TWO_PROCESSES = """
import sys, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
jax.config.update("jax_num_cpu_devices", 2)
from dmpo_jax.parallel import processes
processes.join()
from dmpo_jax.training.checkpoint import Checkpoints
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec("data"))
def state(step):
    full = np.arange(2.0**16, dtype=np.float32).reshape(4096, 16) * step
    return {"w": jax.make_array_from_callback(full.shape, sharding, lambda index: full[index])}
said = []
with Checkpoints(sys.argv[1], keep=3, identity={}, warn=said.append) as checkpoints:
    if sys.argv[2] == "save":
        for step in (1, 2):
            checkpoints.save(step, state(step))
    else:
        step, got = checkpoints.restore(state(0))
        assert step == 1 and len(said) == 1, (step, said)
        shards = zip(got["w"].addressable_shards, state(1)["w"].addressable_shards, strict=True)
        assert all(np.array_equal(a.data, b.data) for a, b in shards)
        checkpoints.save(2, state(2))
"""


@pytest.mark.long
@pytest.mark.parametrize("breakage", ["flip", "delete"])
def test_two_processes_fall_back_together_when_one_cannot_read(breakage, tmp_path):
    launched.run_script(TWO_PROCESSES, tmp_path, "save")
    files = (tmp_path / "2" / "state" / "ocdbt.process_1" / "d").iterdir()
    BREAKAGES[breakage](max(files, key=lambda f: f.stat().st_size))  # what process 1 wrote
    launched.run_script(TWO_PROCESSES, tmp_path, "restore")
    names = sorted(f.name for f in tmp_path.iterdir())
    assert names == ["1", "2", "2.corrupt", "identity.json"]
