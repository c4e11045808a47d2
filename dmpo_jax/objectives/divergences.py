"""Divergences between the preference that a policy implies and the label.

Both are Bernoulli: `p = sigmoid(u)`, with u = beta/2 * margin, and
`q = clip(preference, alpha, 1 - alpha)`. Each loss has its minimum at u = logit(q) alone, so the
margin is bounded, except in an unsmoothed `diffusion_dpo`. The minimum is 0, except for the cross
entropy of `diffusion_dpo`. A tie (preference 0.5) keeps its weight and holds the policy at the
reference's margin. The losses differ on pairs far from their label: the gradient of KL(p||q)
vanishes on pairs that the policy ranks confidently wrong, and that of KL(q||p) is largest there.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dmpo_jax.objectives import pulls
from dmpo_jax.objectives.margins import implied_logit
from dmpo_jax.objectives.registry import Beta, Hyperparameter, objective
from dmpo_jax.types import Pair, PerPair

# alpha is the complement of a label of 1 - alpha.
LABEL_NOISE = Hyperparameter(0.01, "label noise: preferences are clipped to 1 - alpha", "(0, 0.5]")


class Outcome(NamedTuple):
    """The event that one of the two images is preferred: log p, log q, and x = log q - log p.

    Where log p and log q are close, x is not computed as their difference. Every loss is 0 at
    p = q, and the difference of two rounded logs would be rounding error of either sign.
    """

    log_p: PerPair
    log_q: PerPair
    x: PerPair


def _outcomes(u: PerPair, preference: PerPair, alpha: float | int) -> tuple[Outcome, Outcome]:
    """Returns the outcome of the chosen image and that of the rejected one."""
    # Both sides are clipped from below. 1 - q would not do: in float32 1 - (1 - alpha) is 0
    # for a small alpha, and its log infinite.
    q, not_q = jnp.clip(preference, alpha, 1 - alpha), jnp.clip(1 - preference, alpha, 1 - alpha)
    log_q, log_not_q = jnp.log(q), jnp.log(not_q)
    way = log_q - log_not_q - u  # distance to the minimum; exactly 0 for a tie at u = 0
    near, close = jnp.clip(way, -1.0, 1.0), jnp.abs(way) < 1

    def outcome(log_p, log_q, exact):
        return Outcome(log_p, log_q, jnp.where(close, exact, log_q - log_p))

    # Log space: the sigmoid saturates at |u| near 17, which beta in the thousands soon reaches.
    return (
        outcome(jax.nn.log_sigmoid(u), log_q, jnp.log1p(not_q * jnp.expm1(near))),
        outcome(jax.nn.log_sigmoid(-u), log_not_q, jnp.log1p(q * jnp.expm1(-near))),
    )


def _share(log_a: PerPair, log_b: PerPair, x: PerPair) -> PerPair:
    """One outcome's share of KL(a||b), `b - a - a x` with x = log b - log a: never below 0.

    The shares of both outcomes add up to the sum of a (log a - log b), as a and b each add up
    to 1. Unlike its terms, they do not cancel where a is near b.
    """
    a = jnp.exp(log_a)
    return jnp.where(jnp.abs(x) < 0.5, a * _second_order(x), jnp.exp(log_b) - a - a * x)


def _second_order(x: PerPair) -> PerPair:
    """Computes `exp(x) - 1 - x` for |x| < 0.5 to the last digit; beyond, its value at the bound."""
    x = jnp.clip(x, -0.5, 0.5)
    series = 1 + x / 8
    for n in (7, 6, 5, 4, 3):
        series = 1 + x / n * series
    return x * x / 2 * series


def _kl(outcome: Outcome) -> PerPair:
    """One outcome's share of KL(p||q)."""
    return _share(outcome.log_p, outcome.log_q, outcome.x)


@objective(
    needs_reference=True,
    needs_rejected=True,
    implied_logit=True,
    beta=Hyperparameter(
        2000.0, "inverse temperature; as published for SD1.5 (SDXL: 6000)", "(0, inf)"
    ),
    calibration=pulls.of_logit("alpha"),
    alpha=LABEL_NOISE,
)
def dmpo(
    policy: Pair,
    reference: Pair,
    target: Pair,
    preference: PerPair,
    *,
    beta: Beta,
    alpha: float | int,
) -> PerPair:
    """Divergence minimisation: KL from the policy's preference to a softened label.

        loss = KL(p||q) = p log(p / q) + (1 - p) log((1 - p) / (1 - q))

    Zero at `u = logit(q)`, beyond which the gradient changes sign. The loss of a pair that the
    policy ranks confidently wrong tends to `log(1 / (1 - q))`, and its gradient to 0. A tie
    holds the margin at 0.

    Args:
        beta: inverse temperature, above 0; 2000 for SD1.5.
        alpha: softening of the label, which is clipped to [alpha, 1 - alpha]; in (0, 0.5];
            a Python float.

    Source: Divergence Minimization Preference Optimization, arXiv 2507.07510;
    AIDC-AI/Diffusion-SDPO, train.py, branch `dmpo`.
    """
    u = implied_logit(policy, reference, target, beta)
    chosen, rejected = _outcomes(u, preference, alpha)
    return _kl(chosen) + _kl(rejected)


@objective(
    needs_reference=True,
    needs_rejected=True,
    implied_logit=True,
    beta=Hyperparameter(5000.0, "inverse temperature, as published", "(0, inf)"),
    calibration=pulls.of_logit("label_smoothing"),
    label_smoothing=Hyperparameter(meaning="probability that a label is wrong", within="[0, 0.5]"),
)
def diffusion_dpo(
    policy: Pair,
    reference: Pair,
    target: Pair,
    preference: PerPair,
    *,
    beta: Beta,
    label_smoothing: float | int = 0.0,
) -> PerPair:
    """Direct preference optimisation: cross entropy of the label against the policy.

    With `q = clip(preference, label_smoothing, 1 - label_smoothing)`,

        loss = -q log p - (1 - q) log (1 - p).

    At preference 1 this is the published loss, smoothed or not; unsmoothed it has no
    minimum. A softer preference is the label itself, so a tie (0.5) has its minimum, log 2,
    at `u = 0`.

    Args:
        beta: inverse temperature, above 0; 5000 in published runs.
        label_smoothing: softening of the label, in [0, 0.5].

    Source: Diffusion Model Alignment Using Direct Preference Optimization, arXiv
    2311.12908; SalesforceAIResearch/DiffusionDPO, train.py.
    """
    u = implied_logit(policy, reference, target, beta)
    q = jnp.clip(preference, label_smoothing, 1 - label_smoothing)
    return -q * jax.nn.log_sigmoid(u) - (1 - q) * jax.nn.log_sigmoid(-u)


@objective(
    needs_reference=True,
    needs_rejected=True,
    implied_logit=True,
    beta=Hyperparameter(5000.0, "inverse temperature", "(0, inf)"),
    a=Hyperparameter(8.0, "weight of 1 - p beside -log p; 0 is diffusion_dpo"),
)
def poly_dpo(
    policy: Pair,
    reference: Pair,
    target: Pair,
    preference: PerPair,
    *,
    beta: Beta,
    a: float | int,
) -> PerPair:
    """DPO with one more term of its series: `-log p + a (1 - p)`.

    With q the label, both outcomes count (the paper has hard labels):

        loss = q (-log p + a (1 - p)) + (1 - q) (-log(1 - p) + a p)

    A positive a pulls harder on pairs near p = 1/2, a negative one pulls less. A tie is least at
    u = 0 for a above -2; a below -1 turns confident pairs away from their label.

    Args:
        beta: inverse temperature, above 0.
        a: 8 on Pick-a-Pic v2, negative on data that is trivially easy, 0 is `diffusion_dpo`.

    Source: ViPO, arXiv 2604.24953.
    """
    u = implied_logit(policy, reference, target, beta)
    right = -jax.nn.log_sigmoid(u) + a * jax.nn.sigmoid(-u)
    wrong = -jax.nn.log_sigmoid(-u) + a * jax.nn.sigmoid(u)
    return preference * right + (1 - preference) * wrong


@objective(
    needs_reference=True,
    needs_rejected=True,
    implied_logit=True,
    beta=Hyperparameter(2000.0, "inverse temperature", "(0, inf)"),
    calibration=pulls.of_logit("alpha"),
    alpha=LABEL_NOISE,
    order=Hyperparameter(0.5, "1 is dmpo, 0 diffusion_dpo smoothed", "[0, 1]"),
)
def alpha_divergence(
    policy: Pair,
    reference: Pair,
    target: Pair,
    preference: PerPair,
    *,
    beta: Beta,
    alpha: float | int,
    order: float | int,
) -> PerPair:
    """Amari's divergence of order a, from KL(q||p) at 0 to KL(p||q) at 1.

        loss = [1 - p^a q^(1-a) - (1 - p)^a (1 - q)^(1-a)] / (a (1 - a))

    Order 1 is `dmpo`. Order 0 is `diffusion_dpo` with label_smoothing = alpha, less the
    label's entropy, which is constant. Order 1/2 is four times the squared Hellinger distance.
    A tie holds the margin at 0.

    Args:
        beta: inverse temperature, above 0.
        alpha: softening of the label, which is clipped to [alpha, 1 - alpha]; in (0, 0.5].
        order: a, in [0, 1]; the ends are the limits, and no digits are lost near them.

    Source: Amari, Differential-Geometrical Methods in Statistics, 1985; for preferences of
    language models f-PO, arXiv 2410.21662.
    """
    u = implied_logit(policy, reference, target, beta)
    chosen, rejected = _outcomes(u, preference, alpha)
    if order < 0.5:  # exchanging p and q gives the divergence of order 1 - a
        chosen, rejected = (Outcome(log_q, log_p, -x) for log_p, log_q, x in (chosen, rejected))
        order = 1 - order
    if order == 1:
        return _kl(chosen) + _kl(rejected)
    return (_share_of_order(chosen, 1 - order) + _share_of_order(rejected, 1 - order)) / order


def _share_of_order(outcome: Outcome, c: float) -> PerPair:
    """`(b - a) - a (exp(c x) - 1) / c` of a = p and b = q, c in (0, 0.5]: never below 0.

    At c = 0 it is `_kl`. Nothing cancels as c or x goes to 0.
    """
    log_a, log_b, x = outcome
    a = jnp.exp(log_a)
    near = a * (_second_order(x) - _second_order(c * x) / c)
    # exp(log a + c x), since exp(c x) alone overflows: b = a exp(x) is at most 1, so a small a
    # has a large x. expm1 only near 0: its derivative is expm1 + 1, which loses all digits.
    close = jnp.abs(c * x) < 0.5
    small = a * jnp.expm1(jnp.where(close, c * x, 0.0))
    growth = jnp.where(close, small, jnp.exp(log_a + c * x) - a)
    return jnp.where(jnp.abs(x) < 0.5, near, jnp.exp(log_b) - a - growth / c)


@objective(
    needs_reference=True,
    needs_rejected=True,
    implied_logit=True,
    beta=Hyperparameter(2000.0, "inverse temperature", "(0, inf)"),
    calibration=pulls.of_logit("alpha"),
    alpha=LABEL_NOISE,
)
def jensen_shannon(
    policy: Pair,
    reference: Pair,
    target: Pair,
    preference: PerPair,
    *,
    beta: Beta,
    alpha: float | int,
) -> PerPair:
    """`KL(p||m)/2 + KL(q||m)/2` with m = (p + q)/2: symmetric, and at most log 2.

    A tie holds the margin at 0.

    Args:
        beta: inverse temperature, above 0.
        alpha: softening of the label, which is clipped to [alpha, 1 - alpha]; in (0, 0.5].

    Source: Lin, Divergence Measures Based on the Shannon Entropy, 1991; for preferences of
    language models f-PO, arXiv 2410.21662.
    """
    u = implied_logit(policy, reference, target, beta)
    chosen, rejected = _outcomes(u, preference, alpha)
    return _share_of_mean(chosen) + _share_of_mean(rejected)


def _share_of_mean(outcome: Outcome) -> PerPair:
    """One outcome's share of `KL(p||m)/2 + KL(q||m)/2`."""
    log_p, log_q, x = outcome
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    near, close = jnp.clip(x, -1.0, 1.0), jnp.abs(x) < 1
    from_p = jnp.where(close, jnp.log1p(0.5 * jnp.expm1(near)), log_m - log_p)
    from_q = jnp.where(close, jnp.log1p(0.5 * jnp.expm1(-near)), log_m - log_q)
    return 0.5 * (_share(log_p, log_m, from_p) + _share(log_q, log_m, from_q))
