"""Tests for dmpo_jax/diffusion/samplers.py; parity is against the installed PyTorch diffusers."""

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from dmpo_jax.diffusion.noise import make_ddpm_table
from dmpo_jax.diffusion.samplers import SAMPLERS, ddim, dpmpp_2m, euler, guide, spaced_timesteps

# diffusers' own: it makes NumPy arrays of tensors by a way that NumPy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
}
SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = {"prediction_type": "v_prediction"}
SAMPLE = {"prediction_type": "sample"}
ZERO_SNR = {"rescale_betas_zero_snr": True}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING = {"timestep_spacing": "trailing", "steps_offset": 0}
LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
KARRAS = {"use_karras_sigmas": True}
TO_ONE = {"set_alpha_to_one": True}

# name: (noise schedule, sampler settings); what a sampler does not know is left out of its case,
# and a setting that is not named has diffusers' default
CASES = {
    "default": ({}, {}),
    "sd15": (SD15, LEADING | {"set_alpha_to_one": False, "clip_sample": False}),
    "sd15_to_one": (SD15, LEADING | {"steps_offset": 0, "clip_sample": False}),
    "sd15_linspace": (SD15, LINSPACE | {"set_alpha_to_one": False, "clip_sample": False}),
    "sdxl": (SD15, LEADING | {"clip_sample": False, "use_karras_sigmas": False}),
    "sd21_v": (SD15 | V, LEADING | {"set_alpha_to_one": False, "clip_sample": False}),
    "zero_snr_v": (SD15 | V | ZERO_SNR, TRAILING | TO_ONE | {"clip_sample": False}),
    "zero_snr_sample": (SD15 | SAMPLE | ZERO_SNR, TRAILING | TO_ONE | {"clip_sample": False}),
    "sample": (SD15 | SAMPLE, LEADING | {"clip_sample": False}),
    "squaredcos_v": (
        {"beta_schedule": "squaredcos_cap_v2"} | V,
        TRAILING | TO_ONE | {"clip_sample": False},
    ),
    "squaredcos": ({"beta_schedule": "squaredcos_cap_v2"}, LEADING | {"clip_sample": False}),
    "linear_clipped": ({}, LEADING | {"clip_sample": True, "clip_sample_range": 0.7}),
}
SIGMA_CASES = {
    "karras": (SD15, LEADING | KARRAS),
    "karras_default": ({}, KARRAS),
    "karras_zero_snr_v": (SD15 | V | ZERO_SNR, TRAILING | KARRAS),
    "to_sigma_min": (SD15, LEADING | {"final_sigmas_type": "sigma_min"}),
}
DPM_CASES = {
    "first_order": (SD15, TRAILING | {"solver_order": 1}),
    "never_lower": (
        SD15,
        LEADING | {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
    ),
    "euler_at_final": (
        SD15,
        LEADING | {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
    ),
}
ALL = (
    [(sampler, case) for sampler in SCHEDULERS for case in CASES if case != "linear_clipped"]
    + [("ddim", "linear_clipped")]
    + [(sampler, case) for sampler in ("euler", "dpmpp_2m") for case in SIGMA_CASES]
    + [("dpmpp_2m", case) for case in DPM_CASES]
)

RNG = np.random.default_rng(0)
MIX = RNG.normal(size=(4, 4)).astype(np.float32) / 2
NOISE = RNG.normal(size=(3, 4, 4, 4)).astype(np.float32)


class Told(NamedTuple):
    """A conditioning with an absent field, as real ones have."""

    context: Any
    pooled: Any = None


CONTEXT = Told(jnp.asarray(RNG.normal(size=(3, 4)).astype(np.float32)))
NEGATIVE = Told(jnp.asarray(RNG.normal(size=(3, 4)).astype(np.float32)))
THIRD = Told(jnp.asarray(RNG.normal(size=(3, 4)).astype(np.float32)))


def network(x, timesteps, context):
    """A fixed small network of arrays [N h w 4], in numpy float32."""
    x, timesteps, context = (np.asarray(a, np.float32) for a in (x, timesteps, context))
    phase = np.sin(timesteps / np.float32(300))[:, None, None, None]
    return np.tanh(x @ MIX + context[:, None, None, :] * phase)


def predict(x, timesteps, told):
    phase = jnp.sin(timesteps.astype(jnp.float32) / 300)[:, None, None, None]
    return jnp.tanh(x @ jnp.asarray(MIX) + told.context[:, None, None, :] * phase)


def conditional(x, timesteps):
    return predict(x, timesteps, CONTEXT)


def settings_of(name, function, cls):
    """A case's (settings of ours, all of diffusers' keyword arguments)."""
    schedule, settings = (CASES | SIGMA_CASES | DPM_CASES)[name]
    known = inspect.signature(cls.__init__).parameters
    ours = function.defaults
    settings = {key: value for key, value in settings.items() if key in known}
    defaults = {key: p.default for key, p in known.items() if key in ours}
    return defaults | settings, schedule | settings


def split(sampler, case):
    function, cls = SAMPLERS[sampler], SCHEDULERS[sampler]
    ours, theirs = settings_of(case, function, cls)
    return cls(**theirs), make_ddpm_table(**(CASES | SIGMA_CASES | DPM_CASES)[case][0]), ours


def trajectory_of_diffusers(scheduler, num_steps, combine=lambda at: at(CONTEXT)):
    """Returns the inputs of the model at each step (latents, timestep), and the result."""
    scheduler.set_timesteps(num_steps)
    if hasattr(scheduler, "set_begin_index"):  # else two equal timesteps first lose it a step
        scheduler.set_begin_index(0)
    x, seen = torch.tensor(NOISE) * scheduler.init_noise_sigma, []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        seen.append((scaled.numpy(), float(t)))

        def at(told, scaled=scaled, t=t):
            return network(scaled.numpy(), np.full(len(NOISE), float(t)), told.context)

        x = scheduler.step(torch.tensor(combine(at)), t, x).prev_sample
    return seen, x.numpy()


def relative_error(got, want):
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


def trajectory_in_float64(scheduler, num_steps):
    """Euler's method on diffusers' own sigmas and timesteps, in float64."""
    scheduler.set_timesteps(num_steps)
    x, seen = NOISE * np.float64(scheduler.init_noise_sigma), []
    sigmas = scheduler.sigmas.double().numpy()
    context = np.asarray(CONTEXT.context, np.float64)
    kind = scheduler.config.prediction_type
    for t, sigma, after in zip(
        scheduler.timesteps.numpy().astype(np.float64), sigmas, sigmas[1:], strict=False
    ):
        scale = np.hypot(sigma, 1)
        seen.append((x / scale, t))
        phase = np.sin(t / 300) * context[:, None, None, :]
        out = np.tanh(x / scale @ MIX.astype(np.float64) + phase)
        sample = {"sample": out, "v_prediction": x / scale**2 - out * sigma / scale}.get(
            kind, x - sigma * out
        )
        x = x + (x - sample) / sigma * (after - sigma)
    return seen, x


def same_trajectory(sampler, schedule, settings, num_steps, seen, want, tolerance):
    ours = []

    def recording(x, timesteps):
        ours.append((np.asarray(x), float(timesteps[0])))
        return conditional(x, timesteps)

    with jax.disable_jit():  # so that the scan is a loop, and every step can be looked at
        got = SAMPLERS[sampler](
            recording, jnp.asarray(NOISE), schedule=schedule, num_steps=num_steps, **settings
        )
    assert len(ours) == len(seen)
    for i, ((a, at), (b, wanted)) in enumerate(zip(ours, seen, strict=True)):
        assert at == pytest.approx(wanted, abs=1e-3), f"timestep of step {i}"
        assert relative_error(a, b) < tolerance, f"step {i}"
    assert got.dtype == jnp.float32
    assert relative_error(got, want) < tolerance


# From so much noise, in few steps, diffusers' Euler loses digits: in sigma, where it works, it
# subtracts numbers of 4096 (20,000 for squaredcos). Ours are held to float64 there.
STIFF = ("zero_snr_v", "zero_snr_sample", "karras_zero_snr_v", "squaredcos_v")


@pytest.mark.long
@pytest.mark.parametrize("num_steps", [25, 7, 2, 1])
@pytest.mark.parametrize(("sampler", "case"), ALL)
def test_trajectories_equal_diffusers(sampler, case, num_steps):
    theirs, schedule, settings = split(sampler, case)
    if sampler == "euler" and case in STIFF and (num_steps < 25 or case == "squaredcos_v"):
        seen, want = trajectory_in_float64(theirs, num_steps)
    else:
        seen, want = trajectory_of_diffusers(theirs, num_steps)
    same_trajectory(sampler, schedule, settings, num_steps, seen, want, 1e-5)


@pytest.mark.parametrize("num_steps", [25, 1])
@pytest.mark.parametrize("case", ["sdxl", *STIFF])
def test_the_float64_loop_is_diffusers_euler(case, num_steps):
    theirs, _, _ = split("euler", case)
    exact = trajectory_in_float64(theirs, num_steps)[1]
    want = trajectory_of_diffusers(theirs, num_steps)[1]
    assert relative_error(exact, want) < (1e-2 if case in STIFF else 1e-5)


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_compiled_it_is_the_same(sampler):
    theirs, schedule, settings = split(sampler, "sdxl")
    _, want = trajectory_of_diffusers(theirs, 25)
    sample = jax.jit(
        lambda x: SAMPLERS[sampler](conditional, x, schedule=schedule, num_steps=25, **settings)
    )
    assert relative_error(sample(jnp.asarray(NOISE)), want) < 1e-5


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 25, 27, 50, 243, 990])
def test_timesteps_equal_diffusers(spacing, offset, num_steps):
    kw = {"timestep_spacing": spacing, "steps_offset": offset}
    for cls in SCHEDULERS.values():
        theirs = cls(**kw)
        theirs.set_timesteps(num_steps)
        ends = int(cls is DPMSolverMultistepScheduler)
        got = spaced_timesteps(1000, num_steps, ends=ends, **kw)
        if cls is not EulerDiscreteScheduler:
            got = got.round()
        np.testing.assert_allclose(got, theirs.timesteps.numpy(), rtol=1e-6, atol=0)


def test_whole_timesteps_are_integers():
    """So that an embedding of them is the one that training saw."""
    schedule, seen = make_ddpm_table(**SD15), []

    def recording(x, timesteps):
        seen.append(timesteps.dtype)
        return conditional(x, timesteps)

    for sample, settings in ((euler, LINSPACE), (euler, LEADING), (dpmpp_2m, KARRAS)):
        sample(recording, jnp.asarray(NOISE), schedule=schedule, num_steps=3, **settings)
    assert [np.dtype(dtype) for dtype in seen] == [np.float32, np.int32, np.int32]


@pytest.mark.parametrize("scale", [0.0, 0.5, 7.5])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_guidance_equals_a_loop_by_hand(sampler, scale):
    theirs, schedule, settings = split(sampler, "sd15")

    def combine(at):
        without = at(NEGATIVE)
        return without + np.float32(scale) * (at(CONTEXT) - without)

    _, want = trajectory_of_diffusers(theirs, 10, combine)
    guided = guide(predict, (CONTEXT, NEGATIVE), (scale, 1 - scale))
    got = SAMPLERS[sampler](guided, jnp.asarray(NOISE), schedule=schedule, num_steps=10, **settings)
    assert relative_error(got, want) < 1e-5


def test_guidance_of_editing_is_the_papers():
    text, image = 7.5, 1.5
    parts, weights = (CONTEXT, NEGATIVE, THIRD), (text, image - text, 1 - image)
    x, timesteps = jnp.asarray(NOISE), jnp.full(3, 500)
    both, only_image, neither = (predict(x, timesteps, part) for part in parts)
    want = neither + image * (only_image - neither) + text * (both - only_image)
    got = guide(predict, parts, weights)(x, timesteps)
    assert relative_error(got, want) < 1e-6


def test_guidance_is_one_call_and_only_where_it_is_used():
    seen = []

    def recording(x, timesteps, told):
        seen.append((x.shape[0], timesteps.shape[0], told.context.shape[0]))
        return predict(x, timesteps, told).astype(jnp.bfloat16)

    x, timesteps = jnp.asarray(NOISE), jnp.full(3, 500)
    alone = guide(recording, (CONTEXT,), (1.0,))(x, timesteps)
    assert alone.dtype == jnp.bfloat16  # as the model gave it
    for parts in ((CONTEXT, NEGATIVE), (CONTEXT, NEGATIVE, THIRD)):
        mixed = guide(recording, parts, (1.0,) * len(parts))(x, timesteps)
        assert mixed.dtype == jnp.float32
    halved = guide(recording, (CONTEXT,), (0.5,))(x, timesteps)
    assert relative_error(halved, alone.astype(jnp.float32) / 2) == 0
    assert seen == [(3, 3, 3), (6, 6, 6), (9, 9, 9), (3, 3, 3)]


@pytest.mark.parametrize(("sampler", "settings"), [("ddim", TO_ONE), ("euler", {})])
def test_a_perfect_model_gives_the_image_back(sampler, settings):
    schedule = make_ddpm_table(**SD15, **V, **ZERO_SNR)
    image = jnp.asarray(np.tanh(NOISE))
    signal, noise = jnp.asarray(schedule.signal), jnp.asarray(schedule.noise)

    def perfect(x, timesteps):
        a, b = (table[timesteps][:, None, None, None] for table in (signal, noise))
        return (a * x - image) / b  # v of an x whose x0 is the image

    got = SAMPLERS[sampler](
        perfect,
        jnp.asarray(NOISE),
        schedule=schedule,
        num_steps=10,
        timestep_spacing="trailing",
        **settings,
    )
    # Euler starts at a signal of 2**-12, not 0, of which this model knows nothing.
    np.testing.assert_allclose(got, image, atol=1e-5 if sampler == "ddim" else 1e-3)


def test_errors():
    schedule, x = make_ddpm_table(**SD15), jnp.asarray(NOISE)

    def call(sample=ddim, **kw):
        return sample(conditional, x, **({"schedule": schedule, "num_steps": 5} | kw))

    with pytest.raises(ValueError, match=r"2 parts and weights \[1.0\]"):
        guide(predict, (CONTEXT, NEGATIVE), (1.0,))
    for wrong in (Told(jnp.zeros((1, 4))), Told(jnp.zeros((3, 4)), jnp.zeros((4, 2)))):
        with pytest.raises(ValueError, match="leading axis of 3"):
            guide(predict, (wrong, wrong), (7.5, -6.5))(x, jnp.full(3, 1))
    with pytest.raises(ValueError, match=r"'leading', 'trailing', 'linspace'.*'karras'"):
        call(timestep_spacing="karras")
    for sample, most in ((ddim, 1000), (euler, 1000), (dpmpp_2m, 999)):
        for num_steps in (0, most + 1):
            with pytest.raises(ValueError, match=f"1..{most}.* got {num_steps}"):
                call(sample, num_steps=num_steps)
    with pytest.raises(ValueError, match="lower num_steps=1000 or steps_offset=1"):
        call(num_steps=1000, steps_offset=1)
    with pytest.raises(ValueError, match=r"final_sigmas_type.*'zero', 'sigma_min'.*'one'"):
        call(euler, final_sigmas_type="one")
    with pytest.raises(ValueError, match="solver_order must be 1 or 2, got 3"):
        call(dpmpp_2m, solver_order=3)
    zero = make_ddpm_table(**SD15, rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        call(schedule=zero, timestep_spacing="trailing")
    assert np.isfinite(call(schedule=zero)).all()  # leading does not visit the last timestep
