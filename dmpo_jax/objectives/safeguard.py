"""Safeguard around any objective: the rejected images may not undo progress on the chosen."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmpo_jax.objectives.registry import Hyperparameter
from dmpo_jax.types import Pair

MU = Hyperparameter(
    None, "what is left of the chosen branch's step; 0.9 for SD1.5's DMPO", "[0, 1]"
)


def winner_preserving(
    policy: Pair, target: Pair, *, mu: float | int
) -> tuple[Pair, Float[Array, ""]]:
    """Scales the gradient of the rejected images' predictions by lambda.

    With e the policy's error on the chosen (c) and rejected (x) images, over the given batch,

        lambda = clip((1 - mu) sum(e_c^2) / sum(e_c e_x), 0, 1)   where sum(e_c e_x) > 0, else 1

    To first order, in the space of predictions, this keeps the chosen error from growing. Only
    the gradient changes: every loss keeps its value. To wrap an objective, pass it the returned
    predictions. lambda is one number for the given batch, which the training step makes the global
    batch over all devices, the microbatch under accumulation, or a group (`step.Setup.group`).

    Args:
        policy: predictions, `[B, 2, H, W, C]`. target: the correct predictions.
        mu: fraction of the chosen branch's step that must remain, in [0, 1]; published runs
            use 0.2 to 0.9.

    Returns:
        The predictions to compute the loss from, and lambda, float32.

    Source: Diffusion-SDPO, arXiv 2511.03317; AIDC-AI/Diffusion-SDPO, train.py.
    """
    MU.check("mu", mu)
    error = jax.lax.stop_gradient(policy.astype(jnp.float32) - target.astype(jnp.float32))
    chosen, rejected = error[:, 0], error[:, 1]
    # Means, not sums: sums over a large batch exceed float32's range if errors are in the
    # thousands. The second `where` avoids a division by 0.
    inner = jnp.mean(chosen * rejected)
    share = (1 - mu) * jnp.mean(jnp.square(chosen)) / jnp.where(inner > 0, inner, 1.0)
    scale = jnp.where(inner > 0, jnp.clip(share, 0.0, 1.0), 1.0)
    held = jax.lax.stop_gradient(policy[:, 1])
    moved = held + scale.astype(policy.dtype) * (policy[:, 1] - held)
    return jnp.stack([policy[:, 0], moved], 1), scale
