"""Paired scores of two models -> a win rate with its interval."""

from typing import Any

import numpy as np
from jaxtyping import Float


def compare(
    base: Float[np.ndarray, " N"], policy: Float[np.ndarray, " N"], *, resamples: int = 2000
) -> dict[str, Any]:
    """Win rate of policy over base: the share of pairs where policy's score is higher.

    Equal scores count half. The interval is a 95 % bootstrap over the pairs; `score_base` and
    `score_policy` are the mean scores.

    Raises:
        ValueError: a score is NaN.
    """
    base, policy = base.astype(np.float64), policy.astype(np.float64)
    if np.isnan(base).any() or np.isnan(policy).any():
        raise ValueError("a score that is NaN is neither a win nor a loss")
    wins = np.where(policy > base, 1.0, np.where(policy == base, 0.5, 0.0))
    rows = np.random.default_rng(0).integers(0, len(wins), (resamples, len(wins)))
    low, high = np.percentile(wins[rows].mean(1), [2.5, 97.5])
    return {
        "win_rate": float(wins.mean()),
        "win_rate_ci95": [float(low), float(high)],
        "score_base": float(base.mean()),
        "score_policy": float(policy.mean()),
    }
