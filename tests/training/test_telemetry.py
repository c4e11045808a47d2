"""Tests for dmpo_jax/training/telemetry.py and trace.py: by a clock that the test moves."""

import contextlib
import io
import json
import logging
import time
import types

import jax
import numpy as np
import pytest
import rich.console
from etils import epath

from dmpo_jax.parallel import compilation
from dmpo_jax.progress import Progress
from dmpo_jax.training import health
from dmpo_jax.training import telemetry as watch
from dmpo_jax.training.alarms import Alarms, Run
from dmpo_jax.training.hooks import Hook
from dmpo_jax.training.loop import call
from dmpo_jax.training.metrics import MetricsWriter
from dmpo_jax.training.step import TrainState
from dmpo_jax.training.trace import Trace

METRICS = {"loss": 0.5, "implicit_accuracy": 1.0, "grad_norm": 2.0, "skipped": 0.0}
METRICS["update_norm"] = 0.1
PAIRS = np.arange(16.0).reshape(8, 2)  # of `health.FIELDS`: margins of 6 and 7
CURVES = set(health.Curves(beta=2.0, alpha=0.1, timesteps=10).add(PAIRS))
BATCH, FLOPS, CHIPS, PEAK = 8, 10**12, 2, 4e13


class Rig:
    """A watch, its clock, and what it writes."""

    def __init__(self, folder, *, start=0, every=1, peak=PEAK):
        self.now, self.shown = 100.0, io.StringIO()
        self._file = folder / "metrics.jsonl"
        self._writer = MetricsWriter(folder, tensorboard=False)
        console = rich.console.Console(file=self.shown)
        self._progress = Progress(4, start, console=console)
        self.watch = watch.Watch(
            start,
            total=1000,
            batch_size=BATCH,
            every=every,
            skip_limit=0,
            learning_rate=lambda step: jax.numpy.float32(step),
            cost=watch.Cost(FLOPS, CHIPS, peak),
            curves=health.Curves(beta=2.0, alpha=0.1, timesteps=10),
            alarms=Alarms(Run(total=1000, batch_size=BATCH)),
            clock=lambda: self.now,
        )

    def spend(self, what, seconds):
        with self.watch.timed(what):
            self.now += seconds

    def report(self, number, seconds, **metrics):
        """The metrics of an update, `seconds` after whatever came before."""
        self.now += seconds
        self.watch.report(
            number, {**METRICS, "pairs": PAIRS, **metrics}, self._writer, self._progress
        )

    def close(self):
        self._writer.close()

    def lines(self):
        return [json.loads(line) for line in self._file.read_text().splitlines()]


@pytest.fixture
def make_rig(tmp_path):
    with contextlib.ExitStack() as stack:

        def make(**kw):
            return stack.enter_context(contextlib.closing(Rig(tmp_path, **kw)))

        yield make


def test_rates_and_where_a_step_goes(make_rig):
    rig = make_rig(start=1, every=2)
    for number in (2, 3, 4):  # 4 seconds a step, of which a quarter is spent on the next batch
        rig.spend("input", 1.0)
        rig.report(number, 3.0)
    last = rig.lines()[-1]
    assert [line["step"] for line in rig.lines()] == [2, 4]
    want = {
        "pairs_per_second": 2.0,
        "pairs_per_second_per_chip": 1.0,
        "tflops_per_second_per_chip": 1.0,
        "mfu": 1e12 / PEAK,
        "seconds_input": 1.0,
        "seconds_step": 3.0,
    }
    assert {name: last[name] for name in want} == pytest.approx(want)
    assert last["learning_rate"] == 3.0
    assert last["loss"] == 0.5
    assert "input wait 25 %" in rig.shown.getvalue()
    assert "MFU 2.5 %" in rig.shown.getvalue()


def test_a_chip_that_is_not_known_has_no_mfu(make_rig):
    rig = make_rig(peak=None)
    rig.report(1, 1.0)
    assert "mfu" not in rig.lines()[0]
    assert "MFU" not in rig.shown.getvalue()


def test_pauses_are_left_out_of_the_speed_and_told_once(make_rig):
    rig = make_rig()
    rig.report(1, 2.0)
    rig.spend("checkpoint", 50.0)
    rig.spend("validation", 30.0)
    rig.spend("validation", 10.0)
    rig.spend("input", 0.5)
    rig.spend("input", 1.5)  # the batches of two steps, one of which is still in flight
    rig.report(2, 2.0)
    rig.report(3, 2.0)
    before, after, later = rig.lines()
    assert "seconds_checkpoint" not in before
    assert after["seconds_checkpoint"] == 50.0
    assert after["seconds_validation"] == 40.0
    assert after["pairs_per_second"] == BATCH / 4.0
    assert after["seconds_input"] == 1.0
    assert "seconds_checkpoint" not in later
    assert later["pairs_per_second"] == BATCH / 2.0
    assert later["seconds_input"] == 0.0


class Validation(Hook):
    name = "validation"

    def __call__(self, state, update):
        return {"validation_loss": 0.51234, "validation_implicit_accuracy": 0.75}


def test_what_a_hook_measures_is_shown(make_rig, caplog):
    rig = make_rig()
    state = TrainState(jax.numpy.int32(4), {}, None, jax.numpy.int32(0))
    with caplog.at_level(logging.INFO):
        call([Validation()], state, 4, rig.watch, rig._writer, rig._progress)
    assert caplog.messages == ["step 4: validation loss 0.5123, validation implicit accuracy 0.75"]
    assert rig.lines()[0]["validation_loss"] == 0.51234


@pytest.mark.parametrize("cached", [False, True])
def test_compiling_is_timed_and_is_no_part_of_the_first_step(
    make_rig, caplog, cached, tmp_path, monkeypatch
):
    rig = make_rig()
    (tmp_path / "jit_train_step-0-cache").write_bytes(b"")
    monkeypatch.setattr(compilation, "cache_folder", lambda: str(tmp_path))

    def compile():
        # Said before, not after, and no more than is known.
        assert "compiling the step: about a minute" in caplog.text
        assert f"compilation cache: {tmp_path}, 1 training steps; any other one" in caplog.text
        rig.now += 7.0
        if cached:
            jax.monitoring.record_event("/jax/compilation_cache/cache_hits")
        return "compiled"

    jitted = types.SimpleNamespace(lower=lambda x: types.SimpleNamespace(compile=compile))
    with caplog.at_level(logging.INFO):
        assert rig.watch.compile(jitted, 1) == "compiled"
    where = "from the compilation cache" if cached else "not in the compilation cache"
    assert f"compiled the step in 7.0 s, {where}" in caplog.text
    rig.report(1, 2.0)
    (line,) = rig.lines()
    assert line["seconds_compile"] == 7.0
    assert line["compiled_from_cache"] == cached
    assert line["pairs_per_second"] == BATCH / 2.0
    assert line["seconds_to_first_step"] > 0


def test_everything_measured_is_named(make_rig):
    """All metrics outside MEASURED must be equal between runs."""
    rig = make_rig()
    for what in ("checkpoint", "validation", "sampling", "profile", "compile"):
        rig.spend(what, 1.0)
    rig.report(1, 1.0)
    assert set(rig.lines()[0]) - watch.MEASURED == {"step", "learning_rate", *METRICS, *CURVES}


def test_a_non_finite_update_ends_the_job(make_rig):
    rig = make_rig()
    with pytest.raises(watch.NonFiniteError, match=r"update 1: .* number 1, above .*=0"):
        rig.report(1, 1.0, skipped=1.0)


def test_memory_is_the_fullest_devices_or_the_process(monkeypatch):
    held = watch.memory()
    assert 0.05 < held["host_memory_gb"] <= held["host_memory_peak_gb"] < 1000

    def device(**stats):
        return types.SimpleNamespace(memory_stats=lambda: stats)

    two = [device(bytes_in_use=2e9, peak_bytes_in_use=9e9), device(bytes_in_use=3e9)]
    monkeypatch.setattr(jax, "local_devices", lambda: two[:1])
    assert watch.memory() == {"device_memory_gb": 2.0, "device_memory_peak_gb": 9.0}
    monkeypatch.setattr(jax, "local_devices", lambda: two)
    assert watch.memory() == {"device_memory_gb": 3.0}  # not every device tells its peak


def test_the_process_began_before_its_imports():
    began = watch.process_seconds()
    assert began is not None
    assert 0.1 < began < 24 * 3600
    time.sleep(0.05)
    later = watch.process_seconds()
    assert later is not None
    assert 0.05 <= later - began < 5


def test_a_trace_covers_its_steps_and_lies_in_its_folder(tmp_path):
    folder = epath.Path(tmp_path / "profile")
    square = jax.jit(lambda x: x * x)
    begun, ended = [], []
    with Trace((3, 4), folder) as trace:
        for number in range(1, 7):
            square(2.0).block_until_ready()
            if trace.due(number):
                (ended if begun else begun).append(number)
                trace.switch()
    assert (begun, ended) == ([2], [4])
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_a_trace_cut_short_is_written(tmp_path):
    with Trace((2, 9), epath.Path(tmp_path)) as trace:
        assert trace.due(5)  # resumed within
        trace.switch()
    assert list(tmp_path.rglob("*.xplane.pb"))
    with Trace(None, epath.Path(tmp_path)) as trace:
        assert not trace.due(2)
