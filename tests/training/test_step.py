"""The whole step, jitted, with a tiny real UNet: what it keeps, moves, counts and shares out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dmpo_jax.diffusion.timesteps import make_timesteps
from dmpo_jax.models import parameters
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.parallel import meshes
from dmpo_jax.planning import hlo
from dmpo_jax.training import health, step
from tests.support.quick import AS_USERS
from tests.support.steps import (
    HYPERPARAMETERS,
    KEEP_GRADIENT,
    MOVED,
    SCHEDULE,
    UNET,
    make_batch,
    make_setup,
    make_small_setup,
    make_unet,
    perturbed,
    predict_small,
    run_key,
    small,
    unet,
)

# One stage at 16 x 16: with 256 tokens XLA lowers the two forwards' attention differently
# where it may, and smaller latents would not show it.
TOKENS_256 = {
    **UNET,
    "block_out_channels": [32],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "attention_head_dim": 4,
}
jit_step = functools.cache(step.jit_train_step)


def assert_same(a, b):
    """The same trees, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


F32, BF16, SLOW = jnp.float32, jnp.bfloat16, pytest.mark.slow


@pytest.mark.parametrize(
    ("dtype", "pairs", "accumulation"),
    [
        (BF16, 8, 4),
        pytest.param(F32, 3, 1, marks=SLOW),
        pytest.param(F32, 8, 4, marks=SLOW),
        *(pytest.param(F32, pairs, 1, marks=SLOW) for pairs in (1, 2, 8, 16)),
        *(pytest.param(BF16, pairs, 1, marks=SLOW) for pairs in (1, 2, 3, 8, 16, 32)),
    ],
)
def test_margins_are_exactly_zero_at_step_0(dtype, pairs, accumulation, monkeypatch):
    monkeypatch.setattr(step, "COMPILER_OPTIONS", {**step.COMPILER_OPTIONS, **AS_USERS})
    predict, reference = make_unet(TOKENS_256, dtype)
    setup = make_setup(accumulation, KEEP_GRADIENT)._replace(predict=predict)
    state = step.make_state(reference, setup.tx)
    reference = {p: x.astype(parameters.frozen_dtype(p, dtype)) for p, x in reference.items()}
    _, metrics = step.jit_train_step(setup)(state, reference, make_batch(pairs, size=16), run_key())
    assert float(metrics["margin_abs_max"]) == 0.0
    assert float(metrics["implicit_accuracy"]) == 0.5
    assert float(metrics["chosen_gain"]) == float(metrics["rejected_gain"]) == 0.0
    assert float(metrics["grad_norm"]) > 0


def test_policy_moves_and_reference_does_not():
    setup, reference = make_small_setup(), small()
    before = jax.device_get(reference)
    state = step.make_state(reference, setup.tx)
    for i in range(3):
        given = state
        state, metrics = jit_step(setup)(state, reference, make_batch(2, seed=i), run_key())
        assert all(x.is_deleted() for x in jax.tree.leaves(given))  # donated
    assert (int(state.step), int(state.skipped)) == (3, 0)
    assert {m.dtype for m in metrics.values()} == {jnp.dtype(jnp.float32)}
    assert float(metrics["margin_abs_max"]) > 0
    assert_same(reference, before)
    after = jax.device_get(state.params)
    state, metrics = jit_step(setup)(state, reference, make_batch(2, seed=3), run_key())
    by = {path: x - after[path] for path, x in jax.device_get(state.params).items()}
    assert float(metrics["update_norm"]) == pytest.approx(float(optax.tree.norm(by)), rel=1e-5)
    for path, x in state.params.items():
        assert not np.array_equal(x, before[path]), path


def test_a_nonfinite_loss_changes_nothing_and_is_counted():
    setup, reference = make_small_setup(), small()
    fn = jit_step(setup)
    state, _ = fn(step.make_state(reference, setup.tx), reference, make_batch(2), run_key())
    before = jax.device_get(state)
    bad = make_batch(2, seed=1)
    bad.moments[1] = np.nan
    state, metrics = fn(state, reference, bad, run_key())
    assert not np.isfinite(float(metrics["loss"]))
    assert float(metrics["skipped"]) == 1
    assert float(metrics["update_norm"]) == 0
    assert (int(state.step), int(state.skipped)) == (2, 1)
    assert_same((state.params, state.opt_state), (before.params, before.opt_state))
    state, metrics = fn(state, reference, make_batch(2, seed=2), run_key())
    assert np.isfinite(float(metrics["loss"]))
    assert (int(state.step), int(state.skipped)) == (3, 1)
    assert not np.array_equal(state.params["first.kernel"], before.params["first.kernel"])


def test_sft_needs_neither_reference_nor_rejected_image():
    seen = []

    def predict(params, latents, *rest):
        seen.append(latents.shape[0])
        return predict_small(params, latents, *rest)

    objective = OBJECTIVES["sft"]
    setup = make_small_setup()._replace(
        predict=predict,
        objective=objective,
        needs_reference=objective.needs_reference,
        needs_rejected=objective.needs_rejected,
    )
    state = step.make_state(small(), setup.tx)
    state, metrics = step.jit_train_step(setup)(state, None, make_batch(3), run_key())
    assert set(seen) == {3}  # one image a pair
    assert np.isfinite(float(metrics["loss"]))
    assert int(state.skipped) == 0
    assert "rejected_error" not in metrics
    assert "chosen_gain" not in metrics
    assert not np.array_equal(state.params["first.kernel"], small()["first.kernel"])


def on_mesh(mesh, setup, pairs, moved=0.0, reference=None):
    """((state, reference, batch), the state's shardings); `moved`: the policy off the reference."""
    reference = unet()[1] if reference is None else reference
    state = step.make_state(perturbed(reference, moved), setup.tx)
    shardings = meshes.parameter_sharding(mesh, (state, reference))
    state, reference = jax.device_put((state, reference), shardings)
    batch = meshes.shard_batch(make_batch(pairs), meshes.batch_sharding(mesh), pairs)
    return (state, reference, batch), shardings[0]


# Off the reference beta / 2 multiplies the rounding of every prediction: an absolute error of
# 1e-7 in a mean over 64 numbers becomes 1e-4 in the logit at beta 2000. At a tenth of beta, ten
# times as far off, the logits are the same and their rounding is a tenth.
BETA, FAR = HYPERPARAMETERS["beta"] / 10, 10 * MOVED
GENTLE = functools.partial(OBJECTIVES["dmpo"], **{**HYPERPARAMETERS, "beta": BETA})


def gradients_of(mesh, accumulation=1):
    """(gradient, metrics) that the whole step has on a mesh, at step 0 and at a moved policy."""
    setup = make_setup(accumulation=accumulation, tx=KEEP_GRADIENT)._replace(objective=GENTLE)
    found = []
    for moved in (0.0, FAR):
        args, shardings = on_mesh(mesh, setup, 8, moved)
        if not found:
            fn = step.jit_train_step(setup, shardings)
        state, metrics = fn(*args, run_key())
        found.append(jax.device_get((state.opt_state, metrics)))
    return found


def make_mesh(devices: int, **shape):
    return meshes.make_mesh(devices=jax.devices()[:devices], **shape)


@pytest.fixture(scope="module")
def one_device(exact_steps):
    """The gradients of 8 pairs on one device, in one piece."""
    start, moved = gradients_of(make_mesh(1))
    assert start[1]["margin_abs_max"] == 0
    assert 0.1 < BETA / 2 * moved[1]["margin_abs_max"] < 8  # |u|: off zero and not saturated
    return start, moved


def ordered(name, value):
    """A metric as it is, and pairs, which come in any order, by what they are."""
    return np.sort(value, axis=1) if name == "pairs" else np.asarray(value)


def relative_error(got, want) -> float:
    assert set(got) == set(want)
    difference = {path: np.asarray(got[path], np.float64) - want[path] for path in want}
    return float(optax.tree.norm(difference) / optax.tree.norm(want))


@pytest.mark.long
@pytest.mark.parametrize(
    ("devices", "shape", "accumulation"),
    [
        pytest.param(8, {}, 1, marks=SLOW),
        pytest.param(8, {"fsdp": 8}, 1, marks=SLOW),
        (8, {"fsdp": 2, "tensor": 2}, 1),
        (1, {}, 4),
        pytest.param(2, {}, 2, marks=SLOW),
    ],
)
def test_gradient_does_not_depend_on_the_layout(
    devices, shape, accumulation, one_device, monkeypatch
):
    monkeypatch.setattr(meshes, "SHARDED_FROM", 64)  # or a model this small is replicated
    mesh = make_mesh(devices, **shape)
    if shape:
        split = meshes.parameter_sharding(mesh, unet()[1])["mid_block.resnets.0.conv1.kernel"]
        assert not split.is_fully_replicated
    start, moved = gradients_of(mesh, accumulation)
    assert start[1]["margin_abs_max"] == 0
    assert relative_error(start[0], one_device[0][0]) <= 1e-5
    assert relative_error(moved[0], one_device[1][0]) <= 1e-4
    for name, want in one_device[1][1].items():
        got, want = ordered(name, moved[1][name]), ordered(name, want)
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.long
def test_gradient_is_what_pmap_takes(one_device):
    """`pmap`, one pair a device, `pmean` of the gradient: the meaning that our jit keeps."""
    setup = make_setup(tx=KEEP_GRADIENT)._replace(objective=GENTLE)
    reference, batch = unet()[1], jax.tree.map(jnp.asarray, make_batch(8))
    noised = step.noise_batch(jax.random.fold_in(run_key(), 0), batch, setup)
    parts = jax.tree.map(
        lambda x: np.asarray(x)[:, None], (noised, batch.preference, batch.condition)
    )

    def gradient(params, reference, part):
        loss = functools.partial(step.pair_loss, reference=reference, part=part, setup=setup)
        return jax.lax.pmean(jax.grad(loss, has_aux=True)(params)[0], "data")

    taken = jax.pmap(gradient, "data", in_axes=(None, None, 0))
    for moved, bound, (want, _) in zip((0.0, FAR), (1e-5, 1e-4), one_device, strict=True):
        grads = taken(perturbed(reference, moved), reference, parts)
        assert relative_error({k: np.asarray(g)[0] for k, g in grads.items()}, want) <= bound


def test_microbatches_keep_each_devices_rows():
    """Compiled for 8 devices and 2 microbatches, the step only ever adds up over devices, but
    for the numbers of each pair, which it hands out whole."""
    mesh = make_mesh(8)
    setup = make_small_setup(2, KEEP_GRADIENT)
    args, shardings = on_mesh(mesh, setup, 16, reference=small())
    compiled = step.jit_train_step(setup, shardings).lower(*args, run_key()).compile()
    found = hlo.collectives(compiled.as_text())
    assert {c.kind for c in found} == {"all-reduce", "all-gather"}
    gathered = sum(c.trips * c.payload for c in found if c.kind == "all-gather")
    assert gathered <= len(health.FIELDS) * 16 * 4


@pytest.mark.parametrize("fsdp", [1, 2])
def test_noise_does_not_depend_on_the_mesh(fsdp):
    setup = make_setup()
    noise = jax.jit(functools.partial(step.noise_batch, setup=setup))
    alone = noise(run_key(), make_batch(16))
    mesh = make_mesh(8, fsdp=fsdp)
    batch = meshes.shard_batch(make_batch(16), meshes.batch_sharding(mesh), 16)
    shared = noise(run_key(), batch)
    assert len(shared.latents.sharding.device_set) == 8
    assert_same(shared, alone)


def test_accumulation_means_gradients_and_stacks_the_rest():
    parts = {"x": jnp.arange(4.0).reshape(4, 1)}

    def gradient(part):
        return part["x"][0], {"loss": part["x"][0]}

    grads, beside = step.accumulate(gradient, parts, 4)
    assert float(grads) == 1.5
    np.testing.assert_array_equal(beside["loss"], np.arange(4.0))
    cut = step.microbatches(jnp.arange(8), 4)
    np.testing.assert_array_equal(cut, np.arange(8).reshape(2, 4).T)
    cut = step.microbatches(jnp.arange(8), 2, 2)
    np.testing.assert_array_equal(cut, [[0, 1, 4, 5], [2, 3, 6, 7]])


def test_means_alone_are_noised_as_moments_without_variance_are():
    """The same timesteps and noise; and [.., C] is no [.., 2C] by accident."""
    setup, batch = make_setup(), make_batch(4)
    mean = jnp.asarray(batch.moments[..., :4])
    certain = batch._replace(moments=jnp.concatenate([mean, jnp.full_like(mean, -30.0)], -1))
    want = step.noise_batch(jax.random.key(1), certain, setup)
    alone = setup._replace(mean_only=True)
    got = step.noise_batch(jax.random.key(1), batch._replace(moments=mean), alone)
    assert got.latents.shape == mean.shape
    np.testing.assert_array_equal(got.timesteps, want.timesteps)
    np.testing.assert_array_equal(got.target, want.target)
    np.testing.assert_allclose(got.latents, want.latents, atol=1e-6)


@pytest.mark.long
def test_means_over_the_batch_span_devices_and_end_at_microbatches(monkeypatch):
    """diffusion_kto's z0 and the safeguard's lambda: the same on 8 devices as on one; with
    accumulation each microbatch has its own, and lambda is logged as their mean."""
    kto = functools.partial(
        OBJECTIVES["diffusion_kto"], beta=1e3, chosen_weight=1.0, rejected_weight=0.5
    )
    far = 100 * MOVED  # its gains are to be far above the rounding of predictions
    found = {}
    for name, devices, accumulation in (("one", 1, 1), ("eight", 8, 1), ("parts", 1, 2)):
        setup = make_small_setup(accumulation, KEEP_GRADIENT)._replace(objective=kto, safeguard=0.9)
        args, shardings = on_mesh(make_mesh(devices), setup, 16, far, small())
        state, metrics = step.jit_train_step(setup, shardings)(*args, run_key())
        found[name] = jax.device_get((state.opt_state, metrics))
    (one, metrics), (eight, same), (parts, others) = found.values()
    assert 0 < metrics["safeguard"] < 1
    assert same["safeguard"] == pytest.approx(metrics["safeguard"], rel=1e-4)
    assert same["loss"] == pytest.approx(metrics["loss"], rel=1e-4)
    assert relative_error(eight, one) <= 1e-3
    assert relative_error(parts, one) > 3e-3
    # By hand, from each microbatch alone.
    setup = make_small_setup(1)._replace(objective=kto, safeguard=0.9)
    reference, batch = small(), jax.tree.map(jnp.asarray, make_batch(16))
    noised = step.noise_batch(jax.random.fold_in(run_key(), 0), batch, setup)
    whole = (noised, batch.preference, batch.condition)
    loss = jax.jit(functools.partial(step.pair_loss, setup=setup))
    alone = [
        loss(perturbed(reference, far), reference, part)[1][0]
        for part in (jax.tree.map(lambda x, i=i: x[i::2], whole) for i in range(2))
    ]
    for name in ("loss", "safeguard"):
        assert others[name] == pytest.approx(np.mean([a[name] for a in alone]), rel=1e-4)


@pytest.mark.long
def test_means_over_groups_are_the_same_on_any_layout():
    """Of 4 consecutive rows of the global batch, on 8 devices and in 2 microbatches too."""
    objective = functools.partial(
        OBJECTIVES["diffusion_kto"], beta=100.0, chosen_weight=1.0, rejected_weight=0.5
    )
    far, group, pairs = 100 * MOVED, 4, 64
    changes = {"objective": objective, "safeguard": 0.1, "group": group}
    # Predictions larger than the noise that a pair shares: errors that differ, and lambdas.
    reference, found = {path: 3 * x for path, x in small().items()}, {}
    for layout in ((1, 1), (8, 1), (8, 2)):
        setup = make_small_setup(layout[1], KEEP_GRADIENT)._replace(**changes)
        args, shardings = on_mesh(make_mesh(layout[0]), setup, pairs, far, reference)
        state, metrics = step.jit_train_step(setup, shardings)(*args, run_key())
        found[layout] = jax.device_get((state.opt_state, metrics))
    # By hand, each group as a batch of its own.
    setup = make_small_setup(1)._replace(objective=objective, safeguard=0.1)
    batch = jax.tree.map(jnp.asarray, make_batch(pairs))
    noised = step.noise_batch(jax.random.fold_in(run_key(), 0), batch, setup)
    whole = (noised, batch.preference, batch.condition)
    loss = functools.partial(step.pair_loss, setup=setup)
    alone = jax.jit(jax.value_and_grad(loss, has_aux=True))
    cuts = [jax.tree.map(lambda x, i=i: x[i : i + group], whole) for i in range(0, pairs, group)]
    parts = [alone(perturbed(reference, far), reference, part) for part in cuts]
    want = {k: np.mean([np.asarray(g[k]) for _, g in parts], 0) for k in reference}
    lambdas = [float(aux[0]["safeguard"]) for (_, aux), _ in parts]
    assert np.std(lambdas) > 0.01
    _, plain = alone(perturbed(reference, far), reference, whole)
    assert relative_error(plain, want) > 5e-3  # what one mean over the batch would give
    for layout, (gradient, metrics) in found.items():
        assert relative_error(gradient, want) <= 1e-3, layout
        assert metrics["safeguard"] == pytest.approx(np.mean(lambdas), rel=1e-4)
        assert metrics["loss"] == pytest.approx(np.mean([float(x[0]) for x, _ in parts]), rel=1e-4)


@pytest.mark.long
def test_groups_need_no_collective():
    """A group lies on one device: only the mean of the lambdas, for the log, is over devices."""
    counts = {}
    for name, changes in {
        "none": {},
        "groups": {"safeguard": 0.9, "group": 2},
        "batch": {"safeguard": 0.9},
    }.items():
        setup = make_small_setup(2, KEEP_GRADIENT)._replace(**changes)
        args, shardings = on_mesh(make_mesh(8), setup, 32, reference=small())
        compiled = step.jit_train_step(setup, shardings).lower(*args, run_key()).compile()
        found = hlo.collectives(compiled.as_text())
        assert {c.kind for c in found} == {"all-reduce", "all-gather"}
        gathered = sum(c.trips * c.payload for c in found if c.kind == "all-gather")
        assert gathered <= len(health.FIELDS) * 32 * 4
        counts[name] = sum(c.trips * c.payload for c in found if c.kind == "all-reduce")
    assert counts["none"] <= counts["groups"] < counts["batch"]


def test_weights_by_timestep_scale_each_pairs_loss():
    among = make_timesteps(SCHEDULE, weighting="min_snr", gamma=1.0)
    setup = make_small_setup(1, KEEP_GRADIENT)
    state = step.make_state(perturbed(small(), MOVED), setup.tx)
    losses = {}
    for name, timesteps in (("even", None), ("weighted", among)):
        one = setup._replace(timesteps=timesteps)
        given = jax.tree.map(jnp.copy, state)
        _, metrics = step.jit_train_step(one)(given, small(), make_batch(8), run_key())
        pairs = dict(zip(health.FIELDS, np.asarray(metrics["pairs"]), strict=True))
        assert float(metrics["loss"]) == pytest.approx(pairs["loss"].mean(), rel=1e-5)
        losses[name] = pairs["loss"]
    weights = among.weights[pairs["timestep"].astype(int)]
    assert len(np.unique(weights)) > 2
    np.testing.assert_allclose(losses["weighted"], weights * losses["even"], rtol=1e-4)
