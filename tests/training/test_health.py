"""Tests for dmpo_jax/training/health.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax.objectives import margin
from dmpo_jax.training import health

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


def measured(policy, reference, target, preference=None, timesteps=None, losses=None):
    """by_pair of some predictions, timesteps and losses made up where not given."""
    batch = policy.shape[0]
    timesteps = jnp.arange(batch) if timesteps is None else jnp.asarray(timesteps)
    losses = jnp.ones(batch) if losses is None else jnp.asarray(losses)
    label = None if preference is None else jnp.asarray(preference, jnp.float32)
    return health.by_pair(policy, reference, target, label, timesteps, losses)


def summary(policy, reference, target, preference=None):
    pairs = measured(policy, reference, target, preference)
    return health.summary(pairs, reference=reference is not None, rejected=policy.shape[1] == 2)


def test_values_against_float64(triple):
    policy, reference, target = (np.asarray(x, np.float64) for x in triple)
    error, base = ((x - target) ** 2 for x in (policy, reference))
    error, base = error.mean((2, 3, 4)), base.mean((2, 3, 4))
    gain = error - base
    got = jax.jit(summary)(*triple, jnp.ones(3))
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


def test_rows_bear_their_names(triple):
    pairs = measured(
        *triple, preference=[1.0, 0.5, 0.7], timesteps=[3, 999, 0], losses=[0.1, 0.2, 0.3]
    )
    assert pairs.shape == (len(health.FIELDS), 3)
    assert pairs.dtype == jnp.float32
    rows = dict(zip(health.FIELDS, np.asarray(pairs), strict=True))
    np.testing.assert_array_equal(rows["timestep"], [3, 999, 0])
    np.testing.assert_allclose(rows["preference"], [1.0, 0.5, 0.7])
    np.testing.assert_allclose(rows["loss"], [0.1, 0.2, 0.3])
    np.testing.assert_allclose(rows["margin"], rows["rejected_gain"] - rows["chosen_gain"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equal_policy_and_reference(dtype, triple):
    reference, _, target = ((30 * x).astype(dtype) for x in triple)
    # Under jit, where a difference of two means is fused unevenly and is not 0.
    got = jax.jit(summary)(reference, reference, target, jnp.ones(3))
    assert got["implicit_accuracy"] == 0.5
    for name in ("margin", "margin_abs_max", "chosen_gain", "rejected_gain"):
        assert got[name] == 0.0, name


def test_accuracy_counts_right_wrong_and_tied_pairs(triple):
    _, reference, target = triple
    # Pair 0 has the chosen image learned, pair 1 the rejected one, pair 2 nothing.
    policy = reference.at[0, 0].set(target[0, 0]).at[1, 1].set(target[1, 1])

    def accuracy(preference):
        return summary(policy, reference, target, preference)["implicit_accuracy"]

    assert accuracy(jnp.ones(3)) == 0.5
    np.testing.assert_allclose(accuracy([1.0, 0.5, 1.0]), 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(accuracy([0.5, 1.0, 1.0]), 1 / 3, rtol=1e-6)
    assert summary(policy, reference, target, [0.5, 1.0, 1.0])["ties"] == pytest.approx(1 / 3)


def test_means_of_parts_are_the_means_of_all(triple):
    preference = jnp.array([1.0, 0.5, 0.7])
    whole = summary(*triple, preference=preference)
    parts = [
        summary(*(x[i : i + 1] for x in triple), preference=preference[i : i + 1]) for i in range(3)
    ]
    for name in ALL - {"margin_abs_max"}:
        np.testing.assert_allclose(whole[name], np.mean([p[name] for p in parts]), rtol=1e-5)


def test_without_reference_errors_stand_for_gains(triple):
    policy, _, target = triple
    got = summary(policy, None, target)
    assert set(got) == ALL - {"chosen_gain", "rejected_gain"}
    better = summary(policy.at[:, 0].set(target[:, 0]), None, target)
    assert better["implicit_accuracy"] == 1
    np.testing.assert_allclose(better["margin"], better["rejected_error"], rtol=1e-6)


@pytest.mark.parametrize("with_reference", [True, False])
def test_without_rejected_images_there_is_no_margin(with_reference, triple):
    policy, reference, target = (x[:, :1] for x in triple)
    got = summary(policy, reference if with_reference else None, target, jnp.full(3, 0.5))
    for name in ("implicit_accuracy", "margin", "margin_abs_max"):
        assert np.isnan(got[name]), name
    assert not {"rejected_error", "rejected_gain"} & set(got)
    assert ("chosen_gain" in got) == with_reference
    np.testing.assert_allclose(got["chosen_error"], summary(*triple)["chosen_error"], rtol=1e-6)


def test_a_broken_pair_shows(triple):
    policy, reference, target = triple
    got = summary(policy.at[0].set(jnp.nan), reference, target)
    assert np.isnan(got["implicit_accuracy"])
    assert np.isnan(got["margin_abs_max"])


def table(**rows):
    """by_pair's matrix from rows; what is not given is 1."""
    batch = len(next(iter(rows.values())))
    whole = {name: np.ones(batch) for name in health.FIELDS} | rows
    return np.stack([whole[name] for name in health.FIELDS]).astype(np.float32)


def test_curves_of_the_logit():
    margins = np.linspace(-10, 10, 101)
    curves = health.Curves(beta=4.0, alpha=0.1, timesteps=1000)
    got = curves.add(table(margin=margins))
    u = 2 * margins
    assert got["logit"] == pytest.approx(u.mean(), abs=1e-6)
    assert got["margin_p05"] == pytest.approx(-9, abs=1e-6)
    assert got["margin_p50"] == pytest.approx(0, abs=1e-6)
    assert got["logit_p95"] == pytest.approx(18, abs=1e-5)
    p = 1 / (1 + np.exp(-u))
    assert got["saturation"] == pytest.approx((p * (1 - p) < 0.01).mean())
    assert got["past_optimum"] == pytest.approx((u > np.log(9)).mean())
    # Each pair has its own optimum: a tie's is 0.
    tied = curves.add(table(margin=margins, preference=np.full(101, 0.5)))
    assert tied["past_optimum"] == pytest.approx((u > 0).mean())


def test_curves_say_only_what_an_objective_has():
    pairs = table(margin=np.array([1.0, 2.0]))
    assert set(health.Curves(beta=None, alpha=None, timesteps=10).add(pairs)) == {
        "margin_p05",
        "margin_p50",
        "margin_p95",
    }
    unsmoothed = health.Curves(beta=1.0, alpha=0.0, timesteps=10).add(pairs)
    assert "past_optimum" not in unsmoothed
    assert "saturation" in unsmoothed
    for broken in (table(margin=np.array([np.nan, 1.0])), table(margin=np.array([1e30, -1e30]))):
        found = health.Curves(beta=5000.0, alpha=0.1, timesteps=10).add(broken)
        assert all(np.isfinite(value) for value in found.values())


def test_curves_by_timestep_are_means_over_all_updates_since_the_last():
    curves = health.Curves(beta=2.0, alpha=None, timesteps=1000)
    assert curves.take() == {}
    curves.add(table(timestep=np.array([0, 99, 100]), loss=np.array([1.0, 3.0, 7.0])))
    curves.add(table(timestep=np.array([50, 999]), margin=np.array([-1.0, 5.0])))
    got = curves.take()
    assert got["loss_by_timestep/000-099"] == pytest.approx((1 + 3 + 1) / 3)
    assert got["loss_by_timestep/100-199"] == 7
    assert got["logit_by_timestep/900-999"] == 5
    assert got["saturation_by_timestep/900-999"] == 1
    assert got["saturation_by_timestep/000-099"] == 0
    assert got["implicit_accuracy_by_timestep/000-099"] == pytest.approx(2 / 3)
    assert not any("500-599" in name for name in got)  # nobody was there
    assert curves.take() == {}


def test_curves_by_timestep_leave_out_what_does_not_exist():
    curves = health.Curves(beta=None, alpha=None, timesteps=1000)
    curves.add(table(timestep=np.array([1.0]), margin=np.array([np.nan])))
    got = curves.take()
    assert "loss_by_timestep/000-099" in got
    assert "margin_by_timestep/000-099" not in got
