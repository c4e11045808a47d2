"""Every objective once more, written the plain way in float64 NumPy, and a row for each.

To put an objective under test, add a row: hyperparameters that are right for it, and the same
loss from its formula.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Row(NamedTuple):
    args: dict[str, Any]  # for the arrays of conftest.triple, whose errors are about 2
    plain: Callable[..., Any]


def errors(x, target):
    return ((x - target) ** 2).mean((2, 3, 4))


def gains(policy, reference, target):
    # As a product: the two errors may be equal to all but their last digits.
    terms = (reference - policy) * ((reference - target) + (policy - target))
    return terms.mean((2, 3, 4))


def margin(policy, reference, target):
    gain = gains(policy, reference, target)
    return gain[:, 0] - gain[:, 1]


def logs(policy, reference, target, beta):
    """(u, log p, log (1 - p))"""
    u = 0.5 * beta * margin(policy, reference, target)
    return u, -np.logaddexp(0, -u), -np.logaddexp(0, u)


def bernoulli_kl(a, b):
    """KL of two pairs of logs."""
    return sum(np.exp(x) * (x - y) for x, y in zip(a, b, strict=True))


def label_logs(preference, alpha):
    q = np.clip(preference, alpha, 1 - alpha)
    return np.log(q), np.log(1 - q)


def dmpo(policy, reference, target, preference, *, beta, alpha):
    _, *p = logs(policy, reference, target, beta)
    return bernoulli_kl(p, label_logs(preference, alpha))


def diffusion_dpo(policy, reference, target, preference, *, beta, label_smoothing):
    _, log_p, log_not_p = logs(policy, reference, target, beta)
    q = np.clip(preference, label_smoothing, 1 - label_smoothing)
    return -q * log_p - (1 - q) * log_not_p


def alpha_divergence(policy, reference, target, preference, *, beta, alpha, order):
    _, *p = logs(policy, reference, target, beta)
    q = label_logs(preference, alpha)
    if order in (0, 1):
        return bernoulli_kl(p, q) if order else bernoulli_kl(q, p)
    # By expm1, or division by an order near 0 would leave nothing of float64.
    if order < 0.5:
        p, q, order = q, p, 1 - order
    total = 0.0
    for a, b in zip(p, q, strict=True):
        x = (1 - order) * (b - a)
        near, far = np.exp(a) * np.expm1(np.minimum(x, 1)), np.exp(a + np.maximum(x, 1)) - np.exp(a)
        total = total - np.where(x < 1, near, far)
    return total / (order * (1 - order))


def jensen_shannon(policy, reference, target, preference, *, beta, alpha):
    _, *p = logs(policy, reference, target, beta)
    q = label_logs(preference, alpha)
    m = [np.logaddexp(a, b) - np.log(2) for a, b in zip(p, q, strict=True)]
    return 0.5 * bernoulli_kl(p, m) + 0.5 * bernoulli_kl(q, m)


def sft(policy, reference, target, preference):
    return (preference != 0.5) * errors(policy, target)[:, 0]


def ipo(policy, reference, target, preference, *, beta):
    return (preference != 0.5) * (margin(policy, reference, target) - 1 / (2 * beta)) ** 2


def hinge(policy, reference, target, preference, *, beta):
    return (preference != 0.5) * np.maximum(0, 1 - beta * margin(policy, reference, target))


def dspo(policy, reference, target, preference, *, beta):
    _, _, log_not_p = logs(policy, reference, target, beta)
    way = (policy - reference)[:, 0]
    discount = (beta * np.exp(log_not_p))[:, None, None, None]
    score = (policy - target)[:, 0] - discount * way
    return (preference != 0.5) * (score**2).mean((1, 2, 3))


def diffusion_kto(
    policy, reference, target, preference, *, beta, chosen_weight, rejected_weight, held=None
):
    """held: the policy that z0 is taken from, since nothing is differentiated through it."""
    gain = gains(policy, reference, target)
    z0 = max(0.0, gains(policy if held is None else held, reference, target).mean())
    total = 0.0
    for side, sign, weight in ((0, 1, chosen_weight), (1, -1, rejected_weight)):
        # 1 - sigmoid(x) = exp(-log(1 + exp(x)))
        total = total + weight * np.exp(-np.logaddexp(0, sign * beta * (gain[:, side] - z0)))
    return (preference != 0.5) * total / 2


def mapo(policy, reference, target, preference, *, beta):
    error = errors(policy, target)
    with np.errstate(over="ignore"):
        f = np.where(error == 0, 1, 0.5 * error / np.expm1(0.5 * np.where(error == 0, 1, error)))
    ratio = -np.logaddexp(0, -1000 * (f[:, 0] - f[:, 1]))
    return (preference != 0.5) * (error[:, 0] - beta * ratio)


def poly_dpo(policy, reference, target, preference, *, beta, a):
    _, log_p, log_not_p = logs(policy, reference, target, beta)
    right = -log_p + a * (1 - np.exp(log_p))
    return preference * right + (1 - preference) * (-log_not_p + a * np.exp(log_p))


def linear_dpo(policy, reference, target, preference, *, beta, eta, held=None):
    delta = -margin(policy if held is None else held, reference, target)
    weight = np.clip(0.2 * beta * delta + 0.5, eta, 1 - eta)
    error = errors(policy, target)
    return (preference != 0.5) * weight * (error[:, 0] - error[:, 1])


def dspo_sdxl(policy, reference, target, preference, *, beta):
    _, _, log_not_p = logs(policy, reference, target, beta)
    moved = ((policy - reference)[:, 0] ** 2).mean((1, 2, 3))
    return (preference != 0.5) * np.exp(log_not_p) ** 2 * (moved if moved.mean() >= 0.1 else 1)


def nft(policy, reference, target, preference, *, b):
    total = 0.0
    for side, reward in enumerate((preference, 1 - preference)):
        for share, sign in ((reward, 1), (1 - reward, -1)):
            implied = (1 - sign * b) * reference + sign * b * policy
            total = total + share * errors(implied, target)[:, side] / b
    return total / 2


def nft_adaptive(policy, reference, target, preference, *, b, held=None):
    held, total = policy if held is None else held, 0.0
    for side, reward in enumerate((preference, 1 - preference)):
        for share, sign in ((reward, 1), (1 - reward, -1)):
            implied, still = ((1 - sign * b) * reference + sign * b * x for x in (policy, held))
            size = np.abs(still - target).mean((2, 3, 4))
            total = total + share * (errors(implied, target) / size)[:, side] / b
    return total / 2


HELD = ("diffusion_kto", "linear_dpo", "nft_adaptive")  # not differentiated through a part
ROWS = {
    "dmpo": Row({"beta": 5.0, "alpha": 0.1}, dmpo),
    "diffusion_dpo": Row({"beta": 5.0, "label_smoothing": 0.05}, diffusion_dpo),
    "alpha_divergence": Row({"beta": 5.0, "alpha": 0.1, "order": 0.3}, alpha_divergence),
    "jensen_shannon": Row({"beta": 5.0, "alpha": 0.1}, jensen_shannon),
    "sft": Row({}, sft),
    "ipo": Row({"beta": 0.5}, ipo),
    "hinge": Row({"beta": 0.5}, hinge),
    "dspo": Row({"beta": 0.7}, dspo),
    "diffusion_kto": Row(
        {"beta": 2.0, "chosen_weight": 1.5, "rejected_weight": 0.5}, diffusion_kto
    ),
    "mapo": Row({"beta": 0.1}, mapo),
    "poly_dpo": Row({"beta": 5.0, "a": 3.0}, poly_dpo),
    "linear_dpo": Row({"beta": 0.2, "eta": 0.05}, linear_dpo),
    "dspo_sdxl": Row({"beta": 0.7}, dspo_sdxl),
    "nft": Row({"b": 0.5}, nft),
    "nft_adaptive": Row({"b": 0.5}, nft_adaptive),
}
ARGS = {name: row.args for name, row in ROWS.items()}
