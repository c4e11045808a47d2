"""Tests for dmpo_jax/diffusion/timesteps.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax.diffusion.noise import (
    add_noise,
    make_ddpm_table,
    make_flow_table,
    prediction_target,
    to_sample_and_epsilon,
)
from dmpo_jax.diffusion.timesteps import make_timesteps, noise_pair

TYPES = ["epsilon", "v_prediction", "sample"]


def test_timesteps_are_drawn_from_the_range_alone():
    schedule = make_ddpm_table()
    among = make_timesteps(schedule, low=0.2, high=0.3)
    assert (among.first, among.last, among.weights) == (200, 300, None)
    noised = noise_pair(jax.random.key(0), jnp.zeros((2000, 1, 1, 1, 1)), schedule, among)
    drawn = np.asarray(noised.timesteps)
    assert (drawn.min(), drawn.max()) == (200, 299)
    assert noised.weights is None
    everywhere = make_timesteps(schedule)
    whole = noise_pair(jax.random.key(0), jnp.zeros((8, 1, 1, 1, 1)), schedule, everywhere)
    plain = noise_pair(jax.random.key(0), jnp.zeros((8, 1, 1, 1, 1)), schedule)
    np.testing.assert_array_equal(whole.timesteps, plain.timesteps)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_min_snr_weights(prediction_type, zero_snr):
    schedule = make_ddpm_table(prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr)
    weights = make_timesteps(schedule, weighting="min_snr", gamma=5.0).weights
    assert weights is not None
    assert np.isfinite(weights).all()
    signal = schedule.alphas_cumprod[:-1].astype(np.float64)  # the last may have none
    snr = signal / (1 - signal)
    over = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1.0}[prediction_type]
    np.testing.assert_allclose(weights[:-1], np.minimum(snr, 5.0) / over, rtol=1e-5)
    if zero_snr:  # the limit: no division by 0
        assert weights[-1] == (1 if prediction_type == "epsilon" else 0)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_x0_weights_turn_errors_of_the_prediction_into_errors_of_x0(prediction_type):
    """The same latents, and predictions that are off by one: how far the x0 that they mean is."""
    schedule = make_ddpm_table(prediction_type=prediction_type)
    timesteps = jnp.asarray([3, 400, 998])
    latents = jnp.ones((3, 2, 2, 1))
    noise = 2 * latents
    noised = add_noise(latents, noise, timesteps, schedule)
    target = prediction_target(latents, noise, timesteps, schedule)
    off, _ = to_sample_and_epsilon(target + 1, noised, timesteps, schedule)
    weights = make_timesteps(schedule, weighting="x0").weights
    assert weights is not None
    apart = np.abs(np.asarray(off - latents)).mean((1, 2, 3))
    np.testing.assert_allclose(weights[np.asarray(timesteps)], apart, rtol=1e-3)


def test_x0_weights_of_flow_are_the_noise_and_without_signal_there_are_none():
    table = make_flow_table(3.0)
    np.testing.assert_array_equal(make_timesteps(table, weighting="x0").weights, table.noise)
    zero = make_ddpm_table(prediction_type="epsilon", rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match=r"'x0' has no value where .* no signal left"):
        make_timesteps(zero, weighting="x0")


def test_weights_are_those_of_the_timesteps_drawn():
    schedule = make_ddpm_table()
    among = make_timesteps(schedule, weighting="min_snr", gamma=1.0)
    noised = noise_pair(jax.random.key(0), jnp.zeros((50, 1, 1, 1, 1)), schedule, among)
    assert among.weights is not None
    np.testing.assert_array_equal(noised.weights, among.weights[np.asarray(noised.timesteps)])
    assert len(np.unique(np.asarray(noised.weights))) > 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"low": 0.5, "high": 0.5}, "low=0.5, high=0.5"),
        ({"low": -0.1}, "low=-0.1"),
        ({"high": 1.1}, "high=1.1"),
        ({"low": 0.5, "high": 0.5001}, "at least one of 1000"),
        ({"weighting": "snr"}, "one of .*min_snr.*got 'snr'"),
        ({"weighting": "min_snr", "gamma": 0}, "gamma must be above 0"),
    ],
)
def test_timesteps_are_refused_in_words(change, words):
    with pytest.raises(ValueError, match=words):
        make_timesteps(make_ddpm_table(), **change)
