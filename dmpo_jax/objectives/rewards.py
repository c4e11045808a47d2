"""Objectives that take the label as a reward of each image by itself.

The chosen image's reward is the label q, the rejected one's is 1 - q. At a tie both are 1/2, and
the policy is held at the reference.
"""

import jax
import jax.numpy as jnp

from dmpo_jax.objectives import pulls
from dmpo_jax.objectives.registry import Hyperparameter, Images, objective
from dmpo_jax.types import Pair, PerPair

B = Hyperparameter(1.0, "how far the two targets reach beyond the reference", "(0, inf)")
NO_BETA = pulls.none(
    "it has no beta: b mixes the policy into two predictions. Keep a published b (1, 0.5 or 0.1), "
    "and choose reference.decay and optimizer.learning_rate"
)


@objective(needs_reference=True, needs_rejected=True, calibration=NO_BETA, b=B)
def nft(
    policy: Pair, reference: Pair, target: Pair, preference: PerPair, *, b: float | int
) -> PerPair:
    """Negative-aware fine-tuning, on pairs: an implicit positive and a negative policy.

    Of each image with reward w, with v+ = b policy + (1 - b) reference and
    v- = (1 + b) reference - b policy,

        loss = (w |v+ - target|^2 + (1 - w) |v- - target|^2) / b

    means over H, W, C, and the mean of the two images. Bounded below. At a tie an image has
    w = 1/2, which is least at the reference. Published runs move the reference after the policy
    (`reference.decay`).

    Args:
        b: above 0; 1 or 0.1 in published runs, 0.5 in FlowCPO.

    Source: DiffusionNFT, arXiv 2509.16117; NVlabs/DiffusionNFT; on given pairs FlowCPO, arXiv
    2609.09905.
    """
    return _nft(policy, reference, target, preference, b, adaptive=False)


@objective(needs_reference=True, needs_rejected=True, calibration=NO_BETA, b=B)
def nft_adaptive(
    policy: Pair, reference: Pair, target: Pair, preference: PerPair, *, b: float | int
) -> PerPair:
    """`nft` with each squared error divided by its image's mean absolute error.

    The divisor is not differentiated. Published code does so with errors in x0; that is this loss
    by `timesteps.weighting=x0`. A tie is held at the reference.

    Args:
        b: as of `nft`.

    Source: NVlabs/DiffusionNFT, scripts/train_nft_sd3.py.
    """
    return _nft(policy, reference, target, preference, b, adaptive=True)


def _nft(
    policy: Pair,
    reference: Pair,
    target: Pair,
    preference: PerPair,
    b: float | int,
    *,
    adaptive: bool,
) -> PerPair:
    policy, reference, target = (x.astype(jnp.float32) for x in (policy, reference, target))
    error, way = reference - target, b * (policy - reference)
    reward = jnp.stack([preference, 1 - preference], 1)
    positive, negative = (_squared(error + side * way, adaptive) for side in (1, -1))
    return ((reward * positive + (1 - reward) * negative) / b).mean(1)


def _squared(error: Images, adaptive: bool) -> jax.Array:
    """Returns the mean square of each image's error, `[B, n]`."""
    square = jnp.square(error).mean((2, 3, 4))
    if not adaptive:
        return square
    size = jax.lax.stop_gradient(jnp.abs(error).mean((2, 3, 4)))
    return square / jnp.maximum(size, _LEAST)


_LEAST = 1e-5  # of a mean absolute error, so that nothing is divided by 0
