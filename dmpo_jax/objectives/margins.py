"""Gains of the policy over the reference on the two images of a pair.

Every difference of two errors is computed as one product, never as a difference of two means:
beta is in the thousands, and would multiply the rounding error.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dmpo_jax.objectives.registry import Beta, Images
from dmpo_jax.types import Pair, PerPair

PerImage = Float[Array, "B n"]


def gains(policy: Images, reference: Images, target: Images) -> PerImage:
    """Computes `r - l`, float32 `[B, n]`, in squared prediction units.

    Positive if the policy predicts an image better than the reference does; exactly 0 if the
    two predict the same.
    """
    policy, reference, target = (x.astype(jnp.float32) for x in (policy, reference, target))
    # Separate differences keep the small error of a large prediction exact.
    terms = (reference - policy) * ((reference - target) + (policy - target))
    return terms.mean((2, 3, 4))


def margin(policy: Pair, reference: Pair, target: Pair) -> PerPair:
    """Computes the policy's gain on the chosen image minus its gain on the rejected one.

    Returns:
        `(r_c - l_c) - (r_x - l_x)`, float32 `[B]`, in squared prediction units. Positive if
        the policy leans further to the chosen image than the reference does; exactly 0 if
        the two predict the same.
    """
    gain = gains(policy, reference, target)
    return gain[:, 0] - gain[:, 1]


def implied_logit(policy: Pair, reference: Pair, target: Pair, beta: Beta) -> PerPair:
    """`u = beta/2 * margin`, the logit of the preference that the policy implies."""
    return 0.5 * beta * margin(policy, reference, target)


def errors(policy: Images, target: Images) -> PerImage:
    """Computes `l`, float32 `[B, n]`: the mean squared error of each image."""
    return jnp.square(policy.astype(jnp.float32) - target.astype(jnp.float32)).mean((2, 3, 4))


def apart(policy: Pair, target: Pair) -> PerPair:
    """Computes `l_c - l_x`, float32 `[B]`."""
    error = policy.astype(jnp.float32) - target.astype(jnp.float32)
    return ((error[:, 0] - error[:, 1]) * (error[:, 0] + error[:, 1])).mean((1, 2, 3))


def decided(preference: PerPair) -> PerPair:
    """Returns 1 where an image is preferred, 0 at a tie (0.5), which has no chosen image."""
    return jnp.where(preference == 0.5, 0.0, 1.0)
