"""Preference health: is the policy learning the preference, and at whose expense?

The known way for a run to fall ill is that the loss goes down because the rejected error
grows, while the chosen error grows too; `chosen_gain` then turns positive.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dmpo_jax.types import PerPair

Images = Float[Array, "B n H W C"]
Scalar = Float[Array, ""]
PerImage = Float[Array, "B n"]


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
    gain = error if reference is None else _gain(policy, reference, target)
    margin = _margin(gain)
    metrics = {
        "implicit_accuracy": _correct(margin, preference).mean(),
        "ties": _tied(margin, preference).astype(jnp.float32).mean(),
        "margin": margin.mean(),
        "margin_abs_max": jnp.abs(margin).max(),
    }
    for i, side in enumerate(("chosen", "rejected")[: policy.shape[1]]):
        metrics[f"{side}_error"] = error[:, i].mean()
        if reference is not None:
            metrics[f"{side}_gain"] = gain[:, i].mean()
    return metrics


def correct(
    policy: Images, reference: Images | None, target: Images, preference: PerPair | None
) -> PerPair:
    """What each pair adds to `implicit_accuracy`: 1, 0, or 1/2; arguments as above."""
    policy, target = policy.astype(jnp.float32), target.astype(jnp.float32)
    if reference is None:
        gain = jnp.square(policy - target).mean((2, 3, 4))
    else:
        gain = _gain(policy, reference, target)
    return _correct(_margin(gain), preference)


def _gain(policy: Images, reference: Images, target: Images) -> PerImage:
    # As one product, as the objectives have it: a difference of two means loses the
    # small gains of early steps to rounding.
    reference = reference.astype(jnp.float32)
    return ((policy - reference) * (policy + reference - 2 * target)).mean((2, 3, 4))


def _margin(gain: PerImage) -> PerPair:
    if gain.shape[1] == 2:
        return gain[:, 1] - gain[:, 0]
    return jnp.full(gain.shape[0], jnp.nan, jnp.float32)


def _tied(margin: PerPair, preference: PerPair | None) -> Bool[Array, "B"]:
    return jnp.zeros(margin.shape, bool) if preference is None else preference == 0.5


def _correct(margin: PerPair, preference: PerPair | None) -> PerPair:
    # (1 + sign) / 2 carries NaN through, where a comparison would make it a wrong answer.
    half = _tied(margin, preference) & ~jnp.isnan(margin)
    return jnp.where(half, 0.5, 0.5 + 0.5 * jnp.sign(margin))
