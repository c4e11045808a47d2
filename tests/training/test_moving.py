"""A reference that follows the policy, and the anchor around any objective."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dmpo_jax.config import checks, configs
from dmpo_jax.models.lora import Adapters
from dmpo_jax.objectives import OBJECTIVES, Anchor, errors, gains
from dmpo_jax.parallel import meshes
from dmpo_jax.training import step
from dmpo_jax.training.step import Moving
from tests.objectives.test_objectives import PREFERENCE
from tests.support import steps
from tests.support.steps import make_batch, make_small_setup, run_key, small

TX = optax.adamw(1e-2)


def states(moving, count=4, reference=None):
    """The states after each of `count` updates of two layers, and their metrics."""
    setup = make_small_setup()._replace(tx=TX, moving=moving)
    state = step.make_state(small(), TX, moving=moving is not None)
    update = jax.jit(functools.partial(step.train_step, setup=setup))
    found = []
    for seed in range(count):
        state, metrics = update(state, reference, make_batch(8, seed), run_key())
        found.append((state, metrics))
    return found


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_kept_whole_it_is_the_fixed_reference():
    fixed, moving = states(None, reference=small()), states(Moving(1.0))
    for (a, measured), (b, measured_too) in zip(fixed, moving, strict=True):
        assert_same(a.params, b.params)
        assert_same(b.moving, small())
        assert_same(measured, measured_too)
    assert float(measured["margin_abs_max"]) > 0


def test_not_kept_it_is_the_policy_of_the_last_update():
    for state, metrics in states(Moving(0.0)):
        assert_same(state.moving, state.params)
        assert float(metrics["margin_abs_max"]) == 0
        assert float(metrics["update_norm"]) > 0


def test_between_it_is_an_average_every_so_many_updates():
    found = [state for state, _ in states(Moving(0.75, every=2))]
    assert_same(found[0].moving, small())
    first = jax.tree.map(lambda r, p: 0.75 * r + 0.25 * p, small(), found[1].params)
    assert_same(found[1].moving, first)
    assert_same(found[2].moving, first)
    jax.tree.map(
        lambda got, r, p: np.testing.assert_allclose(got, 0.75 * r + 0.25 * p, rtol=1e-6),
        found[3].moving,
        first,
        found[3].params,
    )


def test_an_update_that_is_skipped_moves_nothing():
    setup = make_small_setup()._replace(tx=TX, moving=Moving(0.5))
    state = step.make_state(small(), TX, moving=True)
    away = state._replace(params=jax.tree.map(lambda x: 1.01 * x, state.params))
    batch = make_batch(8)
    batch.moments[:] = np.nan
    update = jax.jit(functools.partial(step.train_step, setup=setup))
    new, _ = update(away, None, batch, run_key())
    assert int(new.skipped) == 1
    assert_same(new.moving, state.moving)


@pytest.mark.long
@pytest.mark.parametrize("accumulation", [1, 2])
def test_eight_devices_are_one(accumulation):
    """Sharded as the parameters are; accumulated pairs see one reference."""
    setup = make_small_setup(accumulation)._replace(tx=TX, moving=Moving(0.5))

    def after_two(devices):
        mesh = meshes.make_mesh(data=-1, devices=jax.devices()[:devices])
        state = step.make_state(small(), TX, moving=True)
        state = jax.device_put(state, meshes.parameter_sharding(mesh, state))
        update = step.jit_train_step(setup, jax.tree.map(lambda x: x.sharding, state))
        rows = meshes.batch_sharding(mesh)
        for seed in range(2):
            batch = meshes.shard_batch(make_batch(16, seed), rows, 16)
            state, _ = update(state, None, batch, run_key())
        return state.moving

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
        after_two(8),
        after_two(1),
    )


@pytest.mark.long
def test_only_what_is_trained_is_kept_twice():
    """The frozen copy is gone; of adapters the reference is the base and the adapters' average."""
    from tests.families.test_flow_step import MODELS, make, make_batch, update

    fixed, _ = make("klein", 8, batch_size=2)
    built, state = make("klein", 8, batch_size=2, moving=Moving(0.5))
    assert set(fixed.reference) == set(state.params)
    assert built.reference is None
    assert set(state.moving) == set(state.params)
    adapted, state = make(
        "klein", 8, batch_size=2, moving=Moving(0.5), lora=Adapters(2, MODELS["klein"].targets)
    )
    assert not set(adapted.reference) & set(state.moving)
    before = jax.device_get(state.moving)
    state = state._replace(params=jax.tree.map(lambda x: x + 0.01, state.params))
    new, metrics = update(adapted, state, make_batch("klein", 2, 8))
    assert float(metrics["margin_abs_max"]) > 0
    for path, old in before.items():
        halfway = 0.5 * old + 0.5 * np.asarray(new.params[path])
        np.testing.assert_allclose(new.moving[path], halfway, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize(
    ("leaves", "words"),
    [
        ({"objective": "sft", "reference.decay": 0.9}, "which 'sft' does not use: unset it"),
        ({"model.reference": "x", "reference.decay": 0.9}, "model.reference names another"),
        ({"reference.decay": 1.5}, r"reference.decay must be in \[0, 1\]"),
        ({"anchor.kind": "hings"}, "anchor.kind must be one of '', sft, hinge"),
    ],
)
def test_what_does_not_fit_is_refused(leaves, words):
    config = configs.from_flat(
        {**configs.flatten(configs.defaults()), "model.folder": "somewhere", **leaves}
    )
    with pytest.raises(ValueError, match=words):
        checks.validate(config)


def test_an_anchored_sft_may_have_a_moving_reference():
    leaves = {"objective": "sft", "reference.decay": 0.9, "anchor.kind": "hinge"}
    config = configs.from_flat(
        {**configs.flatten(configs.defaults()), "model.folder": "somewhere", **leaves}
    )
    checks.validate(config)


def test_the_anchors_are_their_formulas(triple):
    policy, reference, target = triple
    label = jnp.asarray(PREFERENCE)
    decided = PREFERENCE != 0.5
    error, gain = errors(policy, target)[:, 0], gains(*triple)[:, 0]
    got = Anchor("sft", 0.5)(policy, None, target, label)
    np.testing.assert_allclose(got, 0.5 * decided * error, rtol=1e-6)
    got = Anchor("hinge", 2.0)(policy, reference, target, label)
    np.testing.assert_allclose(got, 2 * decided * np.maximum(0, -gain), rtol=1e-6)
    i = np.arange(24.0).reshape(2, 2, 2, 3, 1)
    golden = [
        jnp.asarray(x, jnp.float32) for x in (np.sin(i), np.cos(0.7 * i), np.sin(0.3 * i + 1))
    ]
    ones = jnp.ones(2)
    for kind, want in (("sft", (1.042515, 1.360851)), ("hinge", (0.0, 1.083427))):
        np.testing.assert_allclose(Anchor(kind, 1.0)(*golden, ones), want, rtol=1e-6, atol=1e-7)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sft", "hinge"])
def test_an_anchor_is_added_to_the_loss_of_each_pair(kind):
    """Its gradient too: the step's is the objective's and the anchor's."""
    away = jax.tree.map(lambda x: 1.05 * x, small())

    def gradient(anchor, objective):
        setup = make_small_setup(tx=steps.KEEP_GRADIENT)
        setup = setup._replace(anchor=anchor, objective=objective)
        state = step.make_state(away, steps.KEEP_GRADIENT)
        update = jax.jit(functools.partial(step.train_step, setup=setup))
        new, metrics = update(state, small(), make_batch(4), run_key())
        return new.opt_state, float(metrics["loss"])

    def nothing(policy, reference, target, preference):
        return 0.0 * policy.mean((1, 2, 3, 4))

    dmpo = functools.partial(OBJECTIVES["dmpo"], **steps.HYPERPARAMETERS)
    anchor = Anchor(kind, 0.3)
    (both, loss), (alone, plain), (pull, added) = (
        gradient(anchor, dmpo),
        gradient(None, dmpo),
        gradient(anchor, nothing),
    )
    assert added > 0
    assert loss == pytest.approx(plain + added, rel=1e-5)
    for path, want in pull.items():
        scale = np.abs(alone[path]).max()
        np.testing.assert_allclose(both[path], alone[path] + want, atol=1e-4 * scale, err_msg=path)
