"""Alarms on real faults: a tiny model, the real loop, and one thing wrong."""

import dataclasses

import numpy as np
import pytest

from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.training import alarms
from tests.support import watched


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs that are easily told apart."""
    return watched.write(tmp_path_factory.mktemp("pairs") / "a", told=0.5)


def raised(rows):
    return {name.removeprefix("alarm_") for row in rows for name in row if "alarm_" in name}


def last(rows, name, count=50):
    """Mean of a curve over the last updates."""
    return np.mean([row[name] for row in rows if "learning_rate" in row][-count:])


@pytest.mark.long
def test_a_rate_that_bfloat16_loses(tmp_path, pairs):
    """1e-9, as published for SDXL, but not scaled by the batch: float32 masters move, and hardly
    a bfloat16 parameter does."""
    rows, _ = watched.run(tmp_path, pairs, steps=55, rate=1e-9, compute_dtype="bfloat16")
    assert raised(rows) == {"stuck"}
    assert last(rows, "update_norm") > 0


@pytest.mark.slow
def test_labels_drawn_by_lot(tmp_path):
    """`test_alarms.py` judges the rows of this run, which are stored."""
    lot = watched.write(tmp_path / "lot", told=0.0, train=512, validation=6000)
    rows, _ = watched.run(tmp_path / "run", lot, steps=510, validate_every=170, warmup=5, every=10)
    assert raised(rows) == {"chance"}


SFT = OBJECTIVES["sft"]
SCALED = dataclasses.replace(SFT, fn=lambda *given: 2.0**16 * SFT.fn(*given))


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        {"objective": SCALED, "hyperparameters": {}},  # as for float16's gradients, left in
        {
            "objective": SFT,
            "hyperparameters": {},
            "optimizer": {"name": "adamw", "clip_norm": 1e-3},
        },
    ],
    ids=["loss scaled", "clip_norm too low"],
)
def test_gradients_that_are_all_clipped_far(settings, tmp_path, pairs):
    rows, _ = watched.run(tmp_path, pairs, steps=55, rate=1e-5, **settings)
    assert raised(rows) == {"clipped"}


@pytest.mark.long
def test_a_start_past_the_optimum(tmp_path, pairs):
    """DPO's weights, trained on to soft labels and measured against the model before it."""
    dpo = {"objective": OBJECTIVES["diffusion_dpo"], "hyperparameters": {"beta": 100.0}}
    rows, start = watched.run(tmp_path / "dpo", pairs, steps=80, **dpo)
    assert raised(rows) == set()
    soft = watched.write(tmp_path / "soft", told=0.5, preference=0.7)
    rows, _ = watched.run(tmp_path / "dmpo", soft, steps=55, rate=1e-6, start=start)
    assert raised(rows) == {"past_optimum"}


@pytest.mark.long
def test_pairs_that_are_learnt_are_no_fault(tmp_path):
    """At the optimum of alpha 0.01 p(1-p) is 0.0099: most are saturated, and most past it."""
    easy = watched.write(tmp_path / "easy", told=1.0)
    rows, _ = watched.run(tmp_path / "run", easy, steps=120, rate=2e-4)
    assert raised(rows) == set()
    assert last(rows, "saturation") > 0.7
    assert last(rows, "past_optimum") > alarms.PAST
