"""Rectified flow against golden numbers (float64) and the installed PyTorch diffusers."""

import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from dmpo_jax.diffusion import noise as noises
from dmpo_jax.diffusion.flow_euler import flow_euler, flow_sigmas
from dmpo_jax.diffusion.noise import make_ddpm_table, make_flow_table
from dmpo_jax.diffusion.timesteps import (
    draw_timesteps,
    logit_normal_timesteps,
    make_timesteps,
    noise_pair,
)
from dmpo_jax.objectives import OBJECTIVES

Scheduler = diffusers.FlowMatchEulerDiscreteScheduler
CLOSE = {"atol": 1e-6, "rtol": 0}
# Of two pairs at ascending timesteps 249 and 899 of the table of shift 3.
INDEX = np.array([249, 899])
X0 = np.sin(0.9 * np.arange(24) + 0.2).reshape(2, 2, 2, 3, 1)
EPSILON = np.cos(0.7 * np.arange(12)).reshape(2, 1, 2, 3, 1)


@pytest.mark.parametrize(
    ("shift", "golden"),
    [
        (1.0, [0.001, 0.25, 0.5, 0.9, 1.0]),
        (3.0, [0.002994, 0.5, 0.75, 0.964286, 1.0]),
        (6.0, [0.005970, 0.666667, 0.857143, 0.981818, 1.0]),
    ],
)
def test_the_table_is_the_schedulers(shift, golden):
    table, theirs = make_flow_table(shift), Scheduler(shift=shift)
    np.testing.assert_allclose(table.noise[[0, 249, 499, 899, 999]], golden, **CLOSE)
    np.testing.assert_allclose(table.noise, theirs.sigmas.numpy()[::-1], **CLOSE)
    np.testing.assert_allclose(table.times, theirs.timesteps.numpy()[::-1], rtol=1e-6)
    np.testing.assert_allclose(table.signal + table.noise, 1, **CLOSE)
    assert (table.kind, table.prediction_type, table.num_train_timesteps) == ("flow", "flow", 1000)


def golden_pairs():
    """(table, x0, epsilon, policy, reference) in float32."""
    target = EPSILON - X0
    i = np.arange(24)
    policy = target + 0.1 * np.sin(1.3 * i).reshape(X0.shape)
    reference = target + 0.1 * np.cos(0.6 * i + 1).reshape(X0.shape)
    arrays = (jnp.asarray(x, jnp.float32) for x in (X0, EPSILON, policy, reference))
    return (make_flow_table(3.0), *arrays)


def test_noised_latents_and_target_are_the_golden_ones():
    table, x0, epsilon, *_ = golden_pairs()
    noised = noises.add_noise(x0, epsilon, jnp.asarray(INDEX), table)
    np.testing.assert_allclose(noised[0, 0, 0, :, 0], [0.599335, 0.828025, 0.539632], **CLOSE)
    np.testing.assert_allclose(noised[1, 1, 1, :, 0], [0.973001, 0.759582, 0.179580], **CLOSE)
    target = noises.prediction_target(x0, epsilon, jnp.asarray(INDEX), table)
    np.testing.assert_allclose(target[1, 1, 1, :, 0], [0.752024, -0.159043, -0.733784], **CLOSE)
    np.testing.assert_allclose(table.times[INDEX], [500, 964.285714], rtol=1e-7)
    sample, found = noises.to_sample_and_epsilon(target, noised, jnp.asarray(INDEX), table)
    np.testing.assert_allclose(sample, x0, **CLOSE)
    np.testing.assert_allclose(found, jnp.broadcast_to(epsilon, x0.shape), **CLOSE)
    theirs = Scheduler(shift=3.0)
    for b, index in enumerate(INDEX):
        times = theirs.timesteps[[999 - index] * 2]
        both, shared = torch.tensor(X0[b]), torch.tensor(EPSILON[b])
        want = theirs.scale_noise(both, times, shared.expand_as(both))
        np.testing.assert_allclose(noised[b], want, **CLOSE)


@pytest.mark.parametrize(
    ("name", "beta", "golden"),
    [
        ("diffusion_dpo", 100.0, [0.641401, 0.662795]),
        ("diffusion_dpo", 2000.0, [0.112679, 0.255717]),
        ("diffusion_dpo", 5000.0, [0.004901, 0.044813]),
        ("dmpo", 100.0, [1.493854, 1.544132]),
        ("dmpo", 2000.0, [0.160450, 0.512935]),
        ("dmpo", 5000.0, [0.001626, 0.031515]),
    ],
)
def test_objectives_on_velocities_are_the_golden_ones(name, beta, golden):
    _, x0, epsilon, policy, reference = golden_pairs()
    settings = {"alpha": 0.01} if name == "dmpo" else {"label_smoothing": 0.0}
    loss = functools.partial(OBJECTIVES[name], beta=beta, **settings)
    got = loss(policy, reference, epsilon - x0, jnp.ones(2))
    np.testing.assert_allclose(got, golden, rtol=1e-4, atol=2e-6)  # float32, times beta


def test_the_gradient_of_dmpo_on_velocities_is_the_golden_one():
    """To float32's own error: the differences of 0.002 are taken of numbers near 1."""
    _, x0, epsilon, policy, reference = golden_pairs()
    dmpo = functools.partial(OBJECTIVES["dmpo"], beta=2000.0, alpha=0.01)

    def loss(policy):
        return dmpo(policy, reference, epsilon - x0, jnp.ones(2)).sum()

    slope = jax.grad(loss)(policy)
    close = {"rtol": 5e-6, "atol": 1e-5}
    np.testing.assert_allclose(slope[0, 0, 0, :, 0], [0, 7.549291, 4.038853], **close)
    np.testing.assert_allclose(slope[1, 1, 1, :, 0], [-16.199948, 6.264760, 19.551580], **close)
    got = dmpo(policy, reference, epsilon - x0, jnp.ones(2))
    np.testing.assert_allclose(got, [0.160450, 0.512935], rtol=5e-6)


def test_weights_are_the_golden_ones():
    table = make_flow_table(3.0)
    min_snr = make_timesteps(table, weighting="min_snr", gamma=5.0).weights
    np.testing.assert_allclose(min_snr[INDEX], [0.25, 0.001276], **CLOSE)
    sigma = table.noise[INDEX].astype(np.float64)
    steep = make_timesteps(table, weighting="sigma_sqrt").weights
    np.testing.assert_allclose(steep[INDEX], sigma**-2, rtol=1e-6)
    theirs = diffusers.training_utils.compute_loss_weighting_for_sd3("cosmap", torch.tensor(sigma))
    cosmap = make_timesteps(table, weighting="cosmap").weights
    np.testing.assert_allclose(cosmap[INDEX], theirs, rtol=1e-6)
    for weighting in ("sigma_sqrt", "cosmap"):
        with pytest.raises(ValueError, match=f"{weighting}.* of flow noise"):
            make_timesteps(make_ddpm_table(), weighting=weighting)


def test_logit_normal_draws_are_the_golden_ones():
    z = jnp.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    got = logit_normal_timesteps(z, mean=0.0, std=1.0, steps=1000)
    assert got.tolist() == [880, 731, 499, 268, 119]
    np.testing.assert_allclose(
        make_flow_table(3.0).noise[got], [0.956915, 0.891234, 0.75, 0.524707, 0.290323], **CLOSE
    )


def drawn(**settings):
    among = make_timesteps(make_flow_table(), **settings)
    return np.asarray(draw_timesteps(jax.random.key(0), 20000, among))


def test_a_density_keeps_to_its_range_and_its_shape():
    whole = drawn(density="logit_normal")
    assert (whole.min(), whole.max()) >= (0, 900)
    assert whole.max() < 1000
    np.testing.assert_allclose(np.median(whole), 499.5, atol=8)
    # The middle half of a logit-normal: sigmoid(+-0.674).
    np.testing.assert_allclose(np.percentile(whole, [25, 75]), [337, 662], atol=8)
    assert np.median(drawn(density="logit_normal", mean=1.0)) < 300  # less noise
    part = drawn(density="logit_normal", low=0.2, high=0.4)
    assert (part.min(), part.max()) == (200, 399)
    inside = whole[(whole >= 200) & (whole < 400)]  # the same density, cut
    np.testing.assert_allclose(np.median(part), np.median(inside), atol=5)


def test_a_shift_draws_as_its_own_table_would():
    flat, table = make_flow_table(), make_flow_table(3.0)
    for among_of, base in ((flat, flat), (table, table)):
        among = make_timesteps(among_of, shift=3.0)
        index = np.asarray(draw_timesteps(jax.random.key(0), 20000, among))
        levels = np.sort(base.noise[index])
        want = np.sort(
            table.noise[np.asarray(draw_timesteps(jax.random.key(0), 20000, make_timesteps(table)))]
        )
        np.testing.assert_allclose(levels, want, atol=6e-4)  # to the nearest of the table's
    part = drawn(shift=3.0, low=0.2, high=0.4)
    assert 200 <= part.min() < 205
    assert 395 < part.max() < 400
    with pytest.raises(ValueError, match=r"shift=3.0 is of flow noise"):
        make_timesteps(make_ddpm_table(), shift=3.0)


def test_a_pair_is_told_the_tables_times():
    table = make_flow_table(3.0)
    noised = noise_pair(jax.random.key(0), jnp.zeros((8, 2, 4, 4, 1)), table)
    np.testing.assert_array_equal(noised.times, table.times[np.asarray(noised.timesteps)])
    assert noised.times.dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make_flow_table(0.0), "shift must be above 0"),
        (lambda: make_flow_table(1.0, 0), "at least 1, got 0"),
        (lambda: make_timesteps(make_flow_table(), density="beta"), "density must be one of"),
        (lambda: make_timesteps(make_flow_table(), std=0.0), "std must be above 0"),
        (lambda: make_timesteps(make_flow_table(), shift=-1.0), "shift must be above 0"),
        (lambda: make_ddpm_table(prediction_type="flow"), "prediction_type must be one of"),
        (lambda: flow_sigmas(1, shift=1.0, terminal=0.1), "two steps or more"),
    ],
)
def test_what_makes_no_noise_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def linear(tokens, low=0.5, high=1.15, base=256, most=4096):
    return low + (high - low) / (most - base) * (tokens - base)


# name: (steps, settings of ours, of the scheduler, mu, golden at the head, golden at the tail)
LEVELS = {
    "sd3": (28, {"shift": 3.0, "even_sigmas": False}, {"shift": 3.0}, None,
            [1, 0.987381, 0.974108], [0.110906, 0.008929, 0]),
    "z_image": (50, {"shift": 6.0}, {"shift": 6.0}, None,
                [1, 0.996610, 0.993103], [0.2, 0.109091, 0]),
    "z_image_turbo": (9, {"shift": 3.0}, {"shift": 3.0}, None,
                      [1, 0.96, 0.913043], [0.461538, 0.272727, 0]),
    "flux": (28, {"tokens": 4096}, {}, linear(4096),
             [1, 0.988409, 0.976222], [0.195455, 0.104721, 0]),
    "klein": (50, {"tokens": 4096, "mu": compute_empirical_mu}, {}, compute_empirical_mu(4096, 50),
              [1, 0.997309, 0.994521], [0.239631, 0.133719, 0]),
    "qwen": (50, {"tokens": 4096, "max_shift": 0.9, "max_image_seq_len": 8192,
                  "shift_terminal": 0.02}, {"shift_terminal": 0.02},
             linear(4096, high=0.9, most=8192), [1, 0.989701, 0.979192], [0.058476, 0.02, 0]),
    "linear": (7, {"tokens": 4096, "time_shift_type": "linear"}, {"time_shift_type": "linear"},
               linear(4096), None, None),
    "dynamic_sd3": (12, {"tokens": 1024, "even_sigmas": False}, {}, linear(1024), None, None),
    "one": (1, {"shift": 3.0}, {"shift": 3.0}, None, None, None),
}  # fmt: skip
MIX = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32) / 2
NOISE = np.random.default_rng(1).normal(size=(3, 4, 4, 4)).astype(np.float32)


@pytest.mark.long
@pytest.mark.parametrize("name", LEVELS)
def test_levels_and_trajectories_are_diffusers(name):
    steps, ours, config, mu, head, tail = LEVELS[name]
    theirs = Scheduler(use_dynamic_shifting=mu is not None, **config)
    even = None if ours.get("even_sigmas") is False else np.linspace(1, 1 / steps, steps)
    theirs.set_timesteps(steps if even is None else None, sigmas=even, mu=mu)
    table = make_flow_table(1.0 if mu is not None else config["shift"])
    seen = []

    def predict(x, times):
        seen.append((np.asarray(x), float(times[0])))
        return jnp.tanh(x @ jnp.asarray(MIX)) + jnp.sin(times[:, None, None, None] / 300)

    with jax.disable_jit():
        got = flow_euler(predict, jnp.asarray(NOISE), schedule=table, num_steps=steps,
                         use_dynamic_shifting=mu is not None, **ours)  # fmt: skip
    sigmas = np.array([at / 1000 for _, at in seen] + [0])
    np.testing.assert_allclose(sigmas, theirs.sigmas.numpy(), **CLOSE)
    np.testing.assert_allclose([at for _, at in seen], theirs.timesteps.numpy(), atol=1e-3)
    if head:
        np.testing.assert_allclose(sigmas[:3], head, **CLOSE)
        np.testing.assert_allclose(sigmas[-3:], tail, **CLOSE)
    x = torch.tensor(NOISE)
    theirs.set_begin_index(0)
    for (saw, _), t in zip(seen, theirs.timesteps, strict=True):
        np.testing.assert_allclose(saw, x.numpy(), atol=1e-5 * np.abs(x.numpy()).max())
        velocity = np.tanh(x.numpy() @ MIX) + np.sin(np.float32(t) / np.float32(300))
        x = theirs.step(torch.tensor(velocity), t, x).prev_sample
    np.testing.assert_allclose(got, x.numpy(), atol=1e-5 * np.abs(x.numpy()).max())


def test_the_golden_walk():
    """v = 0.3 x + sigma from (1, -0.5), 4 steps at shift 3."""
    x = jnp.array([1.0, -0.5]).reshape(1, 1, 1, 2)
    got = jax.jit(
        lambda x: flow_euler(
            lambda x, times: 0.3 * x + times[:, None, None, None] / 1000,
            x,
            schedule=make_flow_table(3.0),
            num_steps=4,
            shift=3.0,
        )
    )(x)
    np.testing.assert_allclose(got.ravel(), [0.137737, -0.954777], **CLOSE)


@pytest.mark.parametrize("pack", [1, 2])
def test_packed_latents_are_channel_major_and_come_back(pack):
    x = jax.random.normal(jax.random.key(0), (2, 2, 4, 6, 3))
    packed = noises.pack_latents(x, pack)
    assert packed.shape == (2, 2, 4 // pack, 6 // pack, 3 * pack**2)
    for c, row, column in np.ndindex(3, pack, pack):
        want = x[..., row::pack, column::pack, c]
        np.testing.assert_array_equal(packed[..., c * pack**2 + row * pack + column], want)
    np.testing.assert_array_equal(noises.unpack_latents(packed, pack), x)
    scale, shift = np.arange(1.0, 3 * pack**2 + 1).tolist(), [0.5] * (3 * pack**2)
    kw = {"scaling_factor": scale, "shift_factor": shift, "pack": pack}
    scaled = noises.sample_latents(jax.random.key(1), x, mean_only=True, **kw)
    want = (np.asarray(packed) - 0.5) * np.array(scale, np.float32)
    np.testing.assert_allclose(scaled, want, rtol=1e-6)
    np.testing.assert_allclose(noises.restore_latents(scaled, **kw), x, atol=1e-6)


def test_latents_that_do_not_pack_are_refused():
    with pytest.raises(ValueError, match="multiples of 2, but got 3 x 4"):
        noises.pack_latents(jnp.zeros((1, 3, 4, 2)), 2)
    with pytest.raises(ValueError, match="vectors of 4 channels, but got 3"):
        noises.sample_latents(
            jax.random.key(0), jnp.zeros((1, 2, 2, 4)), scaling_factor=[1.0] * 3, mean_only=True
        )
