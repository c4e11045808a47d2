"""Tests for dmpo_jax/objectives/registry.py: what is refused, and how objectives are known."""

import jax
import numpy as np
import pytest

from dmpo_jax import objectives
from dmpo_jax.objectives import OBJECTIVES, diffusion_dpo, dmpo
from tests.support.plain_objectives import ARGS, ROWS


@pytest.mark.parametrize("alpha", [0.0, -0.1, 0.51, 1.0, float("nan")])
def test_dmpo_refuses_alpha(alpha, triple):
    with pytest.raises(ValueError, match=rf"\(0, 0.5\], got alpha={alpha}"):
        dmpo(*triple, beta=1.0, alpha=alpha)


@pytest.mark.parametrize("name", ["dmpo", "diffusion_dpo"])
@pytest.mark.parametrize("beta", [0.0, -1.0, float("inf"), float("nan")])
def test_beta_must_be_positive(name, beta, triple):
    with pytest.raises(ValueError, match=f"got beta={beta}"):
        OBJECTIVES[name](*triple, **(ARGS[name] | {"beta": beta}))


@pytest.mark.parametrize("smoothing", [-0.1, 0.6])
def test_dpo_refuses_label_smoothing(smoothing, triple):
    with pytest.raises(ValueError, match=f"label_smoothing={smoothing}"):
        diffusion_dpo(*triple, beta=1.0, label_smoothing=smoothing)


def test_a_name_is_defined_once():
    with pytest.raises(ValueError, match="'dmpo' is already defined"):

        @objectives.objective(needs_reference=True, needs_rejected=True)
        def dmpo(policy, reference, target, preference):
            return preference

    assert OBJECTIVES["dmpo"] is objectives.dmpo


def test_objectives_are_static_arguments(triple):
    call = jax.jit(lambda objective, *x: objective(*x, beta=1.0, alpha=0.1), static_argnums=0)
    np.testing.assert_allclose(call(dmpo, *triple), dmpo(*triple, beta=1.0, alpha=0.1), rtol=1e-6)


BAD = [
    ("alpha_divergence", "order", -0.1, r"\[0, 1\], got order=-0.1; 1 is dmpo"),
    ("alpha_divergence", "alpha", 0.0, r"\(0, 0.5\], got alpha=0.0"),
    ("jensen_shannon", "alpha", 0.6, r"\(0, 0.5\], got alpha=0.6"),
    ("diffusion_kto", "chosen_weight", -1.0, "at least 0, got chosen_weight=-1.0"),
    ("diffusion_kto", "rejected_weight", float("inf"), "got rejected_weight=inf"),
    *(
        (name, "beta", 0.0, "above 0, got beta=0.0")
        for name in sorted(ROWS)
        if "beta" in ARGS[name]
    ),
]


@pytest.mark.parametrize(("name", "argument", "value", "words"), BAD)
def test_hyperparameters_are_checked_without_computing(name, argument, value, words):
    OBJECTIVES[name].check(**ARGS[name])
    with pytest.raises(ValueError, match=words):
        OBJECTIVES[name].check(**(ARGS[name] | {argument: value}))


def test_check_names_what_is_missing_or_unknown():
    diffusion_dpo.check(beta=1.0)  # label_smoothing has a default
    with pytest.raises(ValueError, match=r"'dmpo' takes \['alpha', 'beta'\], got \['beta'\]"):
        dmpo.check(beta=1.0)
    with pytest.raises(ValueError, match=r"got \['alpha', 'beta', 'gamma'\]"):
        dmpo.check(beta=1.0, alpha=0.1, gamma=1.0)
