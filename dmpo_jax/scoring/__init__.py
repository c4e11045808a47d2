"""Scorers of images and their prompts. One small file for each kind of scorer."""

from dmpo_jax.scoring.scorer import SCORERS, Scorer, make_scorer, rehearse

__all__ = ["SCORERS", "Scorer", "make_scorer", "rehearse"]
