"""Tests for dmpo_jax/objectives/pulls.py: beta times the number is what the loss depends on."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.objectives.registry import Hyperparameter, Objective
from dmpo_jax.training import health

DIVERGENCES = ("dmpo", "diffusion_dpo", "poly_dpo", "alpha_divergence", "jensen_shannon")
BETA = 3.0


def hyperparameters(name: str, **changes) -> dict:
    defaults = {k: v.default for k, v in OBJECTIVES[name].declared.items()}
    return {**defaults, "beta": BETA, **changes}


@pytest.fixture
def pairs():
    """Predictions of 64 pairs with hard, soft and tied labels, and their rows as one update."""
    keys = jax.random.split(jax.random.key(0), 3)
    policy, reference, target = (jax.random.normal(k, (64, 2, 3, 3, 1)) for k in keys)
    preference = np.tile(np.float32([1.0, 0.75, 0.5, 0.6]), 16)
    nothing = jnp.zeros(64)
    table = health.by_pair(
        policy, reference, target, jnp.asarray(preference), nothing.astype(int), nothing
    )
    names = dict(zip(health.FIELDS, np.asarray(table, np.float64), strict=True))
    rows = {name: row[None] for name, row in names.items()}
    return types.SimpleNamespace(images=(policy, reference, target), label=preference, rows=rows)


def loss_of(name: str, pairs, **given) -> np.ndarray:
    return np.asarray(
        OBJECTIVES[name](*pairs.images, jnp.asarray(pairs.label), **given), np.float64
    )


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_is_a_function_of_the_level(name, pairs):
    """And of its slope: it changes sign where the level is past the optimum."""
    given = hyperparameters(name)
    pull = OBJECTIVES[name].find_pull(**given)
    levels = BETA * pull.per_beta(pairs.rows)
    assert levels.shape == (64,)
    near = {
        sign: loss_of(name, pairs, **{**given, "beta": BETA * (1 + sign * 1e-2)})
        for sign in (-1, 1)
    }
    rising = (near[1] - near[-1]) * np.sign(levels) > 0
    if pull.optimum is not None:
        clear = np.abs(near[1] - near[-1]) > 1e-4
        np.testing.assert_array_equal(pull.optimum(pairs.rows, levels)[clear], rising[clear])
    assert (pull.optimum is None) == (name in ("diffusion_dpo", "poly_dpo"))


def test_kto_is_a_function_of_its_levels(pairs):
    pull = OBJECTIVES["diffusion_kto"].find_pull(**hyperparameters("diffusion_kto"))
    levels = BETA * pull.per_beta(pairs.rows)
    decided = pairs.label != 0.5
    assert levels.shape == (2 * decided.sum(),)
    expected = (1 / (1 + np.exp(levels))).reshape(2, -1).mean(0)
    found = loss_of("diffusion_kto", pairs, **hyperparameters("diffusion_kto"))[decided]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_the_margin_that_ipo_and_hinge_ask_for_has_level_1(pairs):
    decided = pairs.label != 0.5
    for name, loss in (
        ("ipo", lambda level: (level / 2 / BETA - 0.5 / BETA) ** 2),
        ("hinge", lambda level: np.maximum(0, 1 - level)),
    ):
        pull = OBJECTIVES[name].find_pull(**hyperparameters(name))
        levels = BETA * pull.per_beta(pairs.rows)
        found = loss_of(name, pairs, **hyperparameters(name))[decided]
        np.testing.assert_allclose(found, loss(levels), rtol=1e-4, atol=1e-6)
        assert (pull.target, pull.logit) == (1.0, False)


def test_the_weight_of_linear_dpo_is_at_its_bound_from_level_1_on():
    given = hyperparameters("linear_dpo", eta=0.1)
    pull = OBJECTIVES["linear_dpo"].find_pull(**given)
    margins = np.linspace(-1, 1.5, 26)[None]
    rows = {"margin": margins, "preference": np.ones_like(margins)}
    weight = np.clip(0.5 - 0.2 * BETA * margins[0], 0.1, 0.9)
    np.testing.assert_array_equal(BETA * pull.per_beta(rows) >= 1 - 1e-9, weight <= 0.1 + 1e-9)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sft", "has no beta: it looks at the chosen image alone. Choose optimizer.learning_rate"),
        ("mapo", "Keep objectives.mapo.beta=0.1"),
        ("dspo", "another beta is another loss. Keep objectives.dspo.beta=0.001"),
        ("nft", "has no beta: b mixes .* a published b"),
        ("nft_adaptive", "has no beta: b mixes .* a published b"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_with_what_to_do(name, words):
    with pytest.raises(ValueError, match=f"{name!r} cannot be calibrated: .*{words}"):
        OBJECTIVES[name].find_pull()


def test_every_objective_is_calibrated_or_refused():
    refused = set()
    for name, objective in OBJECTIVES.items():
        try:
            objective.find_pull(**{k: v.default for k, v in objective.declared.items()})
        except ValueError:
            refused.add(name)
    assert refused == {"sft", "mapo", "dspo", "nft", "nft_adaptive"}


def test_a_beta_without_effect_is_refused():
    with pytest.raises(ValueError, match=r"eta=0\.5.*Lower objectives\.linear_dpo\.eta"):
        OBJECTIVES["linear_dpo"].find_pull(**hyperparameters("linear_dpo", eta=0.5))


def test_an_objective_of_ones_own_needs_an_implied_logit():
    declared = {"beta": Hyperparameter(1.0)}
    own = Objective(lambda *a, **k: a[0], "own", True, True, False, declared)
    with pytest.raises(ValueError, match=r"'own' cannot be calibrated: .*implied_logit=True"):
        own.find_pull(beta=1.0)
    Objective(own.fn, "own", True, True, True, declared).find_pull(beta=1.0)
