"""Reverse KL over K candidates tends to reinforcement learning as K grows, and forward KL does not.

Letters: y one of five outcomes, rho the reference, pi = softmax(theta) the policy, r the reward,
b the policy's inverse temperature, tau the reward's temperature; y_1 ... y_K drawn from rho.

    w(y) = (pi(y) / rho(y))^b      p_i = w(y_i) / sum_j w(y_j)      what the policy implies
    v(y) = exp(r(y) / tau)         q_i = v(y_i) / sum_j v(y_j)      what the reward says
    reverse_K = E KL(p || q)       forward_K = E KL(q || p)

With K = 2 and b = beta, p is sigmoid(u), so reverse_2 is `dmpo` at preference q.

As K grows, sums over candidates become K times means under rho. The mean of w f is Z E_tilted f,
where tilted = rho w / Z = rho^(1 - b) pi^b / Z: the policy itself where b = 1. The mean of v f is
Z' E_optimum f, where optimum = rho exp(r / tau) / Z'. So p_i acts as tilted / (rho K), q_i as
optimum / (rho K), and

    reverse_K -> KL(tilted || optimum) = log Z' - J(tilted) / tau,
    J(x) = E_x r - tau KL(x || rho),

    grad reverse_K -> -grad J(tilted) / tau, and grad forward_K -> grad KL(optimum || tilted).

Both are smooth functions of K-means, whose variances fall as 1/K: so does the error of each.
Nothing here is sampled. The expectation is a sum over how often each outcome was drawn, every
multiset of K weighed by its multinomial probability; gradients are JAX's, in float64.

Source: Towards Efficient Exact Optimization of Language Model Alignment (EXO), arXiv 2402.00856.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import logsumexp

from dmpo_jax.objectives import OBJECTIVES

REFERENCE = np.array([0.30, 0.25, 0.20, 0.15, 0.10])
REWARD = np.array([0.2, -1.0, 1.3, 0.1, 0.9])
THETA = np.log([0.45, 0.20, 0.05, 0.20, 0.10])  # leans away from what the reward likes
CANDIDATES = (5, 10, 20, 40)
# (b, tau): the policy itself; a warmer and a colder reward; the policy tilted either way.
TEMPERATURES = [(1.0, 1.0), (1.0, 2.0), (1.0, 0.7), (0.5, 1.0), (1.5, 1.0)]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def counts_and_weights(candidates):
    """Returns counts of each outcome `[M, 5]` and their probabilities `[M]`."""
    outcomes = len(REFERENCE)
    slots = range(candidates + outcomes - 1)
    bars = np.array(list(itertools.combinations(slots, outcomes - 1)))
    edges = np.pad(bars, [(0, 0), (1, 1)], constant_values=((0, 0), (-1, slots.stop)))
    counts = np.diff(edges) - 1
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, candidates + 1)))])
    log_weight = log_factorial[-1] - log_factorial[counts].sum(1) + counts @ np.log(REFERENCE)
    return counts, np.exp(log_weight)


def policy_of(theta):
    return theta - logsumexp(theta)


def divergence_over_candidates(theta, counts, weights, b, tau, *, reverse):
    """E KL(p || q), or E KL(q || p), over the candidates. Equal candidates add up."""
    log_w = jnp.broadcast_to(b * (policy_of(theta) - np.log(REFERENCE)), counts.shape)
    log_v = jnp.broadcast_to(REWARD / tau, counts.shape)
    log_p = log_w - logsumexp(log_w, b=counts, axis=1, keepdims=True)
    log_q = log_v - logsumexp(log_v, b=counts, axis=1, keepdims=True)
    first, second = (log_p, log_q) if reverse else (log_q, log_p)
    return weights @ (counts * jnp.exp(first) * (first - second)).sum(1)


GRADIENT = jax.jit(jax.grad(divergence_over_candidates), static_argnames="reverse")


@functools.cache
def candidate_gradient(candidates, b, tau, *, reverse):
    arguments = (*counts_and_weights(candidates), b, tau)
    return np.asarray(GRADIENT(jnp.asarray(THETA), *arguments, reverse=reverse))


def tilted_policy(theta, b):
    log_tilted = (1 - b) * np.log(REFERENCE) + b * policy_of(theta)
    return log_tilted - logsumexp(log_tilted)


def rl_gradient(b, tau):
    """Gradient of J(tilted): expected reward less tau times KL to the reference."""

    def j(theta):
        log_tilted = tilted_policy(theta, b)
        tilted = jnp.exp(log_tilted)
        return tilted @ REWARD - tau * tilted @ (log_tilted - np.log(REFERENCE))

    return np.asarray(jax.grad(j)(jnp.asarray(THETA)))


def forward_gradient(b, tau):
    """Gradient of KL(optimum || tilted)."""
    optimum = REFERENCE * np.exp(REWARD / tau)
    optimum /= optimum.sum()

    def forward(theta):
        return optimum @ (np.log(optimum) - tilted_policy(theta, b))

    return np.asarray(jax.grad(forward)(jnp.asarray(THETA)))


def errors(limit, b, tau, *, reverse):
    """Distance from the limit at each of CANDIDATES, as a part of the limit's length."""
    found = [candidate_gradient(k, b, tau, reverse=reverse) for k in CANDIDATES]
    return np.linalg.norm(np.array(found) - limit, axis=1) / np.linalg.norm(limit)


def rate(error):
    """The power of K that the error falls with, by least squares over the last three."""
    return np.polyfit(np.log(CANDIDATES[-3:]), np.log(error[-3:]), 1)[0]


@pytest.mark.parametrize("candidates", [1, 2, 7])
def test_every_draw_is_counted_once(candidates):
    counts, weights = counts_and_weights(candidates)
    assert (counts.sum(1) == candidates).all()
    assert len(np.unique(counts, axis=0)) == len(counts)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)
    np.testing.assert_allclose(weights @ counts, candidates * REFERENCE, rtol=1e-12)


@pytest.mark.parametrize("b", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("reverse", [True, False])
def test_two_candidates_are_the_objectives_of_pairs(b, reverse):
    log_ratio = np.log(np.exp(THETA) / REFERENCE)
    u, gap = (b * (x[:, None] - x[None]) for x in (log_ratio, REWARD / b))
    q = 1 / (1 + np.exp(-gap))
    # Two predictions of one number, of which the first brings u: see `margin`.
    policy = np.stack([np.zeros(25), np.sqrt(np.maximum(u, 0)).ravel()], 1)
    reference = np.stack([np.zeros(25), np.sqrt(np.maximum(-u, 0)).ravel()], 1)
    images = [jnp.asarray(x, jnp.float32)[:, :, None, None, None] for x in (policy, reference)]
    name, extra = ("dmpo", {"alpha": 1e-6}) if reverse else ("diffusion_dpo", {})
    preference = jnp.asarray(q.ravel(), jnp.float32)
    loss = OBJECTIVES[name](*images, jnp.zeros_like(images[0]), preference, beta=2.0, **extra)
    loss = np.asarray(loss, np.float64).reshape(5, 5)
    if not reverse:  # cross entropy is KL(q || p) and the label's own entropy
        loss += q * np.log(q) + (1 - q) * np.log(1 - q)
    counts, weights = counts_and_weights(2)
    ours = divergence_over_candidates(jnp.asarray(THETA), counts, weights, b, 1.0, reverse=reverse)
    np.testing.assert_allclose(ours, REFERENCE @ loss @ REFERENCE, rtol=2e-6)


@pytest.mark.parametrize(("b", "tau"), TEMPERATURES)
def test_reverse_kl_over_candidates_becomes_the_rl_gradient(b, tau):
    error = errors(-rl_gradient(b, tau) / tau, b, tau, reverse=True)
    assert -1.15 < rate(error) < -0.9, error
    assert error[-1] < 0.1, error
    # What is left is c / K and smaller terms: two sizes tell c, and without it little is left.
    k, twice = (candidate_gradient(n, b, tau, reverse=True) for n in CANDIDATES[-2:])
    limit = -rl_gradient(b, tau) / tau
    assert np.linalg.norm(2 * twice - k - limit) < 0.02 * np.linalg.norm(limit)


@pytest.mark.parametrize(("b", "tau"), TEMPERATURES)
def test_forward_kl_over_candidates_does_not(b, tau):
    away = errors(-rl_gradient(b, tau) / tau, b, tau, reverse=False)
    assert away[-1] > 0.25, away
    assert rate(away) > -0.1, away  # it does not come nearer
    # It goes, as fast, to a gradient of its own.
    error = errors(forward_gradient(b, tau), b, tau, reverse=False)
    assert -1.15 < rate(error) < -0.9, error
    assert error[-1] < 0.1, error


def test_the_tilt_matters():
    """At b = 0.5 the limit is RL of the tilted policy, not of the policy."""
    wrong = errors(-rl_gradient(1.0, 1.0), 0.5, 1.0, reverse=True)
    assert wrong[-1] > 0.25, wrong


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize(("b", "tau"), TEMPERATURES)
def test_the_optimum_is_stationary_with_any_number_of_candidates(b, tau, reverse):
    optimum = jnp.asarray(np.log(REFERENCE) + REWARD / (b * tau))  # its tilt is rho exp(r / tau)
    for candidates in (2, 8):
        arguments = (*counts_and_weights(candidates), b, tau)
        found = GRADIENT(optimum, *arguments, reverse=reverse)
        np.testing.assert_allclose(found, 0, atol=1e-14)


@pytest.mark.long
@pytest.mark.parametrize("alpha", [0.01, 0.1])
@pytest.mark.parametrize("gap", [-3.0, 0.2, 1.0, 4.0])
def test_drawn_labels_lead_dmpo_elsewhere_than_probabilities_do(alpha, gap):
    """One Bradley-Terry choice a pair: DPO still finds the reward's difference, DMPO does not.

    The choice's mean is s = sigmoid(gap). Cross entropy is linear in the label, so that DPO sees s.
    Reverse KL is linear in the label's logit, +-logit(1 - alpha), whose mean is where u comes to
    rest: (2 s - 1) logit(1 - alpha) = tanh(gap / 2) logit(1 - alpha), bounded, and not a
    difference of rewards any more. With s itself as the preference both come to rest at gap.
    """
    s = 1 / (1 + np.exp(-gap))
    rest = np.tanh(gap / 2) * np.log((1 - alpha) / alpha)

    def slope(name, u, preference, **more):
        def loss(u):
            # One number an image: the rejected one's policy brings u + 10, its reference 10.
            images = jnp.stack([jnp.zeros(()), jnp.sqrt(u + 10)])[None, :, None, None, None]
            reference = jnp.stack([0.0, jnp.sqrt(10.0)])[None, :, None, None, None]
            zero = jnp.zeros_like(images)
            label = jnp.full(1, preference)
            return OBJECTIVES[name](images, reference, zero, label, beta=2.0, **more)[0]

        return float(jax.grad(loss)(jnp.asarray(u)))

    def over_draws(name, u, **more):
        return s * slope(name, u, 1.0, **more) + (1 - s) * slope(name, u, 0.0, **more)

    assert abs(over_draws("dmpo", rest, alpha=alpha)) < 1e-5
    assert abs(over_draws("diffusion_dpo", gap)) < 1e-5
    assert abs(over_draws("dmpo", gap, alpha=alpha)) > 1e-3
    assert abs(slope("dmpo", gap, s, alpha=1e-6)) < 1e-5
