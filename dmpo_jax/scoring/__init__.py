"""Scorers of images and their prompts. One small file for each kind of scorer."""

from dmpo_jax.scoring.named import KINDS, SCORERS, STATISTICS, make_scorer
from dmpo_jax.scoring.scorer import Scorer, rehearse
from dmpo_jax.scoring.several import describe_scorers, make_scorers

__all__ = [
    "KINDS",
    "SCORERS",
    "STATISTICS",
    "Scorer",
    "describe_scorers",
    "make_scorer",
    "make_scorers",
    "rehearse",
]
