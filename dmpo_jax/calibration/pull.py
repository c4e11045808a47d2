"""Which number of a pair an objective compares with its scale, and where the loss stops pulling.

An objective that can be calibrated depends on beta through `beta x` alone, x a number of each
pair, or of each image. `beta x` is called the level here: the logit u for the divergences.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from dmpo_jax.errors import UserError
from dmpo_jax.objectives.registry import Objective
from dmpo_jax.training import health

Rows = Mapping[str, Float[np.ndarray, "N B"]]  # of `health.by_pair`, by name: N updates, B pairs

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
        """The level at which the loss has begun to hold margins back (`growth`)."""
        return self.target / TARGET


REFUSED = {
    "sft": (
        "it has no beta: it looks at the chosen image alone. Choose optimizer.learning_rate, and "
        "watch chosen_error and the validation loss"
    ),
    "mapo": (
        "its beta weighs the margin against the chosen image's error, and the margin's scale is "
        "fixed by the loss. Keep objectives.mapo.beta=0.1, as published, and choose "
        "optimizer.learning_rate"
    ),
    "dspo": (
        "its beta is also the discount of the distance from the reference, so another beta is "
        "another loss. Keep objectives.dspo.beta=0.001, as published, or use dspo_sdxl"
    ),
    "nft": (
        "it has no beta: b mixes the policy into two predictions. Keep a published "
        "objectives.nft.b (1, 0.5 or 0.1), and choose reference.decay and optimizer.learning_rate"
    ),
    "nft_adaptive": (
        "it has no beta: b mixes the policy into two predictions. Keep a published "
        "objectives.nft_adaptive.b (1, 0.5 or 0.1), and choose reference.decay and "
        "optimizer.learning_rate"
    ),
}


def find_pull(objective: Objective, hyperparameters: Mapping[str, float | int]) -> Pull:
    """Returns the `Pull` of an objective with these hyperparameters; their beta is not read.

    Raises:
        UserError: beta has no scale that margins could tell, or there is none; names why, and
            what to set instead.
    """
    name = objective.name
    if name in REFUSED:
        raise UserError(f"objective {name!r} cannot be calibrated: {REFUSED[name]}")
    if name == "diffusion_kto":
        return Pull(_gains_over_mean, what="|beta (g - z0)| of its images")
    if name == "ipo":
        return _margin_of(0.5)
    if name == "hinge":
        return _margin_of(1.0)
    if name == "linear_dpo":
        if not (aim := 5 * (0.5 - hyperparameters["eta"])):
            raise UserError(
                "objective 'linear_dpo' cannot be calibrated with eta=0.5: its weight is then the "
                "same at every beta. Lower objectives.linear_dpo.eta (0.05 as published)"
            )
        return _margin_of(aim)
    if not (objective.implied_logit and "beta" in hyperparameters):
        raise UserError(
            f"objective {name!r} cannot be calibrated: it does not say that its loss is a function "
            "of u = beta/2 * margin. If it is, declare it with implied_logit=True and a "
            "hyperparameter beta; otherwise compare short runs"
        )
    softening = hyperparameters.get("alpha", hyperparameters.get("label_smoothing", 0))
    keep_ties = name != "dspo_sdxl"
    past = functools.partial(_past_logit, softening=softening) if softening else None
    return Pull(functools.partial(_half_margin, ties=keep_ties), optimum=past)


def _half_margin(rows: Rows, *, ties: bool) -> np.ndarray:
    """u at a beta of 1."""
    return 0.5 * (rows["margin"].ravel() if ties else _decided(rows, rows["margin"]))


def _past_logit(rows: Rows, levels: np.ndarray, *, softening: float) -> np.ndarray:
    q = np.clip(rows["preference"].ravel(), softening, 1 - softening)
    return levels > np.log(q / (1 - q))


def _gains_over_mean(rows: Rows) -> np.ndarray:
    """diffusion_kto's logit of each image at a beta of 1, chosen images first."""
    gains = -np.stack([rows["chosen_gain"], rows["rejected_gain"]])
    base = np.maximum(gains.mean((0, 2), keepdims=True), 0)  # of each update
    chosen, rejected = gains - base
    return np.concatenate([_decided(rows, chosen), -_decided(rows, rejected)])


def _margin_of(aim: float) -> Pull:
    """A `Pull` of a loss that asks for a margin of aim / beta; the level is 1 there."""

    def per_beta(rows: Rows) -> np.ndarray:
        return _decided(rows, rows["margin"]) / aim

    return Pull(
        per_beta,
        target=1.0,
        optimum=lambda rows, levels: levels > 1,
        logit=False,
        what="|margin| over what the loss asks for",
    )


def _decided(rows: Rows, values: np.ndarray) -> np.ndarray:
    return values[rows["preference"] != 0.5]


def saturated(levels: np.ndarray) -> np.ndarray:
    """True where p(1 - p) of p = sigmoid(level) is below `health.SATURATED`."""
    p = 1 / (1 + np.exp(-np.clip(levels, -500, 500)))
    return p * (1 - p) < health.SATURATED
