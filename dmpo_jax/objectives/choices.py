"""Objectives that use the label as a choice: the chosen image, the rejected one.

They ignore the confidence of the label. A tie (preference exactly 0.5) has no chosen image: its
loss is 0, and it still counts in a mean over B. beta has a different meaning in each of them.
"""

import jax
import jax.numpy as jnp

from dmpo_jax.objectives import pulls
from dmpo_jax.objectives.margins import apart, decided, errors, gains, implied_logit, margin
from dmpo_jax.objectives.registry import Beta, Hyperparameter, Images, objective
from dmpo_jax.types import Pair, PerPair


@objective(
    needs_reference=False,
    needs_rejected=False,
    calibration=pulls.none(
        "it has no beta: it looks at the chosen image alone. Choose optimizer.learning_rate, and "
        "watch chosen_error and the validation loss"
    ),
)
def sft(policy: Images, reference: Images | None, target: Images, preference: PerPair) -> PerPair:
    """Supervised fine-tuning: `l_c`, the chosen image's own denoising error.

    Ignores the reference and the rejected image. A tie has weight 0.

    Source: SalesforceAIResearch/DiffusionDPO, train.py, `--sft`.
    """
    del reference
    return decided(preference) * errors(policy[:, :1], target[:, :1])[:, 0]


@objective(
    needs_reference=True,
    needs_rejected=True,
    calibration=pulls.of_margin(lambda given: 0.5),
    beta=Hyperparameter(2000.0, "the margin is drawn to 1 / (2 beta)", "(0, inf)"),
)
def ipo(policy: Pair, reference: Pair, target: Pair, preference: PerPair, *, beta: Beta) -> PerPair:
    """Identity preference optimisation: `(z - 1/(2 beta))^2`, z the margin.

    Pulls the margin to 1/(2 beta), in squared prediction units, from both sides. A tie has
    weight 0.

    Args:
        beta: above 0; 2000 targets a margin of 2.5e-4.

    Source: A General Theoretical Paradigm to Understand Learning from Human Preferences,
    arXiv 2310.12036; huggingface/diffusers, train_diffusion_dpo.py.
    """
    return decided(preference) * jnp.square(margin(policy, reference, target) - 0.5 / beta)


@objective(
    needs_reference=True,
    needs_rejected=True,
    calibration=pulls.of_margin(lambda given: 1.0),
    beta=Hyperparameter(2000.0, "a margin of 1 / beta is wide enough", "(0, inf)"),
)
def hinge(
    policy: Pair, reference: Pair, target: Pair, preference: PerPair, *, beta: Beta
) -> PerPair:
    """`max(0, 1 - beta z)`, z the margin: a constant pull up to a margin of 1/beta, then none.

    A tie has weight 0.

    Args:
        beta: above 0; without the factor 1/2 of u.

    Source: Statistical Rejection Sampling Improves Preference Optimization, arXiv
    2309.06657; huggingface/diffusers, train_diffusion_dpo.py.
    """
    return decided(preference) * jax.nn.relu(1 - beta * margin(policy, reference, target))


@objective(
    needs_reference=True,
    needs_rejected=True,
    implied_logit=True,
    calibration=pulls.none(
        "its beta is also the discount of the distance from the reference, so another beta is "
        "another loss. Keep objectives.dspo.beta=0.001, as published, or use dspo_sdxl"
    ),
    beta=Hyperparameter(0.001, "of logit and discount; as published for SD1.5", "(0, inf)"),
)
def dspo(
    policy: Pair, reference: Pair, target: Pair, preference: PerPair, *, beta: Beta
) -> PerPair:
    """Direct score preference optimisation, SD1.5's form: mean of `(e - beta (1 - p) d)^2`.

    e is the policy's error on the chosen image, d = policy - reference there, and
    p = sigmoid(u), all differentiated. It fine-tunes on the chosen image, and discounts the
    distance from the reference until the policy separates the pair. A tie has weight 0.

    Args:
        beta: above 0, of u and of the discount alike; 0.001 in published runs.

    Source: DSPO, Direct Score Preference Optimization for Diffusion Model Alignment, ICLR
    2025; AIDC-AI/Diffusion-SDPO, train.py, branch `dspo`.
    """
    u = implied_logit(policy, reference, target, beta)
    policy, reference, target = (x[:, 0].astype(jnp.float32) for x in (policy, reference, target))
    discount = (beta * jax.nn.sigmoid(-u))[:, None, None, None]
    score = policy - target - discount * (policy - reference)
    return decided(preference) * jnp.square(score).mean((1, 2, 3))


@objective(
    needs_reference=True,
    needs_rejected=True,
    couples_pairs=True,
    implied_logit=True,
    calibration=pulls.of_logit(ties=False),
    beta=Hyperparameter(5000.0, "of the implied logit, as published for SDXL", "(0, inf)"),
)
def dspo_sdxl(
    policy: Pair, reference: Pair, target: Pair, preference: PerPair, *, beta: Beta
) -> PerPair:
    """Direct score preference optimisation, SDXL's form: mean of `(1 - p)^2 d^2`.

    d = policy - reference on the chosen image, p = sigmoid(u). While the batch's mean of d^2 is
    below 0.1, the loss is `(1 - p)^2` alone. Another loss than `dspo`, by the same name in the
    published code. A tie has weight 0, but counts in that mean, which is over the given batch:
    the global batch over all devices, the microbatch under accumulation, or a group.

    Args:
        beta: above 0; 5000 in published runs.

    Source: AIDC-AI/Diffusion-SDPO, train.py, branch `dspo` for SDXL.
    """
    wrong = jnp.square(jax.nn.sigmoid(-implied_logit(policy, reference, target, beta)))
    way = policy[:, 0].astype(jnp.float32) - reference[:, 0].astype(jnp.float32)
    moved = jnp.square(way).mean((1, 2, 3))
    mean = moved.mean(where=~jnp.isnan(preference))  # NaN: padding
    return decided(preference) * wrong * jnp.where(mean >= _DSPO_MOVED, moved, 1.0)


_DSPO_MOVED = 0.1  # of the published code


def _until_the_bound(given: pulls.Hyperparameters) -> float:
    """The margin at which the weight reaches its lower bound, times beta."""
    if not (aim := 5 * (0.5 - given["eta"])):
        raise pulls.NoPull(
            "with eta=0.5 its weight is the same at every beta. Lower objectives.linear_dpo.eta "
            "(0.05 as published)"
        )
    return aim


@objective(
    needs_reference=True,
    needs_rejected=True,
    calibration=pulls.of_margin(_until_the_bound),
    beta=Hyperparameter(5000.0, "slope of the weight, as published", "(0, inf)"),
    eta=Hyperparameter(0.05, "the weight is clipped to [eta, 1 - eta]", "[0, 0.5]"),
)
def linear_dpo(
    policy: Pair,
    reference: Pair,
    target: Pair,
    preference: PerPair,
    *,
    beta: Beta,
    eta: float | int,
) -> PerPair:
    """The difference of the two errors, by a weight that falls as the policy separates them.

    With Delta = (l_c - l_x) - (r_c - r_x),

        loss = w (l_c - l_x),   w = clip(0.2 beta Delta + 1/2, eta, 1 - eta), not differentiated

    The weight is a piecewise linear stand-in for the sigmoid of DPO's gradient that never falls
    below eta: errors keep moving apart, so it is meant for a reference that follows the policy
    (`reference.decay`, 0.95 to 0.995 in the paper). The value has no lower bound. A tie has
    weight 0.

    Args:
        beta: above 0; 5000 in published runs. eta: in [0, 0.5]; 0.05 in the paper, 0.01 in
            its code.

    Source: Linear-DPO, arXiv 2605.21123.
    """
    further = -margin(policy, reference, target)
    weight = jax.lax.stop_gradient(jnp.clip(0.2 * beta * further + 0.5, eta, 1 - eta))
    return decided(preference) * weight * apart(policy, target)


@objective(
    needs_reference=True,
    needs_rejected=True,
    couples_pairs=True,
    calibration=pulls.of_gains,
    beta=Hyperparameter(1000.0, "of an image's gain, as in published code", "(0, inf)"),
    chosen_weight=Hyperparameter(meaning="of chosen images", within="[0, inf)"),
    rejected_weight=Hyperparameter(meaning="of rejected images", within="[0, inf)"),
)
def diffusion_kto(
    policy: Pair,
    reference: Pair,
    target: Pair,
    preference: PerPair,
    *,
    beta: Beta,
    chosen_weight: float | int = 1.0,
    rejected_weight: float | int = 1.0,
) -> PerPair:
    """Diffusion-KTO: utility of each image by itself, relative to the batch's mean gain.

    With g = r - l, z0 = max(0, mean of g over the batch), not differentiated, and w, s the
    weight and sign of an image (+1 chosen, -1 rejected),

        loss = mean over the two images of  w (1 - sigmoid(s beta (g - z0))).

    A tie has weight 0, but its images count in z0, which does not depend on labels. z0 is a
    mean over the given batch: the global batch over all devices, the microbatch under
    accumulation, or a group.

    Args:
        beta: above 0, without the factor 1/2 of u; 1000 in published code.
        chosen_weight, rejected_weight: at least 0.

    Source: Aligning Diffusion Models by Optimizing Human Utility, arXiv 2404.04465.
    """
    gain = gains(policy, reference, target)
    counted = ~jnp.isnan(preference)  # NaN: padding
    mean = gain.mean(where=counted[:, None])
    base = jax.lax.stop_gradient(jnp.maximum(mean, 0.0))
    # 1 - sigmoid(x) loses all digits for large x; the equal sigmoid(-x) does not.
    chosen = chosen_weight * jax.nn.sigmoid(-beta * (gain[:, 0] - base))
    rejected = rejected_weight * jax.nn.sigmoid(beta * (gain[:, 1] - base))
    return decided(preference) * 0.5 * (chosen + rejected)


# Constants of the margin-aware loss, from the published code.
_MAPO_SCALE, _MAPO_STEPS = 0.5, 1000.0


@objective(
    needs_reference=False,
    needs_rejected=True,
    calibration=pulls.none(
        "its beta weighs the margin against the chosen image's error, and the margin's scale is "
        "fixed by the loss. Keep objectives.mapo.beta=0.1, as published, and choose "
        "optimizer.learning_rate"
    ),
    beta=Hyperparameter(
        0.1, "of the margin beside the chosen image's error, as published", "(0, inf)"
    ),
)
def mapo(
    policy: Pair,
    reference: Pair | None,
    target: Pair,
    preference: PerPair,
    *,
    beta: Beta,
) -> PerPair:
    """Margin-aware, without a reference: `l_c - beta log sigmoid(1000 [f(l_c) - f(l_x)])`.

    f(l) = s l / (exp(s l) - 1) with s = 0.5 falls from 1 towards 0 as the error grows. A tie
    has weight 0.

    Args:
        beta: weight of the margin beside fine-tuning's error, above 0; 0.1 in published runs.

    Source: Margin-aware Preference Optimization for Aligning Diffusion Models without
    Reference, arXiv 2406.06424; mapo-t2i/mapo, utils.py.
    """
    del reference
    error = errors(policy, target)
    further = apart(policy, target)
    rise = _bernoulli_difference(*(_MAPO_SCALE * x for x in (error[:, 0], error[:, 1], further)))
    return decided(preference) * (error[:, 0] - beta * jax.nn.log_sigmoid(_MAPO_STEPS * rise))


def _bernoulli_difference(a: PerPair, b: PerPair, a_minus_b: PerPair) -> PerPair:
    """Computes `f(a) - f(b)` for f(y) = y / (exp(y) - 1) and a, b at least 0.

    f(y) is 1 - y/2 + an even part, whose first term is y^2/12. Below 1, the linear part uses
    the precise `a_minus_b`, and only the small even part is a difference of two values.
    """

    def even(y):
        square = y * y
        return square / 12 * (1 - square / 60 * (1 - square / 42 * (1 - square / 40)))

    def f(y):  # in exp(-y), which cannot overflow; the other branch takes y = 0
        return y * jnp.exp(-y) / -jnp.expm1(-y)

    small = jnp.maximum(a, b) < 1.0
    near = -0.5 * a_minus_b + even(jnp.minimum(a, 1.0)) - even(jnp.minimum(b, 1.0))
    far_a, far_b = (jnp.where(small, 1.0, jnp.maximum(y, 1e-6)) for y in (a, b))
    return jnp.where(small, near, f(far_a) - f(far_b))
