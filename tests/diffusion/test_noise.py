"""Tests for dmpo_jax/diffusion/noise.py; parity is against the installed PyTorch diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from dmpo_jax.diffusion.noise import (
    NoiseTable,
    add_noise,
    make_ddpm_table,
    prediction_target,
    sample_latents,
    to_sample_and_epsilon,
)
from dmpo_jax.diffusion.timesteps import noise_pair

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TYPES = ["epsilon", "v_prediction", "sample"]


def latents(batch=4, n=2, seed=3):
    return jax.random.normal(jax.random.key(seed), (batch, n, 4, 4, 3))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        SD15,
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 77},
        SD15 | {"num_train_timesteps": 500},
        {"trained_betas": list(np.linspace(0.001, 0.3, 1000))},
    ],
)
def test_tables_equal_diffusers(settings):
    want = DDPMScheduler(**settings).alphas_cumprod.numpy()
    got = make_ddpm_table(**settings)
    assert got.alphas_cumprod.dtype == np.float32
    assert got.num_train_timesteps == len(want)
    np.testing.assert_allclose(got.alphas_cumprod, want, rtol=1e-6)


@pytest.mark.parametrize("settings", [{}, SD15, {"beta_schedule": "squaredcos_cap_v2"}])
def test_zero_snr_tables_equal_diffusers(settings):
    settings = settings | {"rescale_betas_zero_snr": True}
    want = DDPMScheduler(**settings).alphas_cumprod.numpy()
    schedule = make_ddpm_table(**settings, prediction_type="v_prediction")
    got = schedule.alphas_cumprod
    assert got[-1] == 0.0
    assert schedule.noise[-1] == 1.0
    # PyTorch's float32 sqrt is not correctly rounded everywhere, and the last entries are
    # differences of near-equals: a few in 1e6 is what the last bit comes to.
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(got[:900], want[:900], rtol=2e-6)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_noising_equals_diffusers(prediction_type, zero_snr):
    schedule = make_ddpm_table(
        **SD15, prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr
    )
    theirs = DDPMScheduler(**SD15, rescale_betas_zero_snr=zero_snr)
    x, eps = np.asarray(latents(6, seed=1)), np.asarray(latents(6, seed=2))
    t = np.array([0, 1, 500, 901, 998, 999])
    x_pt, eps_pt, t_pt = torch.tensor(x), torch.tensor(eps), torch.tensor(t)
    want = {
        "epsilon": eps_pt,
        "sample": x_pt,
        "v_prediction": theirs.get_velocity(x_pt, eps_pt, t_pt),
    }[prediction_type]
    timesteps = jnp.asarray(t)
    noised = add_noise(jnp.asarray(x), jnp.asarray(eps), timesteps, schedule)
    target = prediction_target(jnp.asarray(x), jnp.asarray(eps), timesteps, schedule)
    np.testing.assert_allclose(noised, theirs.add_noise(x_pt, eps_pt, t_pt), atol=2e-6)
    np.testing.assert_allclose(target, want, atol=2e-6)


@pytest.mark.parametrize(
    ("prediction_type", "zero_snr"),
    # Not epsilon with zero SNR: pure noise holds no image.
    [("epsilon", False), *[(kind, zero) for kind in TYPES[1:] for zero in (False, True)]],
)
def test_target_and_sample_are_inverses(prediction_type, zero_snr):
    schedule = make_ddpm_table(
        **SD15, prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr
    )
    x, eps = latents(5, seed=1), latents(5, seed=2)
    timesteps = jnp.array([0, 10, 500, 990, 999])
    noised = add_noise(x, eps, timesteps, schedule)
    target = prediction_target(x, eps, timesteps, schedule)
    sample, epsilon = to_sample_and_epsilon(target, noised, timesteps, schedule)
    np.testing.assert_allclose(sample, x, atol=2e-5)
    np.testing.assert_allclose(epsilon, eps, atol=2e-5)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_pair_shares_its_timestep_and_noise(prediction_type):
    schedule = make_ddpm_table(**SD15, prediction_type=prediction_type)
    x = latents()
    noised = jax.jit(lambda k, x: noise_pair(k, x, schedule))(jax.random.key(0), x)
    assert noised.timesteps.shape == (4,)
    assert noised.timesteps.dtype == jnp.int32
    assert noised.latents.shape == noised.target.shape == x.shape
    assert noised.latents.dtype == noised.target.dtype == jnp.float32
    _, epsilon = to_sample_and_epsilon(noised.target, noised.latents, noised.timesteps, schedule)
    np.testing.assert_allclose(epsilon[:, 0], epsilon[:, 1], atol=5e-5)
    assert len(np.unique(np.asarray(epsilon)[:, 0, 0, 0, 0].round(3))) == 4  # but pairs do not
    assert len(np.unique(noised.timesteps)) == 4


def test_a_pair_and_its_chosen_image_alone_are_noised_alike():
    schedule, key = make_ddpm_table(**SD15), jax.random.key(0)
    both = noise_pair(key, latents(), schedule)
    alone = noise_pair(jax.random.clone(key), latents()[:, :1], schedule)
    np.testing.assert_array_equal(both.latents[:, :1], alone.latents)
    np.testing.assert_array_equal(both.timesteps, alone.timesteps)


def test_sharding_does_not_change_the_draw():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    schedule, x = make_ddpm_table(**SD15), latents(8)
    noise = jax.jit(lambda key, x: noise_pair(key, x, schedule))
    one = noise(jax.random.key(0), x)
    eight = noise(jax.random.key(0), jax.device_put(x, rows))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, eight)
    np.testing.assert_array_equal(one.timesteps, eight.timesteps)


def test_timesteps_cover_the_whole_range():
    schedule = make_ddpm_table(num_train_timesteps=10)
    noised = noise_pair(jax.random.key(0), jnp.zeros((2000, 1, 1, 1, 1)), schedule)
    counts = np.bincount(noised.timesteps, minlength=10)
    assert len(counts) == 10
    assert counts.min() > 150
    np.testing.assert_allclose(np.std(noised.target), 1, atol=0.1)


def test_low_precision_latents_are_noised_in_float32():
    noised = noise_pair(jax.random.key(0), latents().astype(jnp.bfloat16), make_ddpm_table())
    assert noised.latents.dtype == jnp.float32


def test_sample_latents_draws_from_the_posterior():
    mean, logvar = jnp.full((50, 2, 8, 8, 4), 3.0), jnp.full((50, 2, 8, 8, 4), 2 * np.log(0.5))
    moments = jnp.concatenate([mean, logvar], -1).astype(jnp.bfloat16)
    got = sample_latents(jax.random.key(0), moments, scaling_factor=0.2, shift_factor=1.0)
    assert got.shape == mean.shape
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got.mean(), (3 - 1) * 0.2, rtol=0.01)
    np.testing.assert_allclose(got.std(), 0.5 * 0.2, rtol=0.02)


def test_sample_latents_clips_the_log_variance():
    moments = jnp.stack([jnp.zeros(64), jnp.full(64, 200.0)], -1)
    got = sample_latents(jax.random.key(0), moments, scaling_factor=1.0)
    np.testing.assert_allclose(got.std(), np.exp(10), rtol=0.3)
    moments = jnp.stack([jnp.ones(64), jnp.full(64, -200.0)], -1)
    np.testing.assert_allclose(
        sample_latents(jax.random.key(1), moments, scaling_factor=2.0), 2.0, atol=1e-5
    )


def test_means_alone_are_what_is_drawn():
    means = jax.random.normal(jax.random.key(1), (3, 2, 4, 4, 5)).astype(jnp.bfloat16)  # odd, legal
    got = sample_latents(
        jax.random.key(0), means, scaling_factor=0.2, shift_factor=1.0, mean_only=True
    )
    assert got.shape == means.shape
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, (means.astype(jnp.float32) - 1.0) * 0.2, rtol=1e-6)


def test_schedule_is_hashed_by_identity():
    schedule = make_ddpm_table()
    noise = jax.jit(noise_pair, static_argnums=2)
    assert hash(schedule) == hash(schedule)
    assert schedule != make_ddpm_table()
    assert noise(jax.random.key(0), latents(), schedule).latents.shape == latents().shape


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta_schedule": "cosine"}, "squaredcos_cap_v2.*'cosine'"),
        ({"prediction_type": "v"}, "v_prediction.*'v'"),
        ({"trained_betas": [0.1, 0.2]}, r"\(1000,\), but got \(2,\)"),
        ({"beta_end": 1.5}, "betas must be in"),
        ({"beta_start": 0.0}, "betas must be in"),
    ],
)
def test_errors_say_what_is_supported(settings, message):
    with pytest.raises(ValueError, match=message):
        make_ddpm_table(**settings)


def test_odd_moments_are_refused():
    with pytest.raises(ValueError, match=r"\[..., 2C\]"):
        sample_latents(jax.random.key(0), jnp.ones((2, 3)), scaling_factor=1.0)


def test_unknown_prediction_type_is_refused_however_made():
    with pytest.raises(ValueError, match="prediction_type"):
        NoiseTable(*3 * [np.ones(3, np.float32)], "noise")
