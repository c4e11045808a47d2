"""Tests for dmpo_jax/health.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax.health import preference_health
from dmpo_jax.objectives import margin

ALL = {
    "implicit_accuracy",
    "ties",
    "margin",
    "margin_abs_max",
    "chosen_error",
    "rejected_error",
    "chosen_gain",
    "rejected_gain",
}


def test_values_against_float64(triple):
    policy, reference, target = (np.asarray(x, np.float64) for x in triple)
    error, base = ((x - target) ** 2 for x in (policy, reference))
    error, base = error.mean((2, 3, 4)), base.mean((2, 3, 4))
    gain = error - base
    got = jax.jit(preference_health)(*triple, jnp.ones(3))
    want = {
        "implicit_accuracy": (gain[:, 1] > gain[:, 0]).mean(),
        "ties": 0.0,
        "margin": (gain[:, 1] - gain[:, 0]).mean(),
        "margin_abs_max": np.abs(gain[:, 1] - gain[:, 0]).max(),
        "chosen_error": error[:, 0].mean(),
        "rejected_error": error[:, 1].mean(),
        "chosen_gain": gain[:, 0].mean(),
        "rejected_gain": gain[:, 1].mean(),
    }
    assert set(got) == set(want) == ALL
    for name, value in got.items():
        assert value.shape == ()
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, want[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(got["margin"], margin(*triple).mean(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equal_policy_and_reference(dtype, triple):
    reference, _, target = ((30 * x).astype(dtype) for x in triple)
    # Under jit, where a difference of two means is fused unevenly and is not 0.
    got = jax.jit(preference_health)(reference, reference, target, jnp.ones(3))
    assert got["implicit_accuracy"] == 0.5
    for name in ("margin", "margin_abs_max", "chosen_gain", "rejected_gain"):
        assert got[name] == 0.0, name


def test_accuracy_counts_right_wrong_and_tied_pairs(triple):
    _, reference, target = triple
    # Pair 0 has the chosen image learned, pair 1 the rejected one, pair 2 nothing.
    policy = reference.at[0, 0].set(target[0, 0]).at[1, 1].set(target[1, 1])

    def accuracy(preference):
        return preference_health(policy, reference, target, preference)

    assert accuracy(jnp.ones(3))["implicit_accuracy"] == 0.5
    np.testing.assert_allclose(
        accuracy(jnp.array([1.0, 0.5, 1.0]))["implicit_accuracy"], 2 / 3, rtol=1e-6
    )
    tied = accuracy(jnp.array([0.5, 1.0, 1.0]))
    np.testing.assert_allclose(tied["implicit_accuracy"], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(tied["ties"], 1 / 3, rtol=1e-6)
    chosen_only = accuracy(None)
    assert chosen_only["chosen_gain"] < 0
    assert chosen_only["rejected_gain"] < 0


def test_metrics_of_microbatches_average_to_the_batch(triple):
    preference = jnp.array([1.0, 0.5, 0.8])
    whole = preference_health(*triple, preference)
    parts = [
        preference_health(*(x[i : i + 1] for x in triple), preference[i : i + 1]) for i in range(3)
    ]
    for name in ALL - {"margin_abs_max"}:
        np.testing.assert_allclose(
            np.mean([part[name] for part in parts]), whole[name], rtol=1e-5, err_msg=name
        )


def test_without_reference_the_margin_is_of_errors(triple):
    policy, _, target = triple
    got = preference_health(policy, None, target, jnp.ones(3))
    assert set(got) == ALL - {"chosen_gain", "rejected_gain"}
    np.testing.assert_allclose(
        got["margin"], got["rejected_error"] - got["chosen_error"], atol=1e-6
    )
    better = preference_health(policy.at[:, 0].set(target[:, 0]), None, target, jnp.ones(3))
    assert better["implicit_accuracy"] == 1


@pytest.mark.parametrize("with_reference", [True, False])
def test_without_rejected_images(with_reference, triple):
    policy, reference, target = (x[:, :1] for x in triple)
    preference = jnp.array([1.0, 0.5, 1.0])
    got = preference_health(policy, reference if with_reference else None, target, preference)
    pairless = ALL - {"rejected_error", "rejected_gain"}
    assert set(got) == (pairless if with_reference else pairless - {"chosen_gain"})
    for name in ("implicit_accuracy", "margin", "margin_abs_max"):
        assert np.isnan(got[name])
    np.testing.assert_allclose(
        got["chosen_error"], preference_health(*triple, None)["chosen_error"], rtol=1e-6
    )


def test_small_gains_survive_float32(triple):
    _, reference, target = triple
    policy = reference + 1e-5 * jnp.sin(1e3 * reference)
    p, r, t = (np.asarray(x, np.float64) for x in (policy, reference, target))
    want = ((p - t) ** 2 - (r - t) ** 2).mean((0, 2, 3, 4))
    got = preference_health(policy, reference, target, None)
    np.testing.assert_allclose([got["chosen_gain"], got["rejected_gain"]], want, rtol=1e-4)


def test_ties_do_not_hide_that_there_is_no_accuracy(triple):
    got = preference_health(*(x[:, :1] for x in triple), jnp.full(3, 0.5))
    assert np.isnan(got["implicit_accuracy"])


def test_non_finite_predictions_are_not_counted_as_right(triple):
    policy, reference, target = triple
    got = preference_health(policy.at[0].set(jnp.nan), reference, target, jnp.ones(3))
    assert np.isnan(got["implicit_accuracy"])
    assert np.isnan(got["margin_abs_max"])
