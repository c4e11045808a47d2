"""Tests for dmpo_jax/objectives.py."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax import objectives
from dmpo_jax.objectives import OBJECTIVES, diffusion_dpo, dmpo, margin, sft

# One row per objective: hyperparameters that are right for it.
ARGS = {
    "dmpo": {"beta": 5.0, "alpha": 0.1},
    "diffusion_dpo": {"beta": 5.0, "label_smoothing": 0.05},
    "sft": {},
}
PREFERENCE = np.array([1.0, 0.5, 0.7], np.float32)


def logit_in_float64(policy, reference, target, beta):
    def error(x):
        return ((x - target) ** 2).mean((2, 3, 4))

    delta = (error(policy) - error(reference)) @ np.array([1.0, -1.0])
    return -0.5 * beta * delta


def dmpo_in_float64(policy, reference, target, preference, *, beta, alpha):
    p = 1 / (1 + np.exp(-logit_in_float64(policy, reference, target, beta)))
    q = np.clip(preference, alpha, 1 - alpha)
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def dpo_in_float64(policy, reference, target, preference, *, beta, label_smoothing):
    u = logit_in_float64(policy, reference, target, beta)
    q = np.clip(preference, label_smoothing, 1 - label_smoothing)
    return q * np.log1p(np.exp(-u)) + (1 - q) * np.log1p(np.exp(u))


def sft_in_float64(policy, reference, target, preference):
    return (preference != 0.5) * ((policy - target)[:, 0] ** 2).mean((1, 2, 3))


# One row per objective: the same loss, written the plain way.
IN_FLOAT64 = {"dmpo": dmpo_in_float64, "diffusion_dpo": dpo_in_float64, "sft": sft_in_float64}


def golden(dtype=np.float64):
    i = np.arange(24.0).reshape(2, 2, 2, 3, 1)
    return tuple(x.astype(dtype) for x in (np.sin(i), np.cos(0.7 * i), np.sin(0.3 * i + 1)))


def golden_jax():
    return tuple(map(jnp.asarray, golden(np.float32)))


def slopes(objective, u, preference=None, **hyperparameters):
    """(loss, d loss / d u) at each logit in u, through the objective's own arithmetic.

    With beta 2 and target 0, and per image one number, u = (r_c - l_c) - (r_x - l_x). The
    chosen image stays at policy 1 + d, reference 1, and d carries the slope; the rejected
    one brings u: its policy's square where u > 0, its reference's where u < 0.
    """
    u = jnp.asarray(u, jnp.float32)

    def pair(chosen, rejected):
        return jnp.stack([chosen, rejected], 1)[:, :, None, None, None]

    one = jnp.ones_like(u)
    reference = pair(one, jnp.sqrt(jnp.maximum(-u, 0.0)))
    target = jnp.zeros_like(reference)

    def loss(d):
        policy = pair(one + d, jnp.sqrt(jnp.maximum(u, 0.0)))
        return objective(policy, reference, target, preference, beta=2.0, **hyperparameters)

    out, pull = jax.vjp(loss, jnp.zeros_like(u))
    return np.asarray(out), np.asarray(pull(one)[0]) / -2  # du/dd is -2 at d = 0


def test_every_objective_is_under_test():
    assert set(ARGS) == set(OBJECTIVES) == set(IN_FLOAT64)
    for name, row in ARGS.items():
        assert OBJECTIVES[name].name == name
        assert set(OBJECTIVES[name].hyperparameters) == set(row)
        assert inspect.getdoc(OBJECTIVES[name].fn)


@pytest.mark.parametrize("name", ARGS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_contract(name, dtype, scale, triple):
    triple = tuple((scale * x).astype(dtype) for x in triple)
    preference = jnp.asarray(PREFERENCE)
    loss = jax.jit(lambda *x: OBJECTIVES[name](*x, **ARGS[name]))
    out = loss(*triple, preference)
    grad = jax.grad(lambda p: loss(p, *triple[1:], preference).sum())(triple[0])
    assert out.shape == (3,)
    assert out.dtype == jnp.float32
    assert grad.dtype == dtype
    assert np.isfinite(out).all()
    assert np.isfinite(grad.astype(jnp.float32)).all()
    flipped = loss(*(x[::-1] for x in triple), preference[::-1])  # pairs do not see one another
    np.testing.assert_allclose(flipped[::-1], out, rtol=1e-6)
    everywhere = loss(*triple, jnp.ones(3))
    np.testing.assert_array_equal(loss(*triple, None), everywhere)  # None is 1 everywhere


@pytest.mark.parametrize("name", ARGS)
def test_needs_are_as_declared(name, triple):
    objective = OBJECTIVES[name]
    policy, _, target = triple
    if objective.needs_reference:
        with pytest.raises(ValueError, match="needs_reference=False"):
            objective(policy, None, target, **ARGS[name])
    else:
        np.testing.assert_array_equal(
            objective(policy, None, target, **ARGS[name]), objective(*triple, **ARGS[name])
        )
    chosen = tuple(x[:, :1] for x in triple)
    if objective.needs_rejected:
        with pytest.raises(ValueError, match=r"\[B, 2, H, W, C\]"):
            objective(*chosen, **ARGS[name])
    else:
        np.testing.assert_array_equal(
            objective(*chosen, **ARGS[name]), objective(*triple, **ARGS[name])
        )


@pytest.mark.parametrize("name", ARGS)
@pytest.mark.parametrize("preference", [None, PREFERENCE])
def test_value_and_gradient_against_float64(name, preference, triple):
    inputs = tuple(np.asarray(x, np.float64) for x in triple)
    label = np.ones(3) if preference is None else preference.astype(np.float64)

    def plain(p):
        return IN_FLOAT64[name](p, *inputs[1:], label, **ARGS[name])

    def ours(p):
        return OBJECTIVES[name](
            p, *triple[1:], None if preference is None else jnp.asarray(preference), **ARGS[name]
        )

    np.testing.assert_allclose(ours(triple[0]), plain(inputs[0]), rtol=3e-6, atol=1e-7)
    grad = np.asarray(jax.grad(lambda p: ours(p).sum())(triple[0]))
    rng = np.random.default_rng(0)
    for _ in range(5):
        direction = rng.normal(size=inputs[0].shape)
        step = 1e-5 * direction
        want = (plain(inputs[0] + step) - plain(inputs[0] - step)).sum() / 2e-5
        np.testing.assert_allclose((grad * direction).sum(), want, rtol=2e-5, atol=1e-6)


def test_golden_numbers():
    delta = -np.asarray(margin(*golden_jax()))
    np.testing.assert_allclose(delta, [0.376856, 1.954387], atol=6e-7)
    loss = dmpo(*golden_jax(), beta=5.0, alpha=0.1)
    np.testing.assert_allclose(loss, [1.092938, 2.241972], atol=1.5e-6)
    loss = diffusion_dpo(*golden_jax(), beta=5.0)
    np.testing.assert_allclose(loss, [1.271294, 4.893492], atol=1.5e-6)
    loss = dmpo(*golden_jax(), beta=2000, alpha=0.01)  # a config may hold an int
    np.testing.assert_allclose(loss, [4.605170, 4.605170], atol=1e-6)
    loss = diffusion_dpo(*golden_jax(), beta=2000.0)
    np.testing.assert_allclose(loss, [376.855796, 1954.387375], rtol=7e-7)


@pytest.mark.parametrize(
    ("alpha", "u", "loss", "slope"),
    [
        (0.01, 0.0, 1.614463, -1.148780),
        (0.1, 0.0, 0.510826, -0.549306),
        (0.01, -5.0, 4.534236, -0.063789),
        (0.01, 10.0, 0.009760, 0.000245),
        (0.01, 4.595120, 0.0, 0.0),  # the stationary point, logit(1 - alpha)
        (0.01, -100.0, 4.605170, 0.0),  # a pair badly wrong is let go
        (0.01, 100.0, 0.010050, 0.0),
    ],
)
def test_dmpo_known_points(alpha, u, loss, slope):
    got = slopes(dmpo, [u], alpha=alpha)
    np.testing.assert_allclose(got, [[loss], [slope]], atol=1.5e-6)


def test_dmpo_slope_is_bounded_and_turns_round_once():
    u = np.linspace(-30, 30, 601)
    _, slope = slopes(dmpo, u, alpha=0.01)
    p = 1 / (1 + np.exp(-u))
    stationary = np.log(0.99 / 0.01)
    np.testing.assert_allclose(slope, p * (1 - p) * (u - stationary), atol=3e-6)
    # Signs where float32 can tell them: the slope is below 1e-11 past |u| = 30.
    near = np.abs(u) < 12
    np.testing.assert_array_equal(np.sign(slope[near]), np.sign(u[near] - stationary))
    assert np.abs(slope).max() < 1.5
    _, runaway = slopes(diffusion_dpo, u)
    assert (runaway < 0).all()  # where DPO's margin grows for ever
    np.testing.assert_allclose(runaway[0], -1, atol=1e-6)


def test_dmpo_at_a_tie_is_zero_and_flat():
    loss, slope = slopes(dmpo, [0.0], jnp.array([0.5]), alpha=0.01)
    assert loss[0] == 0.0
    assert slope[0] == 0.0


@pytest.mark.parametrize("preference", [0.5, 0.6, 0.9, 0.99, 1.0])
def test_dmpo_is_stationary_at_each_pairs_own_label(preference):
    q = np.clip(preference, 0.01, 0.99)
    loss, slope = slopes(dmpo, [np.log(q / (1 - q))], jnp.array([preference]), alpha=0.01)
    np.testing.assert_allclose([loss, slope], 0, atol=3e-7)


def test_dmpo_preference_is_per_pair(triple):
    mixed = dmpo(*triple, jnp.asarray(PREFERENCE), beta=1.0, alpha=0.05)
    for i, preference in enumerate(PREFERENCE):
        alone = dmpo(*triple, jnp.full(3, preference), beta=1.0, alpha=0.05)
        np.testing.assert_allclose(mixed[i], alone[i], rtol=1e-6)
    assert len(np.unique(np.asarray(mixed))) == 3


def test_dmpo_swapped_pair_with_swapped_preference_is_the_same(triple):
    preference = jnp.asarray(PREFERENCE)
    swapped = dmpo(*(x[:, ::-1] for x in triple), 1 - preference, beta=1.0, alpha=0.05)
    np.testing.assert_allclose(
        swapped, dmpo(*triple, preference, beta=1.0, alpha=0.05), rtol=1e-5, atol=1e-7
    )


def test_small_alpha_stays_finite():
    # 1 - (1 - 1e-9) is 0 in float32; log(1 / alpha) is what a lost pair costs.
    loss, slope = slopes(dmpo, [-1e3], alpha=1e-9)
    np.testing.assert_allclose(loss, np.log(1e9), rtol=1e-6)
    assert slope[0] == 0


def test_dpo_label_smoothing_is_the_published_one():
    u = np.array([-3.0, 0.0, 2.0])
    loss, _ = slopes(diffusion_dpo, u, label_smoothing=0.1)
    want = 0.9 * np.log1p(np.exp(-u)) + 0.1 * np.log1p(np.exp(u))
    np.testing.assert_allclose(loss, want, rtol=1e-6)


def test_smoothed_dpo_shares_the_stationary_point_of_dmpo():
    # Cross entropy is KL(q || p) and the label's entropy: least where p = q, as KL(p || q) is.
    at = [np.log(0.9 / 0.1)]
    loss, slope = slopes(diffusion_dpo, at, label_smoothing=0.1)
    np.testing.assert_allclose(loss, -(0.9 * np.log(0.9) + 0.1 * np.log(0.1)), rtol=1e-6)
    np.testing.assert_allclose(slope, 0, atol=1e-6)


@pytest.mark.parametrize("name", ["dmpo", "diffusion_dpo"])
@pytest.mark.parametrize("u", [1e6, -1e6, 1e9, -1e9])
def test_extreme_logits_are_finite(name, u):
    row = {k: v for k, v in ARGS[name].items() if k != "beta"}
    loss, slope = slopes(OBJECTIVES[name], [u], **row)
    assert np.isfinite(loss).all()
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("name", ["dmpo", "diffusion_dpo"])
@pytest.mark.parametrize("beta", [1e-3, 1.0, 2000.0, 1e4])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 6e4])
def test_every_beta_and_error_is_finite(name, beta, scale, triple):
    triple = tuple(scale * x for x in triple)
    row = ARGS[name] | {"beta": beta}

    def loss(p):
        return OBJECTIVES[name](p, *triple[1:], **row).sum()

    value, grad = jax.value_and_grad(loss)(triple[0])
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("jit", [False, True])
def test_equal_policy_and_reference_have_no_margin(dtype, jit, triple):
    reference, _, target = ((30 * x).astype(dtype) for x in triple)
    got = (jax.jit(margin) if jit else margin)(reference, reference, target)
    assert got.dtype == jnp.float32
    assert (np.asarray(got) == 0.0).all()


def test_factored_margin_keeps_what_a_difference_of_means_loses(triple):
    _, reference, target = triple
    policy = reference + 1e-5 * jnp.sin(1e3 * reference)
    exact = logit_in_float64(*(np.asarray(x, np.float64) for x in (policy, reference, target)), 2.0)
    np.testing.assert_allclose(margin(policy, reference, target), exact, rtol=1e-4)


def test_margin_is_positive_where_the_chosen_image_gained(triple):
    _, reference, target = triple
    better_chosen = reference.at[:, 0].set(target[:, 0])
    better_rejected = reference.at[:, 1].set(target[:, 1])
    assert (np.asarray(margin(better_chosen, reference, target)) > 0).all()
    assert (np.asarray(margin(better_rejected, reference, target)) < 0).all()


def test_sft_ties_weigh_nothing(triple):
    preference = jnp.asarray(PREFERENCE)

    def loss(p):
        return sft(p, None, triple[2], preference)

    out, grad = loss(triple[0]), jax.grad(lambda p: loss(p).sum())(triple[0])
    assert out[1] == 0
    assert (np.asarray(grad)[1] == 0).all()
    assert (np.asarray(grad)[:, 1] == 0).all()  # the rejected image is not looked at
    assert (np.asarray(out)[[0, 2]] > 0).all()


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
