"""Preference health: is the policy learning the preference, and at whose expense?

The known way for a run to fall ill is that the loss goes down because the rejected error
grows, while the chosen error grows too; `chosen_gain` then turns positive.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dmpo_jax.types import PerPair

Images = Float[Array, "B n H W C"]
Scalar = Float[Array, ""]


def preference_health(
    policy: Images,
    reference: Images | None,
    target: Images,
    preference: PerPair | None,
) -> dict[str, Scalar]:
    """Means over the pairs given, from arrays that the step already holds.

    Every value but `margin_abs_max` is a plain mean over B, so that the mean of equal
    microbatches is the batch's own; errors and margins are in squared prediction units.
    With l the policy's and r the reference's mean squared error, c chosen, x rejected:

        implicit_accuracy  share of pairs with a margin above 0; a margin of 0 counts 1/2,
                           and so does a tie (preference 0.5), which has no right answer.
                           Among decided pairs it is (accuracy - ties/2) / (1 - ties).
        ties               share of pairs with preference exactly 0.5
        margin             mean of (r_c - l_c) - (r_x - l_x); l_x - l_c without reference
        margin_abs_max     largest |margin|: exactly 0 where policy and reference agree
        chosen_error, rejected_error    means of l_c, l_x
        chosen_gain, rejected_gain      means of l_c - r_c, l_x - r_x: below 0, the policy
                           predicts that image better than the reference does

    Args:
        policy, target: `[B, n, H, W, C]`, any float type; n is 2, or 1 without rejected
            images: then accuracy and margins are NaN and the rejected keys are absent.
        reference: as policy, or None: then the two gains are absent.
        preference: the probability that image 0 is preferred; None is 1 everywhere.

    Returns:
        float32 scalars.
    """
    policy, target = policy.astype(jnp.float32), target.astype(jnp.float32)
    error = jnp.square(policy - target).mean((2, 3, 4))
    if reference is None:
        gain = error
    else:
        reference = reference.astype(jnp.float32)
        # As one product, as the objectives have it: a difference of two means loses the
        # small gains of early steps to rounding.
        gain = ((policy - reference) * (policy + reference - 2 * target)).mean((2, 3, 4))
    tied = jnp.zeros(policy.shape[0], bool) if preference is None else preference == 0.5
    if policy.shape[1] == 2:
        margin = gain[:, 1] - gain[:, 0]
    else:
        margin = jnp.full(policy.shape[0], jnp.nan, jnp.float32)
    # (1 + sign) / 2 carries NaN through, where a comparison would make it a wrong answer.
    right = jnp.where(tied & ~jnp.isnan(margin), 0.5, 0.5 + 0.5 * jnp.sign(margin))
    metrics = {
        "implicit_accuracy": right.mean(),
        "ties": tied.astype(jnp.float32).mean(),
        "margin": margin.mean(),
        "margin_abs_max": jnp.abs(margin).max(),
    }
    for i, side in enumerate(("chosen", "rejected")[: policy.shape[1]]):
        metrics[f"{side}_error"] = error[:, i].mean()
        if reference is not None:
            metrics[f"{side}_gain"] = gain[:, i].mean()
    return metrics
