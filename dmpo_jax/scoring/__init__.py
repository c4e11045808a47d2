"""Scorers of images and their prompts. One small file for each kind of scorer."""

from dmpo_jax.scoring.scorer import SCORERS, Scorer, make_scorer, rehearse
from dmpo_jax.scoring.several import describe_scorers, make_scorers

__all__ = ["SCORERS", "Scorer", "describe_scorers", "make_scorer", "make_scorers", "rehearse"]
