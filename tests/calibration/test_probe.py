"""Tests for dmpo_jax/calibration/probe.py: a probe is the beginning of a run, on every mesh."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax.calibration import search
from dmpo_jax.calibration.probe import Prober, keep, probe_rates, run_rates, summed_rate
from dmpo_jax.families import SD
from dmpo_jax.parallel import meshes
from dmpo_jax.training import build, health
from dmpo_jax.training.build import Rate, TrainingStep
from dmpo_jax.training.step import Moving
from tests.support import steps

PAIRS, UPDATES, PEAK = 16, 8, 3e-3
MARGIN = health.FIELDS.index("margin")


def make_step(devices: int = 1, peak: float = PEAK, warmup: int = 2, **changes) -> TrainingStep:
    """A step of two layers, sharded over the devices."""
    rate = Rate(peak, warmup, total_steps=max(50, warmup + 1), schedule="cosine")
    given = {"optimizer": {"name": "adamw"}, "batch_size": PAIRS, "rate": rate, **changes}
    settings = steps.settings(**given)
    learning_rate, tx = build.make_optimizer(settings)
    mesh = meshes.make_mesh(devices=jax.devices()[:devices])
    reference = jax.device_put(first(), meshes.parameter_sharding(mesh, steps.small()))
    setup = steps.make_small_setup(tx=tx)
    return TrainingStep(settings, SD, steps.META, mesh, None, reference, setup, learning_rate)


def first():
    """Parameters to begin with: copies, which may be donated."""
    return {path: jnp.array(x) for path, x in steps.small().items()}


def batches(built: TrainingStep):
    rows = meshes.local_rows(built.batch_sharding(), PAIRS)
    for i in itertools.count():
        yield jax.tree.map(lambda x: x[rows], steps.make_batch(PAIRS, seed=i))


def make(built: TrainingStep, updates: int = UPDATES):
    return Prober(built, first(), lambda: batches(built), steps.run_key(), updates)


def test_a_probe_is_the_beginning_of_the_run():
    built = make_step()
    probe = make(built).run(2000.0, run_rates(built, 3))
    state = built.make_state(first())
    update, rows = built.make_update(state), batches(built)
    for i in range(3):
        batch = meshes.shard_batch(next(rows), built.batch_sharding(), PAIRS)
        state, metrics = update(state, built.reference, batch, steps.run_key())
        ours, theirs = probe.pairs[i, MARGIN], np.asarray(metrics["pairs"])[MARGIN]
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6)
    assert np.abs(probe.pairs[:, MARGIN]).max() > 1e-5


def test_every_probe_begins_with_the_same_parameters():
    probe = make(make_step())
    first = probe(2000.0, 1.0)
    other = probe(20.0, 3.0)
    np.testing.assert_array_equal(probe(2000.0, 1.0).pairs, first.pairs)
    assert not np.array_equal(other.pairs, first.pairs)


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_parameters_are_made_again_as_they_were(fsdp, monkeypatch):
    monkeypatch.setattr(meshes, "SHARDED_FROM", 64)  # or arrays this small are replicated
    mesh = meshes.make_mesh(data=-1, fsdp=fsdp)
    wanted = {"x.kernel": np.arange(128.0, dtype=np.float32).reshape(8, 16), "x.bias": np.ones(3)}
    placed = jax.device_put(wanted, meshes.parameter_sharding(mesh, wanted))
    shardings = {path: x.sharding for path, x in placed.items()}
    restore = keep(placed)
    for x in placed.values():
        x.delete()
    for _ in range(2):
        for path, x in restore().items():
            np.testing.assert_array_equal(x, wanted[path])
            assert x.sharding == shardings[path]
            x.delete()
    assert shardings["x.kernel"].is_fully_replicated == (fsdp == 1)


def test_a_rate_is_a_factor_on_the_configs():
    ours = make(make_step())(2000.0, 3.0)
    theirs = make(make_step(peak=3 * PEAK))(2000.0, 1.0)
    np.testing.assert_allclose(ours.pairs[:, MARGIN], theirs.pairs[:, MARGIN], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(ours.summed, 3 * theirs.summed)


def test_the_suggestion_is_the_same_on_8_devices_as_on_1():
    suggested = []
    for devices in (1, 8):
        built = make_step(devices)
        pull = built.settings.objective.find_pull(**built.settings.hyperparameters)
        found = search.search(make(built), 2000.0, pull, summed_rate(built, 50))
        suggested.append(search.solve(found, pull))
    assert suggested[1] == pytest.approx(suggested[0], rel=1e-2)


def test_the_warmup_takes_at_most_a_quarter():
    rates = probe_rates(make_step(warmup=500).settings, 8)
    np.testing.assert_allclose(rates / PEAK, [0.5, 1, 1, 1, 1, 1, 1, 1], rtol=1e-6)


def test_the_summed_rate_is_the_schedules_or_the_moving_references():
    built = make_step(warmup=0)
    assert summed_rate(built, 50) == pytest.approx(25.5, rel=1e-3)  # half of a cosine
    slow = make_step(warmup=0, moving=Moving(0.9, 2))
    assert summed_rate(slow, 50) == pytest.approx(
        float(slow.learning_rate(np.arange(20)).sum()) / PEAK
    )
    assert summed_rate(make_step(warmup=0, moving=Moving(1.0)), 50) == summed_rate(built, 50)
