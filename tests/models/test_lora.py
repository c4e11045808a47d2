"""Adapters: names, zero at the start, folding, dropout; and the whole step that trains them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dmpo_jax.families import SD
from dmpo_jax.models import lora, parameters
from dmpo_jax.models.unet import UNet2DConditionModel
from dmpo_jax.training import build, step
from dmpo_jax.types import Condition, PairBatch
from tests.support import steps
from tests.support.quick import AS_USERS

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ALL = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "conv1", "conv", "proj_in", "time_emb_proj")
UNET = {
    "block_out_channels": [32],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
}
TWO = {
    **UNET,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "attention_head_dim": 2,
}
F32, BF16 = jnp.float32, jnp.bfloat16


@functools.cache
def make(targets, config="one", dtype=jnp.float32, rank=4, alpha=8.0):
    """(merge, base, adapters) of a small UNet."""
    unet = {"one": UNET, "two": TWO}[config]
    model = parameters.initialise(UNet2DConditionModel, unet, 0, dtype=dtype)
    adapted = lora.attach(model, rank=rank, alpha=alpha, targets=targets, seed=0)
    structure, params = parameters.split(adapted)
    return functools.partial(parameters.merge, structure), *lora.partition(params)


def moved(adapters, scale=0.1):
    rng = np.random.default_rng(1)
    return {
        path: jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32)
        for path, x in adapters.items()
    }


def inputs(size=8):
    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.normal(size=(2, size, size, 4)), jnp.float32)
    context = jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32)
    return latents, jnp.array([3, 900]), context


def make_batch(pairs, size=16):
    rng = np.random.default_rng(0)
    moments = rng.normal(size=(pairs, 2, size, size, 8)).astype(np.float32)
    context = rng.normal(size=(pairs, 5, 8)).astype(np.float32)
    return PairBatch(moments, np.ones(pairs, np.float32), Condition(context))


def make_setup(merge, **changes):
    given = steps.settings(lora=lora.Adapters(rank=4))
    (structure,) = merge.args
    setup = build.make_setup(SD, structure, steps.SCHEDULE, steps.META, optax.adamw(1e-2), given)
    return setup._replace(**changes)


def test_names_stay_and_adapters_stand_beside_them():
    _, base, adapters = make(ATTENTION)
    model = parameters.initialise(UNet2DConditionModel, UNET, 0)
    lora.attach(model, rank=4, alpha=8.0, targets=ATTENTION, seed=0)
    plain = set(parameters.split(model)[1])
    assert set(base) == plain  # attaching leaves the model as it was
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    assert adapters[f"{name}.lora_A.kernel"].shape == (8, 4)
    assert adapters[f"{name}.lora_B.kernel"].shape == (4, 32)
    kernels = {path.replace(".lora_A", "").replace(".lora_B", "") for path in adapters}
    assert len(adapters) == 2 * len(kernels)
    assert kernels == {p for p in plain if ".attn" in p and p.endswith(".kernel")}


def test_a_target_that_fits_nothing_is_refused():
    model = parameters.initialise(UNet2DConditionModel, UNET, 0)
    with pytest.raises(ValueError, match=r"ends in 'o_q'; there are .*to_out\.0, to_q"):
        lora.attach(model, rank=4, alpha=4.0, targets=("to_k", "o_q"), seed=0)


@pytest.mark.long
def test_adapters_begin_as_nothing_and_folded_is_unfolded():
    """Linear layers and convolutions of every kind: kernel 3 and 1, stride 2."""
    merge, base, adapters = make(ALL, "two")
    assert any(x.shape[:2] == (3, 3) for x in adapters.values())
    run = jax.jit(lambda params: merge(params)(*inputs()))
    plain, _ = parameters.split(parameters.initialise(UNet2DConditionModel, TWO, 0))
    start = jax.jit(lambda params: parameters.merge(plain, params)(*inputs()))(base)
    np.testing.assert_allclose(run({**base, **adapters}), start, atol=1e-5)
    changed = run({**base, **moved(adapters)})
    assert float(jnp.abs(changed - start).max()) > 0.1
    folded = dict(base)
    lora.fold_in(folded, moved(adapters), 2.0)
    folded = run({**folded, **lora.switched_off(adapters)})
    assert float(jnp.linalg.norm(folded - changed) / jnp.linalg.norm(changed)) <= 1e-6


@pytest.mark.long
@pytest.mark.parametrize(
    ("config", "dtype", "pairs", "accumulation", "targets", "size"),
    [
        ("two", F32, 4, 1, ALL, 8),  # not zero where the reference is the base's own program
        pytest.param("one", BF16, 8, 1, ATTENTION, 16, marks=pytest.mark.slow),
        pytest.param("one", BF16, 8, 4, ALL[:-4], 16, marks=pytest.mark.slow),
        pytest.param("one", F32, 3, 1, ATTENTION, 16, marks=pytest.mark.slow),
        pytest.param("one", F32, 8, 4, ALL[:-4], 16, marks=pytest.mark.slow),
        pytest.param("one", BF16, 1, 1, ATTENTION, 16, marks=pytest.mark.slow),
        pytest.param("two", BF16, 16, 1, ALL, 16, marks=pytest.mark.slow),
    ],
)
def test_margins_are_exactly_zero_at_step_0(
    config, dtype, pairs, accumulation, targets, size, monkeypatch
):
    monkeypatch.setattr(step, "COMPILER_OPTIONS", {**step.COMPILER_OPTIONS, **AS_USERS})
    merge, base, adapters = make(targets, config, dtype)
    base = {path: x.astype(parameters.frozen_dtype(path, dtype)) for path, x in base.items()}
    setup = make_setup(merge, accumulation=accumulation)
    state, batch = step.make_state(adapters, setup.tx), make_batch(pairs, size)
    _, metrics = step.jit_train_step(setup)(state, base, batch, jax.random.key(0))
    assert float(metrics["margin_abs_max"]) == 0.0
    assert float(metrics["chosen_gain"]) == float(metrics["rejected_gain"]) == 0.0
    assert float(metrics["grad_norm"]) > 0


@pytest.mark.long
def test_the_step_moves_adapters_and_nothing_else():
    merge, base, adapters = make(ATTENTION)
    setup = make_setup(merge, dropout=0.5, ema_decay=0.5)
    before = jax.device_get(base)
    state = step.make_state(adapters, setup.tx, ema=True)
    update = step.jit_train_step(setup)
    for i in range(3):
        state, metrics = update(state, base, make_batch(2, size=8), jax.random.key(i))
        assert np.isfinite(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(base), before)
    assert set(state.params) == set(state.ema) == set(adapters)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert len(moments) == 2 * len(adapters)  # the optimizer knows of adapters alone
    for path, x in state.params.items():
        assert not np.array_equal(x, adapters[path]), path
        assert not np.array_equal(x, state.ema[path]), path
    assert float(metrics["margin_abs_max"]) > 0


@pytest.mark.long
def test_dropout_is_of_features_and_keeps_the_mean():
    _, _, adapters = make(ALL, "two")
    adapters = moved(adapters, 1.0)
    seen = {path: 0.0 for path in adapters}
    for i in range(200):
        dropped = lora.drop(jax.random.key(i), adapters, 0.25)
        for path, x in dropped.items():
            ratio = np.asarray(x / adapters[path])
            if ".lora_B." in path:
                assert (ratio == 1).all()
                continue
            features = ratio.reshape(-1, *ratio.shape[-2:])
            np.testing.assert_allclose(features, features[:1, :, :1] + 0 * features, rtol=1e-6)
            assert set(np.unique(np.round(3 * ratio))) <= {0.0, 4.0}  # 0 or 4/3
            seen[path] += ratio.mean() / 200
    means = [mean for path, mean in seen.items() if ".lora_A." in path]
    assert np.mean(means) == pytest.approx(1, abs=0.01)


def test_moving_average_follows_the_rule():
    new, old = {"a": jnp.ones(2)}, {"a": jnp.zeros(2)}
    for number, decay in ((0, 0.1), (8, 0.5), (10_000, 0.99)):
        got = step.average(old, new, jnp.int32(number), 0.99)["a"]
        np.testing.assert_allclose(got, 1 - decay, rtol=1e-5)
    assert step.average(None, new, jnp.int32(0), 0.99) is None
