"""Plans of tiny steps: on fake devices always, by the TPU compiler where it is installed."""

import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from dmpo_jax.config import leaves as configs
from dmpo_jax.config.files import load_config
from dmpo_jax.families import PUBLISHED
from dmpo_jax.jobs import train
from dmpo_jax.parallel import mesh as meshes
from dmpo_jax.planning import chips, compiled
from dmpo_jax.planning import report as plan_report
from dmpo_jax.planning.plan import check_topology, open_devices, plan
from dmpo_jax.planning.planned_step import load_model, make_planned
from dmpo_jax.planning.report import Memory, Parts
from tests.support import full_size, tiny

ROOT = epath.Path(__file__).parents[2]
GB = 10**9


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("plan"))


@pytest.fixture
def config(folders):
    return tiny.make_config(*folders, mesh__fsdp=2, mesh__data=-1, train__batch_size=16)


def test_the_step_is_the_one_that_training_compiles(config, tmp_path):
    """The same program, to the letter, from shapes alone."""
    run, params = train.prepare(config, epath.Path(tmp_path))
    state = train.abstract_state(run, params)
    planned = make_planned(config, load_model(config), jax.devices())
    shardings = jax.tree.map(lambda x: x.sharding, state)
    update = train.step.jit_train_step(run.setup, shardings)
    arguments = (state, run.reference, planned.arguments[2], run.key)
    assert compiled.identity(config, run.setup, arguments, run.devices) == compiled.identity(
        config, planned.setup, planned.arguments, planned.devices
    )
    ours, theirs = planned.update.lower(*planned.arguments), update.lower(*arguments)
    assert ours.as_text() == theirs.as_text()


def test_the_batch_is_the_one_that_the_pipeline_makes(config, tmp_path):
    run, _ = train.prepare(config, epath.Path(tmp_path))
    real = next(train.make_batches(run, 0))
    planned = make_planned(config, load_model(config), jax.devices()).arguments[2]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), planned) == jax.tree.map(
        lambda x: (x.shape, x.dtype), real
    )
    with_assumed = load_model(config)
    assumed = make_meta_without_data(config)
    assert assumed["shapes"]["moments"] == with_assumed.meta["shapes"]["moments"]


def make_meta_without_data(config):
    with config.unlocked():
        config.data.encoded = ""
    return load_model(config).meta


def test_a_plan_and_its_cache(quick_steps, config, tmp_path, monkeypatch):
    """Memory, FLOPs and collectives are there; the second time nothing is compiled."""
    made = plan(config, ["cpu:8"], cache=tmp_path / "cache", out=tmp_path / "plan.json")
    (one,) = made
    assert one["chips"] == 8
    assert one["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
    assert one["memory"]["total"] > one["memory"]["arguments"] > 0
    assert one["memory"]["fits"] is None  # a CPU's memory is not known
    assert one["flops"]["chip_executed"] == pytest.approx(one["flops"]["chip"], rel=0.1)
    assert {row["moves"] for row in one["collectives"]} >= {"scalars"}
    assert json.loads((tmp_path / "plan.json").read_text()) == json.loads(json.dumps(made))
    text = plan_report.printed(made)
    assert "cpu:8" in text
    assert "A model, not a measurement" in text
    monkeypatch.setattr("dmpo_jax.planning.plan.plan_one", None)
    assert plan(config, ["cpu:8"], cache=tmp_path / "cache") == json.loads(json.dumps(made))


def test_a_saved_step_trains(quick_steps, config, tmp_path):
    """A run that loads its step does what one that compiles it does; another is refused."""
    file = tmp_path / "step.compiled"
    plan(config, ["cpu:8"], save=file, cache=tmp_path / "cache")
    run, params = train.prepare(config, epath.Path(tmp_path))
    batch = train.mesh.shard_batch(
        next(train.make_batches(run, 0)), train.mesh.batch_sharding(run.devices), 16
    )
    results = []
    for path in ("", str(file)):
        config.train.compiled = path
        state = train.make_state(run, jax.tree.map(jnp.copy, params))
        update = train.make_update(run._replace(config=config), state)
        results.append(update(state, run.reference, batch, run.key))
    for a, b in zip(*(jax.tree.leaves(result) for result in results), strict=True):
        np.testing.assert_array_equal(a, b)
    config.optimizer.learning_rate = 0.5
    changed = compiled.identity(config, run.setup, (params, None, None), run.devices)
    with pytest.raises(ValueError, match=r"another run; it has config\.optimizer\.learning_rate"):
        compiled.load(file, changed, ())


def test_what_is_no_saved_step_is_refused(tmp_path):
    file = tmp_path / "x"
    with pytest.raises(ValueError, match=r"launch/plan\.py --save"):
        compiled.load(file, {}, ())
    file.write_bytes(b"[1]\nabc")
    with pytest.raises(ValueError, match="no compiled step"):
        compiled.load(file, {}, ())


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("v9:2x2", "one of v4, v5e"),
        ("v5p", "v5p:2x2x1"),
        ("cpu:none", "cpu:N of this machine"),
    ],
)
def test_topologies_are_checked(topology, words):
    with pytest.raises(ValueError, match=words):
        check_topology(topology)


def test_a_missing_compiler_and_missing_devices(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install libtpu"):
        check_topology("v5e:4x4")
    with pytest.raises(ValueError, match="this one has 8 such devices where 64"):
        open_devices("cpu:64")
    with pytest.raises(ValueError, match="0 such devices where 2"):
        open_devices("gpu:2")


def test_published_models_need_no_folder():
    """At full size, in shapes: parts a chip add up to the model's known sizes."""
    config = configs.defaults()
    config.mesh.fsdp, config.mesh.data, config.train.batch_size = 8, 1, 32
    planned = make_planned(config, load_model(config, "sd15"), jax.devices())
    assert planned.pair_flops / 1e12 == pytest.approx(6.426, rel=1e-3)
    parts = plan_report.count_parts(planned.arguments)
    count = full_size.MODELS["sd15_unet"][2]
    shapes = [x.shape for x in jax.tree.leaves(planned.arguments[0].params)]
    whole = sum(n for n in map(math.prod, shapes) if n < meshes.SHARDED_FROM)
    assert whole < count / 100
    share = (count - whole) / 8
    assert parts.params == pytest.approx(4 * (share + whole), rel=1e-3)
    assert parts.optimizer == pytest.approx(2 * parts.params, rel=1e-3)
    assert parts.reference == pytest.approx(parts.params / 2, rel=0.01)
    assert parts.sharded == pytest.approx(sum(parts[:4]) * share / (share + whole), rel=0.01)
    assert planned.arguments[2].moments.shape == (32, 2, 64, 64, 8)
    assert PUBLISHED["sdxl"].scaling_factor == 0.13025


def test_a_folder_must_be_there():
    config = configs.defaults()
    config.model.folder = "someone/on-the-hub"
    with pytest.raises(ValueError, match="--model=sd15"):
        load_model(config)


def test_what_would_make_it_fit():
    """SDXL, 8 chips of 32 GB, nothing sharded: fsdp alone does, accumulation does not."""
    config = configs.defaults()
    config.train.batch_size = 32
    parts = Parts(int(10.3 * GB), int(20.5 * GB), 0, int(5.1 * GB), 10**6, 0)
    memory = Memory(sum(parts[:5]), 26 * GB, 0, 0)
    mesh = {"data": 8, "fsdp": 1, "tensor": 1}
    lines = plan_report.suggest(config, memory=memory, parts=parts, limit=32e9, mesh=mesh)
    (fsdp,) = [line for line in lines if "mesh.fsdp=4" in line]
    assert "fits" in fsdp
    (accumulation,) = [line for line in lines if "train.accumulation" in line]
    assert "not enough alone" in accumulation
    assert any("lora.rank" in line for line in lines)
    assert any("adafactor" in line for line in lines)
    assert any("model.remat" in line for line in lines)
    fits = memory._replace(arguments=10**9, temporaries=10**9)
    assert not plan_report.suggest(config, memory=fits, parts=parts, limit=32e9, mesh=mesh)


def test_the_model_of_time():
    chip = chips.Chip("x", 1.0, flops=100.0, bandwidth=10.0, interconnect=5.0)
    time = plan_report.model_time(chip, flops=200, traffic=50, moved=5)
    assert time == {"compute": 2, "memory": 5, "interconnect": 1, "low": 5, "high": 6}
    assert plan_report.model_time(None, flops=1, traffic=1, moved=1) is None


def test_a_tpu_step(config, tmp_path):
    """By the TPU's compiler, a tiny step: it fits, and has rates."""
    pytest.importorskip("libtpu")
    try:  # one process at a time has it, where no environment variable says otherwise
        (one,) = plan(config, ["v5e:2x2"], cache=tmp_path / "cache")
    except RuntimeError as error:
        pytest.skip(str(error))
    assert one["device_kind"] == "TPU v5 lite"
    assert one["memory"]["fits"] is True
    assert one["time"]["low"] > 0
    assert 0 < one["mfu"]["low"] < 1


def test_the_command(tmp_path):
    """Words and status 1 for what cannot be planned; no traceback."""
    program = [sys.executable, str(ROOT / "launch" / "plan.py")]
    config = f"--config={ROOT / 'configs' / 'sd15_dmpo.py'}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    arguments = [config, "--model=sd15", "--topology=v9:1x1"]
    run = subprocess.run(program + arguments, capture_output=True, text=True, env=environment)
    assert run.returncode == 1
    assert "a topology is one of v4" in run.stderr
    assert "Traceback" not in run.stderr
    assert load_config(str(ROOT / "configs" / "sd15_dmpo.py")).train.compiled == ""
