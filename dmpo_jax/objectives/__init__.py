"""Preference objectives: pure functions from predictions to one loss per pair.

To add one, write a function under `@objective`: in one of these files, with a row in its test, or
in your own config file.
"""

from dmpo_jax.objectives.anchor import ANCHORS, Anchor
from dmpo_jax.objectives.choices import (
    diffusion_kto,
    dspo,
    dspo_sdxl,
    hinge,
    ipo,
    linear_dpo,
    mapo,
    sft,
)
from dmpo_jax.objectives.divergences import (
    alpha_divergence,
    diffusion_dpo,
    dmpo,
    jensen_shannon,
    poly_dpo,
)
from dmpo_jax.objectives.margins import decided, errors, gains, implied_logit, margin
from dmpo_jax.objectives.registry import OBJECTIVES, Hyperparameter, Objective, objective
from dmpo_jax.objectives.rewards import nft, nft_adaptive
from dmpo_jax.objectives.safeguard import winner_preserving

__all__ = [
    "ANCHORS",
    "OBJECTIVES",
    "Anchor",
    "Hyperparameter",
    "Objective",
    "alpha_divergence",
    "decided",
    "diffusion_dpo",
    "diffusion_kto",
    "dmpo",
    "dspo",
    "dspo_sdxl",
    "errors",
    "gains",
    "hinge",
    "implied_logit",
    "ipo",
    "jensen_shannon",
    "linear_dpo",
    "mapo",
    "margin",
    "nft",
    "nft_adaptive",
    "objective",
    "poly_dpo",
    "sft",
    "winner_preserving",
]
