"""Plans of tiny steps: on fake devices always, by the TPU compiler where it is installed."""

import json
import math
import os
import subprocess
import sys

import jax
import pytest
from etils import epath

from dmpo_jax.config import configs, step_settings
from dmpo_jax.families import FAMILIES, PUBLISHED
from dmpo_jax.jobs import train
from dmpo_jax.jobs.plan import load_model, plan, prepare_process
from dmpo_jax.parallel import meshes
from dmpo_jax.planning import chips
from dmpo_jax.planning import report as plan_report
from dmpo_jax.planning.report import Memory, Parts
from dmpo_jax.planning.step import make_planned
from dmpo_jax.planning.topologies import check_topology, open_devices
from dmpo_jax.toy import debug
from dmpo_jax.training.build import check_fits
from tests.support import full_size, steps, tiny

ROOT = epath.Path(__file__).parents[2]
GB = 10**9


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("plan"))


@pytest.fixture
def config(folders):
    return tiny.make_config(*folders, mesh__fsdp=2, mesh__data=-1, train__batch_size=16)


def planned_of(config):
    """The step that a config's plan compiles, on this process's devices."""
    settings = step_settings.read_step(config)
    axes = step_settings.mesh_axes(config)
    return make_planned(load_model(config), settings, axes, jax.devices())


def described(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)


@pytest.mark.long
@pytest.mark.parametrize(
    "leaves",
    [
        {},
        {"lora__rank": 4, "train__ema_decay": 0.9},
        {"lora__rank": 4, "model__frozen_dtype": "int8"},
        {"model__frozen_dtype": "int8"},
    ],
)
def test_the_step_is_the_one_that_training_compiles(folders, leaves, tmp_path):
    """The same program, to the letter, from shapes alone."""
    config = tiny.make_config(*folders, mesh__fsdp=2, mesh__data=-1, train__batch_size=16, **leaves)
    run, params = train.prepare(config, epath.Path(tmp_path))
    state = run.step.abstract_state(params)
    planned = planned_of(config)
    arguments = (state, run.step.reference, planned.arguments[2], run.key)
    assert described(arguments) == described(planned.arguments)
    update = run.step.make_update(state)
    ours, theirs = planned.update.lower(*planned.arguments), update.lower(*arguments)
    assert ours.as_text() == theirs.as_text()


def test_the_batch_is_the_one_that_the_pipeline_makes(config, tmp_path):
    run, _ = train.prepare(config, epath.Path(tmp_path))
    real = next(run.batches())
    model = load_model(config)
    batch = model.meta.abstract_batch(config.train.batch_size)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(
        lambda x: (x.shape, x.dtype), real
    )
    with config.unlocked():
        config.data.encoded = ""
    assumed = load_model(config).meta
    assert assumed.arrays == model.meta.arrays
    assert assumed.scaling_factor == model.meta.scaling_factor


@pytest.mark.long
def test_a_plan_and_its_cache(config, tmp_path, monkeypatch):
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


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("v9:2x2", "one of v4, v5e"),
        ("v5p", "v5p:2x2x1"),
        ("cpu:none", "cpu:N of this machine"),
        ("h300:8", "a100, a100-40gb, h100, h200, l40s with a count"),
        ("h100", "h100:8"),
        ("h100:0", "h100:8"),
        ("h100:12", "a multiple of 8"),
        ("l40s:16", "l40s:8 or fewer"),
    ],
)
def test_topologies_are_checked(topology, words):
    with pytest.raises(ValueError, match=words):
        check_topology(topology)


def test_a_missing_compiler_and_missing_devices(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install 'libtpu'"):
        check_topology("v5e:4x4")
    for topology in ("h100:1", "a100:16"):
        with pytest.raises(ValueError, match=r"not a GPU: .*(cuda13-local|plan-gpu)"):
            check_topology(topology)
    with pytest.raises(ValueError, match="this one has 8 such devices where 64"):
        open_devices("cpu:64")
    with pytest.raises(ValueError, match="0 such devices where 2"):
        open_devices("gpu:2")


@pytest.mark.long
def test_published_models_need_no_folder():
    """At full size, in shapes: parts a chip add up to the model's known sizes."""
    config = configs.defaults()
    config.mesh.fsdp, config.mesh.data, config.train.batch_size = 8, 1, 32
    planned = make_planned(
        load_model(config, "sd15"),
        step_settings.read_step(config),
        step_settings.mesh_axes(config),
        jax.devices(),
    )
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


@pytest.mark.long
@pytest.mark.parametrize(("name", "component"), [("sd15", "sd15_unet"), ("sdxl", "sdxl_unet")])
def test_memory_is_arithmetic_from_shapes(name, component):
    """Float32 masters, two moments and gradients, a bfloat16 reference, of PyTorch's counts."""
    config = configs.defaults()
    config.mesh.fsdp, config.train.batch_size = 1, 4
    planned = make_planned(
        load_model(config, name),
        step_settings.read_step(config),
        step_settings.mesh_axes(config),
        jax.devices()[:1],
    )
    parts = plan_report.count_parts(planned.arguments)
    count = full_size.MODELS[component][2]
    assert parts.params == parts.gradients == 4 * count
    assert parts.optimizer == pytest.approx(8 * count, rel=1e-3)
    assert parts.reference == pytest.approx(2 * count, rel=1e-3)


def test_every_familys_tiny_model_is_planned_by_its_name():
    for family in FAMILIES.values():
        config = configs.debug(configs.defaults(), family.name)
        model = load_model(config)
        channels = 2 * debug.vae_config(family)["latent_channels"]
        assert model.meta.arrays.moments.shape == (2, 8, 8, channels)
        check_fits(family, family.facts(model.config), model.meta)


def test_a_plan_leaves_the_process_as_it_is(config, tmp_path, monkeypatch):
    """The command sets the platforms of JAX, not the function that plans."""
    monkeypatch.setattr("dmpo_jax.planning.plan.plan_one", lambda *a, **kw: {"topology": "x"})
    before = dict(os.environ), jax.config.values["jax_platforms"]
    plan(config, ["cpu:8"], cache=tmp_path)
    assert (dict(os.environ), jax.config.values["jax_platforms"]) == before
    monkeypatch.setattr(os, "environ", environment := {})
    prepare_process(["h100:1", "gpu:1"])
    assert not environment
    prepare_process(["v5e:2x2", "gpu:1"])
    assert environment == {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    assert jax.config.values["jax_platforms"] == before[1]


def test_a_folder_must_be_there():
    config = configs.defaults()
    config.model.folder = "someone/on-the-hub"
    with pytest.raises(ValueError, match="--model=sd15"):
        load_model(config)


def test_what_would_make_it_fit():
    """SDXL, 8 chips of 32 GB, nothing sharded: fsdp alone does, accumulation does not."""
    settings = steps.settings(batch_size=32)
    parts = Parts(int(10.3 * GB), int(20.5 * GB), 0, int(5.1 * GB), 10**6, 0)
    memory = Memory(sum(parts[:5]), 26 * GB, 0, 0)
    mesh = {"data": 8, "fsdp": 1, "tensor": 1}
    lines = plan_report.suggest(settings, memory=memory, parts=parts, limit=32e9, mesh=mesh)
    (fsdp,) = [line for line in lines if "mesh.fsdp=4" in line]
    assert "fits" in fsdp
    (accumulation,) = [line for line in lines if "train.accumulation" in line]
    assert "not enough alone" in accumulation
    assert any("lora.rank" in line for line in lines)
    assert any("adafactor" in line for line in lines)
    assert any("model.remat" in line for line in lines)
    fits = memory._replace(arguments=10**9, temporaries=10**9)
    assert not plan_report.suggest(settings, memory=fits, parts=parts, limit=32e9, mesh=mesh)


def test_the_model_of_time():
    chip = chips.Chip("x", 1.0, flops=100.0, bandwidth=10.0, interconnect=5.0)
    time = plan_report.model_time(chip, flops=200, traffic=50, moved=5)
    assert time == {"compute": 2, "memory": 5, "interconnect": 1, "low": 5, "high": 6}
    assert plan_report.bound_by(time) == "memory"
    assert plan_report.model_time(None, flops=1, traffic=1, moved=1) is None
    assert plan_report.bound_by(None) is None


def test_what_to_know_of_a_gpus_plan():
    memory = Memory(50 * GB, 20 * GB, 0, 0)
    assert "FRACTION" in "".join(plan_report.note_gpu(memory, 80e9, absent=False))
    assert not plan_report.note_gpu(memory, 141e9, absent=False)  # within what JAX takes
    assert not plan_report.note_gpu(memory, 60e9, absent=False)  # what to change is said apart
    assert "workspaces" in "".join(plan_report.note_gpu(memory, None, absent=True))


def test_a_tpu_step(config, tmp_path, monkeypatch):
    """By the TPU's compiler, a tiny step: it fits, and has rates."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
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
