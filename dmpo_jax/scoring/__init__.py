"""Images and their prompts -> scores. One small file a kind of scorer."""

from dmpo_jax.scoring.scorer import SCORERS, Scorer, make_scorer

__all__ = ["SCORERS", "Scorer", "make_scorer"]
