"""Tests for dmpo_jax/objectives/safeguard.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax.objectives import OBJECTIVES, winner_preserving
from tests.support.plain_objectives import ARGS


def lambda_in_float64(policy, target, mu):
    error = np.asarray(policy, np.float64) - np.asarray(target, np.float64)
    inner = (error[:, 0] * error[:, 1]).sum()
    if inner <= 0:
        return 1.0
    return min(1.0, (1 - mu) * (error[:, 0] ** 2).sum() / inner)


def alike(triple):
    """Predictions whose errors on the two images point the same way."""
    policy, reference, target = triple
    return policy.at[:, 1].set(target[:, 1] + 1.5 * (policy - target)[:, 0]), reference, target


@pytest.mark.long
@pytest.mark.parametrize("name", [n for n in ARGS if OBJECTIVES[n].needs_rejected])
def test_the_loss_stays_and_the_rejected_gradient_is_scaled(name, triple):
    policy, reference, target = alike(triple)

    def loss(p, mu):
        scale = None
        if mu is not None:
            p, scale = winner_preserving(p, target, mu=mu)
        return OBJECTIVES[name](p, reference, target, **ARGS[name]).sum(), scale

    (plain, _), free = jax.value_and_grad(loss, has_aux=True)(policy, None)
    (held, scale), safe = jax.value_and_grad(loss, has_aux=True)(policy, 0.9)
    want = lambda_in_float64(policy, target, 0.9)
    assert 0 < want < 1
    np.testing.assert_allclose(scale, want, rtol=1e-5)
    np.testing.assert_allclose(held, plain, rtol=1e-6)
    np.testing.assert_allclose(safe[:, 0], free[:, 0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(safe[:, 1], want * free[:, 1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9, 1.0])
def test_lambda_against_float64(mu, triple):
    for policy, _, target in (triple, alike(triple)):
        for sign in (1, -1):
            turned = policy.at[:, 1].set(target[:, 1] + sign * (policy - target)[:, 1])
            _, scale = winner_preserving(turned, target, mu=mu)
            np.testing.assert_allclose(scale, lambda_in_float64(turned, target, mu), rtol=1e-5)


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
def test_to_first_order_the_chosen_error_falls(mu, triple):
    """A model of one vector of shifts, added to both images: its gradient sums the branches."""
    policy, _, target = alike(triple)

    def chosen_error(shift):
        return jnp.square(policy[:, 0] + shift[:, 0] - target[:, 0]).sum()

    def margin_of_errors(shift):  # what every objective pulls at: l_c down, l_x up
        moved, _ = winner_preserving(policy + shift, target, mu=mu)
        error = jnp.square(moved - target)
        return (error[:, 0] - error[:, 1]).sum()

    zero = jnp.zeros((1, 1, *policy.shape[2:]))
    # All in one direction of predictions, as the rule assumes.
    update = -jax.grad(margin_of_errors)(zero)
    before, after = chosen_error(zero), chosen_error(zero + 1e-4 * update)
    assert after <= before * (1 + 1e-6)


def test_nothing_to_preserve_is_finite(triple):
    _, _, target = triple

    def loss(p):
        return winner_preserving(p, target, mu=0.9)[0].sum()

    for policy in (target, target.at[:, 1].add(1.0), 1e4 * target):
        moved, scale = winner_preserving(policy, target, mu=0.9)
        assert np.isfinite(scale)
        np.testing.assert_array_equal(moved, policy)
        assert np.isfinite(np.asarray(jax.grad(loss)(policy))).all()


@pytest.mark.parametrize("mu", [-0.1, 1.1, float("nan")])
def test_mu_is_refused(mu, triple):
    with pytest.raises(ValueError, match=rf"\[0, 1\], got mu={mu}"):
        winner_preserving(triple[0], triple[2], mu=mu)
