"""train.accumulation=auto: the fewest microbatches that fit, kept by the run, on any device."""

import json
import logging
import math
import types

import jax
import pytest
from etils import epath

from dmpo_jax.config import configs, fitted
from dmpo_jax.errors import UserError
from dmpo_jax.jobs import train
from dmpo_jax.jobs.plan import load_model
from dmpo_jax.jobs.run import run
from dmpo_jax.planning import fitting
from dmpo_jax.planning.report import Memory, cuts, measure_memory
from dmpo_jax.toy.digits import PIPELINE

GB = 10**9


@pytest.mark.parametrize("fixed", [0.5, 4.0])
@pytest.mark.parametrize("bend", [0.0, 0.3, -0.3])
@pytest.mark.parametrize("limit", [5.0, 5.2, 6.0, 8.0, 20.0, 1000.0])
def test_what_is_chosen_fits_and_no_more_than_that_is_cut(fixed, bend, limit):
    numbers = [n for n in range(1, 97) if 96 % n == 0]
    asked = []

    def measure(number):
        """Bytes of a step whose memory is nearly a straight line of the microbatch's pairs."""
        asked.append(number)
        pairs = 96 / number
        return fixed + 0.5 * pairs + bend * (pairs - 1) * pairs / 96

    choice = fitting.choose(measure, numbers, limit)
    assert measure(choice.accumulation) <= limit
    assert len(asked) <= 5 + (bend > 0)
    if bend == 0:
        assert all(measure(n) > limit for n in numbers if n < choice.accumulation)


@pytest.mark.parametrize(
    ("needs", "chosen"),
    [
        ({4: 9, 2: 9, 1: 9}, 0),
        ({4: math.inf, 2: math.inf, 1: math.inf}, 0),
        ({4: 4, 2: math.inf, 1: math.inf}, 4),
        ({4: 4, 2: 4.2, 1: math.inf}, 2),  # the line promises 1, the compiler refuses it
        ({4: 4, 2: 4.2, 1: 4.9}, 1),
        ({1: 9}, 0),
        ({1: 4}, 1),
    ],
)
def test_the_compiler_has_the_last_word(needs, chosen):
    choice = fitting.choose(needs.get, sorted(needs), 5)
    assert choice.accumulation == chosen
    assert choice.needs.items() <= needs.items()


@pytest.fixture
def config():
    """128 pairs on 8 devices, so 16 on each; shapes alone, no files."""
    made = configs.debug(configs.defaults(), "sd")
    made.train.batch_size, made.train.accumulation, made.mesh.fsdp = 128, 0, 8
    return made


@pytest.fixture
def compiled(monkeypatch):
    """The accumulations that were compiled: steps need 1 GB and 1 GB for each pair on a device."""
    numbers = []

    def plan(model, settings, axes, devices):
        numbers.append(settings.accumulation)
        pairs = settings.batch_size // 8
        made = types.SimpleNamespace(compile=lambda: pairs // settings.accumulation)
        update = types.SimpleNamespace(lower=lambda *given: made)
        return types.SimpleNamespace(arguments=(), update=update)

    monkeypatch.setattr(fitting, "make_planned", plan)
    measured = lambda pairs: Memory(GB, pairs * GB, 0, 0)  # noqa: E731
    monkeypatch.setattr(fitting, "measure_memory", measured)
    return numbers


def fit(config, folder):
    return fitted.with_accumulation(config, epath.Path(folder), load_model).train.accumulation


def test_a_run_keeps_its_number_on_like_devices(config, compiled, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fitting, "device_memory", lambda: 6 * GB)
    with caplog.at_level(logging.INFO):
        assert fit(config, tmp_path) == 4
    said = "4, chosen: a step of 4 microbatches of 32 pairs needs 5 GB a device, and 90 % of"
    assert said.replace("90 %", "90%") in caplog.text
    assert compiled == [16, 8, 4]
    assert config.train.accumulation == 0
    kept = json.loads((tmp_path / fitted.FILE).read_text())
    assert kept["accumulation"] == 4
    compiled.clear()
    config.train.steps, config.optimizer.learning_rate = 100, 1e-5  # the same step
    assert fit(config, tmp_path) == 4
    assert not compiled
    config.train.batch_size = 64  # another one
    assert fit(config, tmp_path) == 2
    config.train.batch_size = 128
    assert fit(config, tmp_path) == 4
    monkeypatch.setattr(fitting, "device_memory", lambda: 5 * GB)  # 4 would take all of it
    assert fit(config, tmp_path) == 8
    compiled.clear()
    monkeypatch.setattr(fitting, "device_memory", lambda: 100 * GB)  # other devices
    assert fit(config, tmp_path) == 1
    assert compiled
    config.train.accumulation = 2  # asked for
    assert fit(config, tmp_path) == 2


def test_a_step_that_fits_in_no_way_says_what_else_to_change(config, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "device_memory", lambda: GB)

    def refuse():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory: Used 21.50G of 1G")

    step = types.SimpleNamespace(arguments=(), update=types.SimpleNamespace(lower=refuse))
    monkeypatch.setattr(fitting, "make_planned", lambda *given: step)
    config.mesh.fsdp, config.mesh.data = 1, 8
    with pytest.raises(UserError) as said:
        fit(config, tmp_path)
    text = str(said.value)
    assert (
        "may take 0.9 GB a device, and even with 16 microbatches of 8 pairs it needs 23.1" in text
    )
    assert "--config.model.remat=transformer" in text
    assert "--config.mesh.fsdp=-1" in text
    assert "data.resolution" in text
    assert "--config.train.accumulation" not in text
    assert not (tmp_path / fitted.FILE).exists()


def test_devices_that_tell_no_memory_take_the_batch_in_one(tmp_path, monkeypatch, caplog):
    """As CPUs do not. Training is given the number, and so records it."""
    seen = []
    monkeypatch.setattr(train, "check", lambda *given: None)
    monkeypatch.setattr(train, "train", lambda config, *rest: seen.append(config))
    config = configs.from_flat({"model.folder": str(PIPELINE), "train.accumulation": 0})
    with caplog.at_level(logging.INFO):
        run(config, tmp_path)
    assert seen[0].train.accumulation == 1
    assert "train.accumulation=1, chosen: a cpu does not say how much memory it has" in caplog.text


@pytest.mark.slow  # compiles four steps
def test_the_compiler_finds_the_step_that_fits(config, tmp_path, monkeypatch):
    needs = []

    def measure(program):
        needs.append(measure_memory(program).total)
        return measure_memory(program)

    monkeypatch.setattr(fitting, "measure_memory", measure)
    monkeypatch.setattr(fitting, "device_memory", lambda: 10**12)
    assert fit(config, tmp_path) == 1
    least, second, most = needs
    assert least < second < most
    between = (least + second) / 2 / fitting.SHARE
    monkeypatch.setattr(fitting, "device_memory", lambda: int(between))
    assert fit(config, tmp_path) == 16


def test_a_batch_is_cut_as_the_mesh_takes_it():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
    assert cuts(48, mesh) == [1, 2, 3, 4, 6, 12]
    assert cuts(48, mesh, 6) == [1, 2]
    assert cuts(2, mesh) == []
