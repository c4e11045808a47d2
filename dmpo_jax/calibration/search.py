"""Searches the beta with which a full run ends near an objective's target level."""

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dmpo_jax.calibration import growth
from dmpo_jax.calibration.probe import Probe, check_finite
from dmpo_jax.errors import UserError
from dmpo_jax.objectives.pulls import Pull
from dmpo_jax.objectives.registry import LARGEST, SMALLEST
from dmpo_jax.training import health

LOG = logging.getLogger(__name__)
PROBES = 5  # of a search, at most
NEAR = 1.5  # a probe whose predicted level is the target up to this factor ends the search
NICE = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)  # suggested digits: a finer grid would promise too much
QUANTILE = 95  # percent, of |level|: what the target is about
STUCK = 1e-7  # of the reference's error: margins that rounding alone makes, in float32


class Reading(NamedTuple):
    """The reading of a probe: levels at its end, and predicted for the end of the run.

    now: the QUANTILE of |level| at its end. level: the same predicted for the end of the run.
    shape: levels at its end divided by `now`; rows: the rows that they are of.
    drift: growth of both images' errors over the reference's, as a share of it, predicted for the
        end of the run; drift_now: at the probe's end.
    """

    probe: Probe
    now: float
    level: float
    shape: np.ndarray
    rows: dict[str, np.ndarray]
    drift_now: float
    drift: float


class Shares(NamedTuple):
    """Statistics of levels; None where the objective has none.

    half, most: the 50 % and 95 % quantile of |level|.
    """

    half: float
    most: float
    saturation: float | None
    past_optimum: float | None


def read(probe: Probe, pull: Pull, total: float) -> Reading:
    """Reads a probe. total: the run's summed rate, in units of its peak.

    Raises:
        UserError: the policy has not moved, or numbers are not finite.
    """
    end = check_finite(probe).end()
    rows = end.rows()
    levels = probe.beta * pull.per_beta(rows)
    now = float(np.percentile(np.abs(levels), QUANTILE)) if len(levels) else 0.0
    errors = np.stack([rows["chosen_error"], rows["rejected_error"]])
    gains = np.stack([rows["chosen_gain"], rows["rejected_gain"]])
    base = float((errors - gains).mean())
    if not now > 0 or float(np.abs(rows["margin"]).max()) <= STUCK * base:
        raise UserError(
            f"after {len(probe.pairs)} updates of a probe policy and reference still predict the "
            "same, so margins say nothing about beta: raise optimizer.learning_rate, or give more "
            "--updates; if updates are lost in rounding, set model.compute_dtype=float32"
        )
    # The middle of the window, in which levels grow.
    times = total * probe.rate / float(np.exp(np.log(end.summed).mean()))
    drift_now = float(gains.mean()) / base
    return Reading(
        probe,
        now,
        growth.extrapolate(now, times, pull.bend),
        levels / now,
        rows,
        drift_now,
        max(drift_now * times, -1.0),  # an error of 0
    )


def search(
    probe: Callable[[float, float], Probe], first: float, pull: Pull, total: float
) -> list[Reading]:
    """Probes one beta after another, from `first` on, until one is near the target.

    probe: as `probe.Prober`, (beta, factor on the rate) -> what was measured.

    Returns:
        What the probes said, in the order of probing.
    """
    found: list[Reading] = []
    beta = first
    while len(found) < PROBES:
        found.append(read(probe(beta, 1.0), pull, total))
        if distance(found[-1], pull) <= math.log(NEAR):
            break
        beta = solve(found, pull)
        if any(abs(math.log(beta / x.probe.beta)) < math.log(1.05) for x in found):
            break  # it would be the same probe again
    return found


def read_rates(
    probe: Callable[[float, float], Probe],
    beta: float,
    rates: Sequence[float],
    pull: Pull,
    total: float,
) -> list[Reading]:
    """Probes a beta at other rates; a rate at which numbers are not finite is left out, and said.

    rates: factors on the config's rate; 1 is left out, which the search has probed.
    """
    found = []
    for rate in rates:
        if rate == 1:
            continue
        probed = probe(beta, rate)
        if probed.finite:
            found.append(read(probed, pull, total))
        else:
            LOG.warning("at %g times the learning rate, numbers are not finite", rate)
    return found


def distance(reading: Reading, pull: Pull) -> float:
    """Returns how far a reading's predicted level is from the target, as |ln| of their ratio."""
    return abs(math.log(reading.level / pull.target))


def nearest(found: Sequence[Reading], pull: Pull) -> Reading:
    """Returns the reading that is nearest to the target."""
    return min(found, key=lambda x: distance(x, pull))


def solve(found: Sequence[Reading], pull: Pull) -> float:
    """Returns the beta at which the predicted level is the target, from the readings so far."""
    by_beta = sorted(found, key=lambda x: x.probe.beta)
    for low, high in itertools.pairwise(by_beta):
        if low.level <= pull.target < high.level:
            share = math.log(pull.target / low.level) / math.log(high.level / low.level)
            beta = low.probe.beta * (high.probe.beta / low.probe.beta) ** share
            break
    else:
        near = nearest(found, pull)
        way = growth.coordinate(pull.target, pull) - growth.coordinate(near.level, pull)
        beta = near.probe.beta * math.exp(way)
    return min(max(beta, SMALLEST), LARGEST)


def level_at(beta: float, found: Sequence[Reading], pull: Pull) -> float:
    """Returns the level predicted for the end of a run with `beta`, from the readings."""
    by_beta = sorted(found, key=lambda x: x.probe.beta)
    for low, high in itertools.pairwise(by_beta):
        if low.probe.beta <= beta <= high.probe.beta:
            share = math.log(beta / low.probe.beta) / math.log(high.probe.beta / low.probe.beta)
            return low.level * (high.level / low.level) ** share
    near = min(found, key=lambda x: abs(math.log(x.probe.beta / beta)))
    way = math.log(beta / near.probe.beta)
    return growth.at_coordinate(growth.coordinate(near.level, pull) + way, pull)


def shares(reading: Reading, most: float, pull: Pull) -> Shares:
    """Returns the statistics of a reading's levels, scaled so that their QUANTILE is `most`."""
    levels = reading.shape * most
    past = None if pull.optimum is None else float(pull.optimum(reading.rows, levels).mean())
    return Shares(
        float(np.percentile(np.abs(levels), 50)),
        most,
        float(saturated(levels).mean()) if pull.logit else None,
        past,
    )


def nice(value: float) -> float:
    """Returns the nearest number, by ratio, whose digits are in NICE."""
    decade = math.floor(math.log10(value))
    near = [digits * 10.0**e for e in (decade - 1, decade, decade + 1) for digits in NICE]
    return float(f"{min(near, key=lambda x: abs(math.log(x / value))):.2g}")


def saturated(levels: np.ndarray) -> np.ndarray:
    """True where p(1 - p) of p = sigmoid(level) is below `health.SATURATED`."""
    p = 1 / (1 + np.exp(-np.clip(levels, -500, 500)))
    return p * (1 - p) < health.SATURATED
