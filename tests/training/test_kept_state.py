"""State that an update keeps, its learning rate, and validation's noise: of the step alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax.config import checks as config_checks
from dmpo_jax.config import configs
from dmpo_jax.diffusion.noise import make_ddpm_table
from dmpo_jax.diffusion.timesteps import make_timesteps
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.training import optim, step, telemetry
from tests.support.steps import SCHEDULE, make_batch, make_setup, run_key

FINE = {"loss": 0.5, "grad_norm": 1.0, "skipped": 0.0, "update_norm": 0.1}


def predict(params, latents, times, condition):
    """A model of one number."""
    return latents * params["w"]


def small_setup(tx, **changes):
    return make_setup()._replace(predict=predict, tx=tx, **changes)


def run(setup, batches):
    reference = {"w": jnp.float32(0.5)}
    state = step.make_state(reference, setup.tx)
    update = jax.jit(functools.partial(step.train_step, setup=setup))
    for batch in batches:
        state, metrics = update(state, reference, batch, run_key())
    return state, metrics


def test_an_optimizer_that_breaks_the_parameters_is_seen_before_they_are_saved():
    """Every pair is a tie at step 0: the gradient is 0, and AdamW without eps divides 0 by 0."""
    import optax

    ties = make_batch(2)._replace(preference=np.full(2, 0.5, np.float32))
    state, metrics = run(small_setup(optax.adamw(1e-3, eps=0.0)), [ties])
    values = {name: float(metrics[name]) for name in FINE}
    assert np.isnan(float(state.params["w"]))
    assert values["grad_norm"] == values["skipped"] == 0
    with pytest.raises(telemetry.NonFiniteError, match="update 1 made parameters that are not fin"):
        telemetry.check_finite(1, values, limit=5)
    telemetry.check_finite(1, FINE, limit=0)


@pytest.mark.parametrize("eps", [0.0, 1e-40])
def test_an_eps_that_float32_takes_for_0_is_refused(eps):
    with pytest.raises(ValueError, match="eps must be at least 1e-30"):
        optim.make_optimizer(1.0, eps=eps)
    config = configs.defaults()
    config.model.folder, config.optimizer.eps = "somewhere", eps
    with pytest.raises(ValueError, match=r"optimizer.eps must be at least 1e-30"):
        config_checks.validate(config)


def test_the_rate_follows_the_step_after_a_skipped_update():
    """AdamW's first step has the size of the rate, which is 3 at update 3 and 2 at update 2."""
    bad, good = make_batch(2), make_batch(2)
    bad.moments[:] = np.nan
    tx = optim.make_optimizer(lambda count: 1e-3 * (count + 1), weight_decay=0.0)
    state, metrics = run(small_setup(tx), [bad, bad, good])
    assert int(state.skipped) == 2
    assert float(metrics["update_norm"]) == pytest.approx(3e-3, rel=1e-3)


def sums(batch, weights, numbers, setup):
    validate = jax.jit(functools.partial(step.validate_batch, setup=setup))
    params, reference = {"w": jnp.float32(0.4)}, {"w": jnp.float32(0.5)}
    found = validate(params, reference, batch, weights, numbers, run_key())
    return {name: float(x) for name, x in found.items()}


def rows(batch, index):
    return jax.tree.map(lambda x: x[index], batch)


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 2, 3])
def test_validation_noise_is_each_pairs_own(size):
    """For every batch size, down to padding, the sums over six pairs are the same."""
    setup, pairs, ones = small_setup(None), make_batch(6), np.ones(6, np.float32)
    want = sums(pairs, ones, np.arange(6), setup)
    parts = [
        sums(rows(pairs, slice(i, i + size)), ones[:size], np.arange(i, i + size), setup)
        for i in range(0, 6, size)
    ]
    total = {name: sum(part[name] for part in parts) for name in want}
    assert total == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("objective", ["dmpo", "diffusion_kto"])
def test_padding_counts_nowhere_in_validation(objective):
    """Not in a mean over the batch either, as diffusion_kto has one."""
    found = OBJECTIVES[objective]
    given = {name: h.default for name, h in found.declared.items()}
    setup = small_setup(None, objective=functools.partial(found, **given))
    pairs = make_batch(6)
    want = sums(rows(pairs, slice(0, 2)), np.ones(2, np.float32), np.arange(2), setup)
    pairs.moments[2:] *= 30  # far from the others
    weights = np.array([1, 1, 0, 0, 0, 0], np.float32)
    assert sums(pairs, weights, np.arange(6), setup) == pytest.approx(want, rel=1e-5)


def test_weights_that_are_all_0_are_refused():
    table = make_ddpm_table(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )
    with pytest.raises(ValueError, match=r"is 0 at every timestep .* lower timesteps\.low"):
        make_timesteps(table, weighting="min_snr", low=0.999)
    assert make_timesteps(table, weighting="min_snr", low=0.99).weights is not None
    assert make_timesteps(SCHEDULE, weighting="min_snr", low=0.999).weights is not None
