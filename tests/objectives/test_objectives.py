"""Tests for dmpo_jax/objectives/: values, slopes, ties."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax.objectives import (
    OBJECTIVES,
    alpha_divergence,
    diffusion_dpo,
    diffusion_kto,
    dmpo,
    jensen_shannon,
    margin,
    sft,
)
from tests.support import plain_objectives
from tests.support.plain_objectives import ARGS, HELD, ROWS

PREFERENCE = np.array([1.0, 0.5, 0.7], np.float32)


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
    assert set(ROWS) == set(OBJECTIVES)
    for name, row in ARGS.items():
        assert OBJECTIVES[name].name == name
        assert set(OBJECTIVES[name].hyperparameters) == set(row)
        words = inspect.getdoc(OBJECTIVES[name].fn)
        assert words
        assert "Source:" in words
        assert " tie " in words.replace("\n", " ")  # what it does with one


@pytest.mark.long
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
    if dtype != jnp.float16 or scale == 1:  # ipo's passes float16's 65504
        assert np.isfinite(grad.astype(jnp.float32)).all()
    flipped = loss(*(x[::-1] for x in triple), preference[::-1])  # pairs do not see one another
    np.testing.assert_allclose(flipped[::-1], out, rtol=1e-6)
    everywhere = loss(*triple, jnp.ones(3))
    # None is 1 everywhere; as a constant it compiles to other roundings.
    np.testing.assert_allclose(loss(*triple, None), everywhere, rtol=1e-6)


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
        held = {"held": inputs[0]} if name in HELD else {}
        return ROWS[name].plain(p, *inputs[1:], label, **ARGS[name], **held)

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
    wide = (np.asarray(x, np.float64) for x in (policy, reference, target))
    exact = plain_objectives.margin(*wide)
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


@pytest.mark.parametrize("preference", [None, PREFERENCE])
def test_dmpo_and_dpo_are_the_ends_of_the_alpha_family(preference, triple):
    label = None if preference is None else jnp.asarray(preference)
    q = np.clip(np.ones(3) if preference is None else preference, 0.1, 0.9)
    entropy = -(q * np.log(q) + (1 - q) * np.log(1 - q))
    args = {"beta": 5.0, "alpha": 0.1}

    def loss_and_gradient(objective, **args):
        def total(p):
            losses = objective(p, *triple[1:], label, **args)
            return losses.sum(), losses

        gradient, losses = jax.grad(total, has_aux=True)(triple[0])
        return np.asarray(losses), np.asarray(gradient)

    reverse = loss_and_gradient(dmpo, **args)
    forward = loss_and_gradient(diffusion_dpo, beta=5.0, label_smoothing=0.1)
    forward = (forward[0] - entropy, forward[1])
    for end, want in ((1, reverse), (0, forward)):
        got = loss_and_gradient(alpha_divergence, order=end, **args)
        near = loss_and_gradient(alpha_divergence, order=abs(end - 1e-5), **args)
        for mine, other, limit in zip(got, want, near, strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(limit, other, rtol=1e-3, atol=1e-4)
    assert not np.allclose(reverse[0], forward[0], rtol=0.1)


def test_divergences_are_0_at_the_label_alone_and_never_below():
    at = np.log(0.99 / 0.01)
    u = np.concatenate([np.linspace(-40, 40, 401), at + np.logspace(-6, 0, 60)])
    half_way = {"order": 0.5}
    for objective, more in ((dmpo, {}), (jensen_shannon, {}), (alpha_divergence, half_way)):
        loss, slope = slopes(objective, u, alpha=0.01, **more)
        assert (loss >= 0).all()
        assert (loss[np.abs(u - at) > 1e-2] > 0).all()
        away = (np.abs(u - at) > 1e-3) & (np.abs(u) < 10)
        np.testing.assert_array_equal(np.sign(slope[away]), np.sign(u[away] - at))
    loss, _ = slopes(jensen_shannon, u, alpha=0.01)
    assert loss.max() <= np.log(2)


def test_kto_takes_its_base_from_the_whole_batch(triple):
    """Pairs see one another through z0, and nothing is differentiated through it."""
    args = ARGS["diffusion_kto"]
    better = triple[1].at[:2].set(triple[2][:2])  # the policy gained on pairs 0 and 1
    whole = diffusion_kto(better, *triple[1:], **args)
    parts = [diffusion_kto(*(x[i : i + 1] for x in (better, *triple[1:])), **args) for i in (0, 2)]
    assert not np.allclose(whole[0], parts[0][0], rtol=1e-3)
    assert not np.allclose(whole[2], parts[1][0], rtol=1e-3)

    def third(p):
        return diffusion_kto(p, *triple[1:], **args)[2]

    assert (np.asarray(jax.grad(third)(better))[:2] == 0).all()


CHOICES = ["sft", "ipo", "hinge", "dspo", "dspo_sdxl", "linear_dpo", "diffusion_kto", "mapo"]


@pytest.mark.parametrize("name", CHOICES)
def test_choices_give_a_tie_no_weight_and_others_all_of_it(name, triple):
    def loss(p, label):
        return OBJECTIVES[name](p, *triple[1:], jnp.asarray(label), **ARGS[name])

    out, grad = (
        loss(triple[0], PREFERENCE),
        jax.grad(lambda p: loss(p, PREFERENCE).sum())(triple[0]),
    )
    assert out[1] == 0
    assert (np.asarray(grad)[1] == 0).all()
    # How sure the label is does not matter.
    np.testing.assert_allclose(out[2], loss(triple[0], np.ones(3, np.float32))[2], rtol=1e-6)


@pytest.mark.parametrize("name", sorted(set(ROWS) - set(CHOICES)))
def test_divergences_weigh_ties(name, triple):
    label = jnp.full(3, 0.5)
    loss, grad = jax.value_and_grad(
        lambda p: OBJECTIVES[name](p, *triple[1:], label, **ARGS[name]).sum()
    )(triple[0])
    assert loss > 0
    assert np.abs(np.asarray(grad)).max() > 0


def test_golden_numbers_of_the_others():
    """At the arrays of `golden`, from the formulas in float64."""
    for name, row in ROWS.items():
        got = OBJECTIVES[name](*golden_jax(), **row.args)
        np.testing.assert_allclose(got, row.plain(*golden(), np.ones(2), **row.args), rtol=2e-6)
    # And by hand, from the margins -0.376856 and -1.954387 that the arrays have.
    ipo, hinge = OBJECTIVES["ipo"], OBJECTIVES["hinge"]
    np.testing.assert_allclose(ipo(*golden_jax(), beta=0.5), [1.895733, 8.728405], rtol=2e-6)
    np.testing.assert_allclose(hinge(*golden_jax(), beta=0.5), [1.188428, 1.977194], rtol=2e-6)


@pytest.mark.parametrize(
    ("name", "args", "loss"),
    [
        ("poly_dpo", {"a": 8.0, "beta": 2.0}, (5.644140, 9.094257)),
        ("poly_dpo", {"a": 8.0, "beta": 5.0}, (7.027547, 12.833530)),
        ("poly_dpo", {"a": -0.5, "beta": 2.0}, (0.602666, 1.648901)),
        ("poly_dpo", {"a": -0.5, "beta": 5.0}, (0.911528, 4.397239)),
        ("linear_dpo", {"eta": 0.05, "beta": 2.0}, (0.326403, 0.462819)),
        ("linear_dpo", {"eta": 0.05, "beta": 5.0}, (0.439819, 0.462819)),
        ("dspo_sdxl", {"beta": 5.0}, (0.172976, 1.662119)),
    ],
)
def test_golden_numbers_of_2026(name, args, loss):
    """Of numbers that were computed apart from this package, in float64."""
    np.testing.assert_allclose(OBJECTIVES[name](*golden_jax(), **args), loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("b", "images"),
    [
        (1.0, ((1.042515, 3.193449), (1.662796, 3.878346))),
        (0.1, ((13.161390, 13.939679), (2.641029, 18.561109))),
        (0.5, ((2.255414, 4.142688), (1.096562, 5.056902))),
    ],
)
def test_golden_numbers_of_nft(b, images):
    loss = OBJECTIVES["nft"](*golden_jax(), jnp.asarray([1.0, 0.75]), b=b)
    np.testing.assert_allclose(loss, np.mean(images, 1), rtol=1e-6)


@pytest.mark.parametrize(
    ("b", "images"),
    [
        (1.0, ((0.627805, 1.027062), (1.316615, 1.863405))),
        (0.1, ((6.974576, 6.567279), (5.437450, 13.807818))),
    ],
)
def test_golden_numbers_of_adaptive_nft(b, images):
    """The published ones are of errors in x0 of flow noise, sigma times those of the velocity."""
    loss = OBJECTIVES["nft_adaptive"](*golden_jax(), jnp.asarray([1.0, 0.75]), b=b)
    np.testing.assert_allclose(loss * np.array([0.5, 0.9]), np.mean(images, 1), rtol=1e-6)
