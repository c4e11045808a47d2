"""Which number of a pair an objective compares with its scale, and where the loss stops pulling.

Each objective declares it (`@objective(..., calibration=...)`), for `dmpo-jax calibrate`. Its loss
depends on beta through `beta x` alone, x a number of each pair, or of each image. `beta x` is
called the level here: the logit u for the divergences. Host code, in float64.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from dmpo_jax.errors import UserError

Rows = Mapping[str, Float[np.ndarray, "N B"]]  # N updates, B pairs; names as in `training.health`
Hyperparameters = Mapping[str, float | int]

# Of |level|, the 95 % quantile at a run's end. On the digits (docs/calibrate.md) the loss bends the
# margins from about 1 on and pairs are saturated from 4.6 on; 2.5 is in the middle of these.
TARGET = 2.5


class Pull(NamedTuple):
    """How the loss of an objective depends on beta.

    per_beta: rows -> x, float64 `[M]`; ties left out where they have no weight.
    target: what the 95 % quantile of |beta x| should be at the end of a run.
    optimum: (rows, levels) -> for each level whether it is past the loss's minimum or flat
        end; None if the loss has neither.
    logit: True if p = sigmoid(level) is a probability, so that pairs saturate.
    what: |level|, in words.
    """

    per_beta: Callable[[Rows], np.ndarray]
    target: float = TARGET
    optimum: Callable[[Rows, np.ndarray], np.ndarray] | None = None
    logit: bool = True
    what: str = "|u|"

    @property
    def bend(self) -> float:
        """The level at which the loss has begun to hold margins back."""
        return self.target / TARGET


class NoPull(UserError):
    """No margin could tell an objective's beta; the message says why, and what to set instead."""


def of_logit(softening: str | None = None, *, ties: bool = True) -> Callable[..., Pull]:
    """Returns hyperparameters -> `Pull` of a loss of u = beta/2 * margin.

    softening: the hyperparameter a that clips labels to [a, 1 - a]; the loss is least there.
    ties: they have a weight.
    """

    def pull(given: Hyperparameters) -> Pull:
        least = given[softening] if softening else 0

        def past(rows: Rows, levels: np.ndarray) -> np.ndarray:
            q = np.clip(rows["preference"].ravel(), least, 1 - least)
            return levels > np.log(q / (1 - q))

        def half(rows: Rows) -> np.ndarray:
            return 0.5 * (rows["margin"].ravel() if ties else _decided(rows, rows["margin"]))

        return Pull(half, optimum=past if least else None)

    return pull


def of_margin(aim: Callable[[Hyperparameters], float]) -> Callable[..., Pull]:
    """Returns hyperparameters -> `Pull` of a loss that asks for a margin of aim / beta.

    The level is 1 there. aim: of the hyperparameters; may raise NoPull.
    """

    def pull(given: Hyperparameters) -> Pull:
        asked = aim(given)
        return Pull(
            lambda rows: _decided(rows, rows["margin"]) / asked,
            target=1.0,
            optimum=lambda rows, levels: levels > 1,
            logit=False,
            what="|margin| over what the loss asks for",
        )

    return pull


def of_gains(given: Hyperparameters) -> Pull:
    """Returns the `Pull` of a loss of `beta (g - z0)` of each image, chosen images first."""
    del given

    def per_beta(rows: Rows) -> np.ndarray:
        gains = -np.stack([rows["chosen_gain"], rows["rejected_gain"]])
        base = np.maximum(gains.mean((0, 2), keepdims=True), 0)  # of each update
        chosen, rejected = gains - base
        return np.concatenate([_decided(rows, chosen), -_decided(rows, rejected)])

    return Pull(per_beta, what="|beta (g - z0)| of its images")


def none(why: str) -> Callable[..., Pull]:
    """Returns what raises NoPull with `why`."""

    def pull(given: Hyperparameters) -> Pull:
        raise NoPull(why)

    return pull


def _decided(rows: Rows, values: np.ndarray) -> np.ndarray:
    return values[rows["preference"] != 0.5]
