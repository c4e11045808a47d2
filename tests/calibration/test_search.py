"""Tests for calibration's search, suggestion and report, on probes made up from a known law."""

import json
import pathlib

import numpy as np
import pytest

from dmpo_jax.calibration import growth, report, search, suggestion
from dmpo_jax.calibration.probe import Probe
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.objectives.pulls import Pull
from dmpo_jax.training import health

LEAF = "objectives.dmpo.beta"
UPDATES, PAIRS, TOTAL = 40, 32, 200.0
FREE, FLOOR = (
    5e-4,
    0.004,
)  # of the 95 % quantile of |u|: at beta 1 and a summed rate of 1; at beta 1
# Quantiles of a made-up shape whose 95 % quantile of the size is 1, mostly on the right side.
SHAPE = np.sort(np.concatenate([np.linspace(-0.8, 0.95, 30), [1.05, 1.2]]))
SHAPE /= np.percentile(np.abs(SHAPE), 95)


@pytest.fixture
def pull():
    return OBJECTIVES["dmpo"].find_pull(beta=1.0, alpha=0.01)


def level(beta: float, summed: np.ndarray | float, bend: float = 1.0) -> np.ndarray:
    """The law: bent by the loss, but never below what noise makes."""
    free = [growth.bent(np.log(FREE * beta * s), bend) for s in np.atleast_1d(summed)]
    return np.maximum(free, FLOOR * beta * np.minimum(np.atleast_1d(summed) / 20, 1.0))


def probe_of(beta: float, rate: float = 1.0, *, drift: float = 0.0) -> Probe:
    summed = rate * np.arange(1.0, UPDATES + 1)
    pairs = np.zeros((UPDATES, len(health.FIELDS), PAIRS), np.float32)
    rows = dict(zip(health.FIELDS, np.moveaxis(pairs, 1, 0), strict=True))
    rows["preference"][:] = 1.0
    rows["margin"][:] = 2 / beta * level(beta, summed)[:, None] * SHAPE
    for image in ("chosen", "rejected"):
        rows[f"{image}_gain"][:] = 0.1 * drift * rate
        rows[f"{image}_error"][:] = 0.1 + 0.1 * drift * rate
    return Probe(beta, rate, summed, pairs)


def calibrated(first: float, pull: Pull, drift: float = 0.0):
    found = search.search(lambda b, r: probe_of(b, r, drift=drift), first, pull, TOTAL)
    beta = search.nice(search.solve(found, pull))
    readings = [search.nearest(found, pull)]
    readings += [search.read(probe_of(beta, r, drift=drift), pull, TOTAL) for r in (0.33, 3.0)]
    rates = suggestion.by_rate(readings, beta, pull)
    return found, rates, suggestion.suggest(found, rates, first, pull, LEAF)


@pytest.mark.parametrize("first", [2.0, 60.0, 500.0, 2000.0, 2e5])
def test_the_suggestion_is_the_same_wherever_the_search_begins(first, pull):
    found, _, said = calibrated(first, pull)
    assert len(found) <= search.PROBES
    assert said.beta == 300.0
    assert said.rate == 1.0
    (end,) = level(said.beta, TOTAL)  # of the made-up full run
    assert 1.5 < end < 3.5


def test_the_law_alone_is_predicted_from_one_probe(pull, monkeypatch):
    monkeypatch.setattr(f"{__name__}.FLOOR", 0.0)
    monkeypatch.setattr(search, "PROBES", 1)
    for first in (3.0, 300.0):
        (reading,) = search.search(probe_of, first, pull, TOTAL)
        assert reading.level == pytest.approx(*level(first, TOTAL), rel=0.05)
        for beta in (1.0, 30.0, 150.0):
            predicted = search.level_at(beta, [reading], pull)
            assert predicted == pytest.approx(*level(beta, TOTAL), rel=0.05)


def test_a_beta_that_fits_is_kept(pull):
    _, _, said = calibrated(300.0, pull)
    assert said.beta == 300.0
    assert said.reasons[0].startswith(f"{LEAF}=300 fits")
    assert "keep optimizer.learning_rate" in said.reasons[-1]


def test_the_reason_says_which_way_a_beta_is_off(pull):
    assert "most pairs would be saturated" in calibrated(2000.0, pull)[2].reasons[0]
    assert "little would pull margins back" in calibrated(3.0, pull)[2].reasons[0]


def test_errors_that_run_away_ask_for_a_lower_rate(pull):
    _, rates, said = calibrated(300.0, pull, drift=0.25)
    assert [row.rate for row in rates] == [0.33, 1.0, 3.0]
    assert said.rate == 0.33
    assert (
        "grow to 2.4 times the reference's: lower optimizer.learning_rate to 0.33"
        in (said.reasons[-1])
    )
    assert calibrated(300.0, pull, drift=0.5)[2].rate == 0.1  # none that was probed is calm


def test_margins_that_hardly_move_ask_for_a_higher_rate(pull, monkeypatch):
    monkeypatch.setattr(f"{__name__}.FREE", 4e-8)
    monkeypatch.setattr(f"{__name__}.FLOOR", 1e-6)
    _, _, said = calibrated(2000.0, pull)
    assert said.rate == 10.0
    assert "the policy hardly moves. Raise optimizer.learning_rate 10 times" in said.reasons[-1]


def test_a_policy_that_does_not_move_is_refused(pull):
    still = probe_of(100.0)
    still.pairs[:, health.FIELDS.index("margin")] = 0.0
    with pytest.raises(ValueError, match=r"predict the same.*raise optimizer\.learning_rate"):
        search.read(still, pull, TOTAL)


def test_numbers_that_are_not_finite_are_refused(pull):
    broken = probe_of(100.0, 3.0)
    broken.pairs[-1, 3, 0] = np.nan
    with pytest.raises(ValueError, match=r"beta=100 and 3 times the learning rate .* not finite"):
        search.read(broken, pull, TOTAL)


def test_a_rate_at_which_numbers_are_not_finite_is_left_out(pull, caplog):
    def probe(beta: float, rate: float) -> Probe:
        found = probe_of(beta, rate)
        found.pairs[-1] = np.nan if rate > 2 else found.pairs[-1]
        return found

    found = search.read_rates(probe, 300.0, [0.33, 1.0, 3.0], pull, TOTAL)
    assert [x.probe.rate for x in found] == [0.33]
    assert "at 3 times the learning rate, numbers are not finite" in caplog.text


@pytest.mark.parametrize(
    ("value", "rounded"),
    [(137.0, 150.0), (1.7, 1.5), (0.0088, 0.01), (860.0, 1000.0), (260.0, 300.0), (5.95, 7.0)],
)
def test_suggestions_are_round(value, rounded):
    assert search.nice(value) == rounded


GOLDEN = pathlib.Path(__file__).parent / "golden" / "page.md"


def test_the_page_and_the_json(pull):
    found, rates, said = calibrated(2000.0, pull)
    table = suggestion.by_beta(found, 2000.0, said.beta, pull)
    about = {"objective": "dmpo", "updates": UPDATES}
    made = report.make_report(found, rates, table, said, leaf=LEAF, about=about, pull=pull)
    assert json.loads(json.dumps(made)) == made
    assert made["paste"] == "--config.objectives.dmpo.beta=300"
    assert report.page(made) == GOLDEN.read_text()
    # A row of the table by hand: the law's level, in the made-up shape; optimum and saturation
    # lie at 4.595. Levels grow during the probe's last quarter, which widens the shape a little.
    (row,) = (row for row in made["by_beta"] if row["beta"] == 2000.0)
    assert row["most"] == pytest.approx(*level(2000.0, TOTAL), rel=0.25)
    past = np.abs(SHAPE) * float(row["most"]) > np.log(0.99 / 0.01)
    assert row["saturation"] == pytest.approx(past.mean(), abs=0.05)
    assert row["past_optimum"] == pytest.approx((past & (SHAPE > 0)).mean(), abs=0.05)
    assert row["half"] == pytest.approx(np.percentile(np.abs(SHAPE), 50) * row["most"], rel=0.1)


def test_a_level_is_saturated_where_little_pull_is_left():
    found = search.saturated(np.array([-1e9, -4.6, -4.58, 0.0, 4.58, 4.6, 1e9]))
    np.testing.assert_array_equal(found, [1, 1, 0, 0, 0, 1, 1])
