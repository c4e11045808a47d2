"""Tests for dmpo_jax/training/optim.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dmpo_jax.training import optim

PARAMS = {"a.kernel": jnp.full((256, 128), 2.0), "a.bias": jnp.full((3,), -1.0)}


def rates(steps, **kwargs):
    return np.asarray(jax.vmap(optim.make_learning_rate(**kwargs))(jnp.arange(steps)))


def test_warmup_wastes_no_update_and_ends_at_peak():
    got = rates(8, peak=2.0, warmup_steps=4, total_steps=8)
    np.testing.assert_allclose(got, [0.5, 1, 1.5, 2, 2, 2, 2, 2])
    np.testing.assert_allclose(rates(3, peak=2.0, warmup_steps=0, total_steps=3), 2.0)


@pytest.mark.parametrize(("schedule", "middle"), [("cosine", 1.0), ("linear", 1.0)])
def test_decay_reaches_zero_only_after_the_last_update(schedule, middle):
    got = rates(15, peak=2.0, warmup_steps=4, total_steps=12, schedule=schedule)
    assert got[4] == 2.0
    assert (got[:12] > 0).all()
    assert (np.diff(got[4:12]) < 0).all()
    np.testing.assert_allclose(got[8], middle, rtol=1e-6)
    np.testing.assert_allclose(got[12:], 0, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"schedule": "cosin"}, "constant, cosine, linear, but got 'cosin'"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, but got -1"),
        ({"peak": -1.0}, "at least 0, but got -1.0"),
        ({"schedule": "linear", "warmup_steps": 9}, "total_steps=8 and warmup_steps=9"),
    ],
)
def test_learning_rate_refuses(change, match):
    with pytest.raises(ValueError, match=match):
        optim.make_learning_rate(**{"peak": 1.0, "warmup_steps": 0, "total_steps": 8} | change)


def updates(grads, learning_rate=0.5, **kwargs):
    tx = optim.make_optimizer(learning_rate, **kwargs)
    return tx.update(grads, tx.init(PARAMS), PARAMS)[0]


def test_adamw_is_optax_adamw_on_every_parameter():
    grads = jax.tree.map(lambda x: 0.001 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), PARAMS)
    want_tx = optax.adamw(0.5, 0.8, 0.95, 1e-6, weight_decay=0.1)
    want = want_tx.update(grads, want_tx.init(PARAMS), PARAMS)[0]
    got = updates(grads, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1, clip_norm=0.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_weight_decay_is_times_the_rate_and_spares_nothing(name):
    got = updates(jax.tree.map(jnp.zeros_like, PARAMS), name=name, weight_decay=0.1)
    jax.tree.map(lambda u, p: np.testing.assert_allclose(u, -0.05 * p, rtol=1e-6), got, PARAMS)


def test_clipping_is_by_global_norm_and_zero_turns_it_off():
    # eps far above the gradients makes AdamW linear in them.
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    loose = updates(grads, eps=1e6, weight_decay=0.0, clip_norm=0.0)
    clipped = updates(grads, eps=1e6, weight_decay=0.0, clip_norm=1.0)
    norm = optax.tree.norm(grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b * norm, rtol=1e-4), loose, clipped)


def test_adafactor_is_small_and_goes_downhill():
    tx = optim.make_optimizer(0.1, name="adafactor", weight_decay=0.0)
    state = tx.init(PARAMS)
    largest = max(x.size for x in jax.tree.leaves(state))
    assert largest <= 256  # no moment of the kernel's own size
    params = PARAMS
    for _ in range(3):
        grads = jax.tree.map(lambda p: 2 * p, params)
        update, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, update)
    assert all(
        jax.tree.leaves(jax.tree.map(lambda a, b: abs(a).max() < abs(b).max(), params, PARAMS))
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_adafactor_is_that_of_transformers():
    """Of a linear layer, a convolution, an embedding and a bias, over 20 updates."""
    import torch
    from transformers.optimization import Adafactor

    rng = np.random.default_rng(0)
    shapes = {"linear": (40, 24), "conv": (10, 6, 3, 3), "embedding": (50, 16), "bias": (24,)}
    axes = {"linear": (1, 0), "conv": (2, 3, 1, 0), "embedding": (0, 1), "bias": (0,)}
    start = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in start.items()}
    settings = {"scale_parameter": False, "relative_step": False, "weight_decay": 0.01}
    published = Adafactor(list(theirs.values()), lr=0.02, **settings)
    ours = {k: jnp.asarray(v.transpose(axes[k])) for k, v in start.items()}
    tx = optim.make_optimizer(0.02, name="adafactor", weight_decay=0.01, clip_norm=0.0)
    state = tx.init(ours)
    for _ in range(20):
        # Rows and columns of sizes of their own, or factors would not matter.
        grads = {
            k: (rng.normal(size=s) * np.exp(sum(np.ogrid[tuple(slice(n) for n in s)]) / 9)).astype(
                np.float32
            )
            for k, s in shapes.items()
        }
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(grads[name])
        published.step()
        given = {k: jnp.asarray(g.transpose(axes[k])) for k, g in grads.items()}
        update, state = tx.update(given, state, ours)
        ours = optax.apply_updates(ours, update)
        for name, parameter in theirs.items():
            want = parameter.detach().numpy().transpose(axes[name])
            np.testing.assert_allclose(ours[name], want, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("name", "share"), [("adamw", 8), ("adamw_bf16", 6), ("adafactor", 4 * (256 + 128 + 3) / 32771)]
)
def test_bytes_of_state_a_parameter(name, share):
    state = jax.eval_shape(optim.make_optimizer(1.0, name=name).init, PARAMS)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    count = sum(x.size for x in PARAMS.values())
    assert held / count == pytest.approx(share, abs=32 / count)  # counters, placeholders


def test_only_the_first_moment_is_bfloat16():
    state = optim.make_optimizer(1.0, name="adamw_bf16").init(PARAMS)
    assert {x.dtype for x in optax.tree.get(state, "mu").values()} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in optax.tree.get(state, "nu").values()} == {jnp.dtype("float32")}


def test_a_bfloat16_first_moment_follows_the_float32_trajectory():
    """On a quadratic with curvatures from 0.1 to 10, as far as bfloat16 lets it."""
    curvature = jnp.logspace(-1, 1, 64)
    start = {"x": jnp.where(jnp.arange(64) % 2, 1.0, -1.0)}
    noise = 0.1 * jax.random.normal(jax.random.key(0), (200, 64))

    def walk(name):
        tx = optim.make_optimizer(1e-2, name=name, weight_decay=0.0, clip_norm=0.0)

        def step(carry, noise):
            params, state = carry
            grads = {"x": curvature * params["x"] + noise}
            update, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, update)
            return (params, state), params["x"]

        return jax.lax.scan(step, (start, tx.init(start)), noise)[1]

    exact, rounded = walk("adamw"), walk("adamw_bf16")
    moved = jnp.abs(exact - exact[:1]).max(axis=0)
    # bfloat16 rounds to 2**-9 of a value; the rounding of 1 / (1 - b1) steps is held at once.
    off = (jnp.abs(rounded - exact).max(axis=0) / moved).max()
    assert 0 < off < 10 * 2**-8
    assert jnp.abs(moved).min() > 0.1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"name": "adam"}, "one of adamw, adamw_bf16, adafactor, but got 'adam'"),
        ({"b2": 1.0}, r"b2 must be in \[0, 1\), but got 1.0"),
        ({"clip_norm": -1.0}, "clip_norm must be at least 0, but got -1.0"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0, but got nan"),
    ],
)
def test_optimizer_refuses(change, match):
    with pytest.raises(ValueError, match=match):
        optim.make_optimizer(1.0, **change)
