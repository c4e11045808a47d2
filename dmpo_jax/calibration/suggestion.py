"""The suggestion: a beta, whether the rate should change, and the reasons in words."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from dmpo_jax.calibration import search
from dmpo_jax.calibration.search import Reading, Shares
from dmpo_jax.objectives.pulls import Pull
from dmpo_jax.training.alarms import RUNAWAY

# Betas of the table: factors on the config's.
FACTORS = tuple(10 ** (i / 2) for i in range(-4, 5))
HIGHEST = 1e5  # a beta beyond this is no published one's neighbour: the policy hardly moves


class Row(NamedTuple):
    """Prediction for the end of a full run at one beta and one rate.

    rate: factor on the config's. drift: as in `search.Reading`, None if not probed.
    """

    beta: float
    rate: float
    shares: Shares
    drift: float | None = None
    beta_for_rate: float | None = None  # the beta that would fit this rate


class Suggestion(NamedTuple):
    """beta: rounded to `search.NICE` digits. rate: factor on the config's; 1 keeps it."""

    beta: float
    rate: float
    reasons: tuple[str, ...]


def by_beta(found: Sequence[Reading], first: float, beta: float, pull: Pull) -> list[Row]:
    """Predicts a table around the config's beta `first`, with the suggested one in it."""
    betas = sorted({*(float(f"{first * factor:.3g}") for factor in FACTORS), beta})
    return [Row(each, 1.0, _shares_at(each, found, pull)) for each in betas]


def by_rate(readings: Sequence[Reading], beta: float, pull: Pull) -> list[Row]:
    """Predicts a table of rates at the suggested beta, from a reading of each rate."""
    return [
        Row(
            beta,
            each.probe.rate,
            _shares_at(beta, [each], pull),
            each.drift,
            search.nice(search.solve([each], pull)),
        )
        for each in sorted(readings, key=lambda x: x.probe.rate)
    ]


def suggest(
    found: Sequence[Reading], rates: Sequence[Row], first: float, pull: Pull, leaf: str
) -> Suggestion:
    """Returns the suggestion.

    Args:
        found: readings of the search. rates: from `by_rate`, the config's own rate among them.
        first: the config's beta. leaf: its path.
    """
    beta = search.nice(search.solve(found, pull))
    predicted = search.level_at(beta, found, pull)
    before = search.level_at(first, found, pull)
    if beta == search.nice(first):
        reasons = [
            f"{leaf}={first:g} fits: 95 % of the pairs end with {pull.what} below {before:.2g}"
        ]
    else:
        why = (
            "most pairs would be saturated, or past what the loss asks for"
            if before > pull.target
            else "little would pull margins back to the reference"
        )
        reasons = [
            f"with {leaf}={first:g}, 95 % of the pairs are predicted to end with {pull.what} "
            f"below {before:.2g}: {why}. With {beta:g} it is {predicted:.2g}, near the aim of "
            f"{pull.target:g}"
        ]
    if search.distance(search.nearest(found, pull), pull) > math.log(2):
        reasons.append(
            "no probe came within a factor of 2 of the aim: calibrate again from the suggested beta"
        )
    rate, words = _judge_rate(rates, beta)
    return Suggestion(beta, rate, (*reasons, words))


def _judge_rate(rates: Sequence[Row], beta: float) -> tuple[float, str]:
    own = next(row for row in rates if row.rate == 1)
    assert own.drift is not None
    much = f"{1 + own.drift:.2g} times the reference's"
    if own.drift >= RUNAWAY - 1:
        calm = [x.rate for x in rates if x.rate < 1 and (x.drift or 0.0) < (RUNAWAY - 1) / 2]
        rate = max(calm, default=0.1)
        return rate, (
            f"errors of both images are predicted to grow to {much}: lower "
            f"optimizer.learning_rate to {rate:.2g} times its value, and calibrate again"
        )
    if beta > HIGHEST:
        return 10.0, (
            f"margins are so small that only a beta of {beta:g} would fit, and errors change by "
            f"{own.drift:.1g} of themselves: the policy hardly moves. Raise "
            "optimizer.learning_rate 10 times, and calibrate again"
        )
    return 1.0, f"keep optimizer.learning_rate: errors are predicted to end at {much}"


def _shares_at(beta: float, found: Sequence[Reading], pull: Pull) -> Shares:
    near = min(found, key=lambda x: abs(math.log(x.probe.beta / beta)))
    return search.shares(near, search.level_at(beta, found, pull), pull)


def to_json(row: Row) -> dict[str, Any]:
    """Returns a row as JSON holds it, to four digits."""
    plain = {"beta": row.beta, "rate": row.rate, **row.shares._asdict()}
    plain |= {"drift": row.drift, "beta_for_rate": row.beta_for_rate}
    return {k: v if v is None else float(f"{v:.4g}") for k, v in plain.items()}
