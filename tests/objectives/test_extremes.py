"""Hyperparameters at the ends of their ranges, and what an objective says of its batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax.config import configs
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.objectives.interval import Interval
from dmpo_jax.objectives.registry import LARGEST, SMALLEST

EACH = [(name, argument) for name, o in OBJECTIVES.items() for argument in o.declared]


def defaults(name) -> dict[str, float]:
    return {argument: h.default for argument, h in OBJECTIVES[name].declared.items()}


def pairs(scale=1.0, moved=1.0):
    rng = np.random.default_rng(0)
    target, off, way = (jnp.asarray(rng.normal(size=(4, 2, 2, 2, 1)), jnp.float32) for _ in "abc")
    reference = target + off
    return scale * (reference + moved * way), scale * reference, scale * target


@pytest.mark.long
@pytest.mark.parametrize(("name", "argument"), EACH)
def test_the_loss_is_finite_at_the_ends_of_what_is_accepted(name, argument):
    label = jnp.asarray([1.0, 0.5, 0.7, 0.9])
    for value in (SMALLEST, LARGEST):
        given = {**defaults(name), argument: value}
        if value not in Interval(OBJECTIVES[name].declared[argument].within):
            continue

        @jax.jit
        @jax.value_and_grad
        def loss(policy, reference, target, given=given):
            return OBJECTIVES[name](policy, reference, target, label, **given).mean()

        for scale, moved in ((1e-4, 0.0), (1e-4, 1.0), (100.0, 1e-4), (100.0, 1.0)):
            found, gradient = loss(*pairs(scale, moved))
            assert np.isfinite(found), (value, scale, moved)
            assert np.isfinite(gradient).all(), (value, scale, moved)


@pytest.mark.parametrize("value", [1e-300, 1e-39, 1e-20, 1e20, 3e38, 1e39, float("nan")])
def test_a_size_that_float32_cannot_work_with_is_refused(value):
    for name, argument in EACH:
        with pytest.raises(ValueError, match=argument):
            OBJECTIVES[name].check(**{**defaults(name), argument: value})


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_says_whether_a_pair_depends_on_the_others(name):
    given = defaults(name)
    same = []
    for scale, others in ((0.05, 0.2), (1.0, 0.9)):  # small margins, and others that are large
        _, reference, target = pairs(scale)
        share = jnp.asarray([0.2, others, others, others]).reshape(-1, 1, 1, 1, 1)
        policy = reference - share * (reference - target)
        found = OBJECTIVES[name](policy, reference, target, **given)
        alone = OBJECTIVES[name](policy[:1], reference[:1], target[:1], **given)
        same.append(np.allclose(found[:1], alone, rtol=1e-5))
    assert all(same) != OBJECTIVES[name].couples_pairs


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({}, False),
        ({"objective": "diffusion_dpo"}, False),
        ({"lora.rank": 4}, False),
        ({"lora.dropout": 0.1}, False),
        ({"objective": "diffusion_kto"}, True),
        ({"safeguard.mu": 0.9}, True),
        ({"lora.rank": 4, "lora.dropout": 0.1}, True),
    ],
)
def test_accumulation_is_of_the_run_where_an_update_depends_on_it(changes, counts):
    flat = configs.flatten(configs.defaults()) | changes
    one, two, four = (
        configs.identity(configs.from_flat({**flat, "train.accumulation": n})) for n in (1, 2, 4)
    )
    assert (one != two) == (two != four) == counts


def test_the_vae_is_of_the_run():
    flat = configs.flatten(configs.defaults())
    before, after = (
        configs.identity(configs.from_flat({**flat, "model.vae": vae})) for vae in ("", "other")
    )
    assert before != after
