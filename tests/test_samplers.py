"""Tests for dmpo_jax/samplers.py; parity is against the installed PyTorch diffusers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from dmpo_jax.noising import make_noise_schedule
from dmpo_jax.samplers import ddim, ddim_timesteps

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
TRAILING = {"timestep_spacing": "trailing", "steps_offset": 0, "set_alpha_to_one": True}
LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0, "set_alpha_to_one": False}

# name: (noise schedule, sampler settings); clip_sample is off where not named
CASES = {
    "sd15": (SD15, LEADING),
    "sd15_to_one": (SD15, LEADING | {"steps_offset": 0, "set_alpha_to_one": True}),
    "sd15_linspace": (SD15, LINSPACE),
    "sd21_v": (SD15 | {"prediction_type": "v_prediction"}, LEADING),
    "zero_snr_v": (
        SD15 | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        TRAILING,
    ),
    "zero_snr_sample": (
        SD15 | {"prediction_type": "sample", "rescale_betas_zero_snr": True},
        TRAILING,
    ),
    "sample": (SD15 | {"prediction_type": "sample"}, LEADING),
    "squaredcos_v": (
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        TRAILING,
    ),
    "squaredcos": ({"beta_schedule": "squaredcos_cap_v2"}, LEADING),
    "linear_clipped": ({}, LEADING | {"clip_sample": True, "clip_sample_range": 0.7}),
}

RNG = np.random.default_rng(0)
MIX = RNG.normal(size=(4, 4)).astype(np.float32) / 2
NOISE = RNG.normal(size=(3, 4, 4, 4)).astype(np.float32)


class Told(NamedTuple):
    """A conditioning with an absent field, as real ones have."""

    context: Any
    pooled: Any = None


CONTEXT = Told(jnp.asarray(RNG.normal(size=(3, 4)).astype(np.float32)))
NEGATIVE = Told(jnp.asarray(RNG.normal(size=(3, 4)).astype(np.float32)))


def network(x, timesteps, context):
    """A fixed small network of arrays [N h w 4], in numpy float32."""
    x, timesteps, context = (np.asarray(a, np.float32) for a in (x, timesteps, context))
    phase = np.sin(timesteps / np.float32(300))[:, None, None, None]
    return np.tanh(x @ MIX + context[:, None, None, :] * phase)


def predict(x, timesteps, told):
    phase = jnp.sin(timesteps.astype(jnp.float32) / 300)[:, None, None, None]
    return jnp.tanh(x @ jnp.asarray(MIX) + told.context[:, None, None, :] * phase)


def split(case):
    schedule, settings = CASES[case]
    theirs = DDIMScheduler(**schedule, **({"clip_sample": False} | settings))
    return theirs, make_noise_schedule(**schedule), settings


def trajectory_of_diffusers(scheduler, num_steps, combine=lambda at: at(CONTEXT)):
    scheduler.set_timesteps(num_steps)
    x, seen = torch.tensor(NOISE), []
    for t in scheduler.timesteps:
        seen.append(x.numpy())

        def at(told, x=x, t=t):
            return network(x.numpy(), np.full(len(x), int(t)), told.context)

        x = scheduler.step(torch.tensor(combine(at)), int(t), x, eta=0.0).prev_sample
    return seen, x.numpy()


def relative_error(got, want):
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_steps", [25, 7])
def test_trajectories_equal_diffusers(case, num_steps):
    theirs, schedule, settings = split(case)
    seen, want = trajectory_of_diffusers(theirs, num_steps)
    ours = []

    def recording(x, timesteps, told):
        ours.append(np.asarray(x))
        return predict(x, timesteps, told)

    def sample(f, x):
        return ddim(f, x, CONTEXT, schedule=schedule, num_steps=num_steps, **settings)

    with jax.disable_jit():  # so that the scan is a loop, and every step can be looked at
        sample(recording, jnp.asarray(NOISE))
    assert len(ours) == len(seen)
    for i, (a, b) in enumerate(zip(ours, seen, strict=True)):
        assert relative_error(a, b) < 1e-5, f"step {i}"
    got = jax.jit(lambda x: sample(predict, x))(jnp.asarray(NOISE))
    assert got.dtype == jnp.float32
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 25, 27, 50, 243, 999])
def test_timesteps_equal_diffusers(spacing, offset, num_steps):
    theirs = DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    theirs.set_timesteps(num_steps)
    got = ddim_timesteps(1000, num_steps, timestep_spacing=spacing, steps_offset=offset)
    np.testing.assert_array_equal(got, theirs.timesteps.numpy())


@pytest.mark.parametrize("scale", [0.0, 0.5, 7.5])
def test_guidance_equals_a_loop_by_hand(scale):
    theirs, schedule, settings = split("sd15")

    def combine(at):
        without = at(NEGATIVE)
        return without + np.float32(scale) * (at(CONTEXT) - without)

    _, want = trajectory_of_diffusers(theirs, 25, combine)
    got = ddim(
        predict,
        jnp.asarray(NOISE),
        CONTEXT,
        schedule=schedule,
        num_steps=25,
        guidance_scale=scale,
        negative=NEGATIVE,
        **settings,
    )
    assert relative_error(got, want) < 1e-5


def test_guidance_doubles_the_batch_only_where_it_is_used():
    schedule, seen = make_noise_schedule(**SD15), []

    def recording(x, timesteps, told):
        seen.append((x.shape[0], timesteps.shape[0], told.context.shape[0]))
        return predict(x, timesteps, told)

    for scale in (1.0, 2.0):
        ddim(
            recording,
            jnp.asarray(NOISE),
            CONTEXT,
            schedule=schedule,
            num_steps=3,
            guidance_scale=scale,
            negative=NEGATIVE,
        )
    assert set(seen[:1]) == {(3, 3, 3)}
    assert seen[-1] == (6, 6, 6)


def test_a_perfect_model_gives_the_image_back():
    schedule = make_noise_schedule(
        **SD15, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    image = jnp.asarray(np.tanh(NOISE))
    signal, noise = jnp.asarray(schedule.signal), jnp.asarray(schedule.noise)

    def perfect(x, timesteps, told):
        a, b = (table[timesteps][:, None, None, None] for table in (signal, noise))
        return (a * x - image) / b  # v of an x whose x0 is the image

    settings = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    got = ddim(perfect, jnp.asarray(NOISE), None, schedule=schedule, num_steps=10, **settings)
    np.testing.assert_allclose(got, image, atol=1e-5)


def test_errors():
    schedule, x = make_noise_schedule(**SD15), jnp.asarray(NOISE)

    def call(**kw):
        return ddim(predict, x, CONTEXT, **({"schedule": schedule, "num_steps": 5} | kw))

    with pytest.raises(ValueError, match=r"guidance_scale=7.5 needs `negative`"):
        call(guidance_scale=7.5)
    with pytest.raises(ValueError, match="leading axis of 3"):
        call(guidance_scale=7.5, negative=Told(jnp.zeros((1, 4))))
    with pytest.raises(ValueError, match=r"'leading', 'trailing', 'linspace'.*'karras'"):
        call(timestep_spacing="karras")
    for num_steps in (0, 1001):
        with pytest.raises(ValueError, match=f"got {num_steps}"):
            call(num_steps=num_steps)
    with pytest.raises(ValueError, match="lower num_steps=1000 or steps_offset=1"):
        call(num_steps=1000)
    zero = make_noise_schedule(**SD15, rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        call(schedule=zero, timestep_spacing="trailing")
    assert np.isfinite(call(schedule=zero)).all()  # leading does not visit the last timestep
