"""Samplers: from noise to latents, each as one scan over a table of timesteps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dmpo_jax.noising import NoiseSchedule, to_sample_and_epsilon

Latents = Float[Array, "N h w C"]
Predict = Callable[[Latents, Int[Array, "N"], Any], Latents]

SPACINGS = ("leading", "trailing", "linspace")


def ddim_timesteps(
    num_train_timesteps: int,
    num_steps: int,
    *,
    timestep_spacing: str = "leading",
    steps_offset: int = 1,
) -> Int[np.ndarray, "S"]:
    """The training timesteps that DDIM visits, falling, int32.

    Args:
        timestep_spacing: leading (multiples of T // num_steps, plus steps_offset, so T - 1
            itself is not visited), trailing (from T - 1 down, which zero terminal SNR
            wants) or linspace (both ends).
        steps_offset: read by leading alone, as in diffusers.

    Raises:
        ValueError: if the spacing is unknown or a timestep would lie outside the table.

    Source: diffusers' DDIMScheduler.set_timesteps; arXiv 2305.08891, table 2.
    """
    if not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(
            f"num_steps must be in 1..{num_train_timesteps}, the training timesteps, "
            f"got {num_steps}"
        )
    if timestep_spacing == "leading":
        ratio = num_train_timesteps // num_steps
        timesteps = np.arange(num_steps)[::-1] * ratio + steps_offset
    elif timestep_spacing == "trailing":
        ratio = num_train_timesteps / num_steps
        timesteps = np.round(np.arange(num_train_timesteps, 0, -ratio)) - 1
    elif timestep_spacing == "linspace":
        timesteps = np.linspace(0, num_train_timesteps - 1, num_steps).round()[::-1]
    else:
        raise ValueError(f"timestep_spacing must be one of {SPACINGS}, got {timestep_spacing!r}")
    if timesteps[0] >= num_train_timesteps or timesteps[-1] < 0:
        raise ValueError(
            f"timesteps must be in 0..{num_train_timesteps - 1}, got {timesteps[0]:.0f} to "
            f"{timesteps[-1]:.0f}; lower num_steps={num_steps} or steps_offset={steps_offset}"
        )
    return timesteps.astype(np.int32)


def ddim(
    predict: Predict,
    latents: Latents,
    conditioning: Any,
    *,
    schedule: NoiseSchedule,
    num_steps: int,
    guidance_scale: float | int = 1.0,
    negative: Any = None,
    timestep_spacing: str = "leading",
    steps_offset: int = 1,
    set_alpha_to_one: bool = False,
    clip_sample: bool = False,
    clip_sample_range: float | int = 1.0,
) -> Latents:
    """Deterministic DDIM (eta 0). Pure; jit it over latents and conditioning.

    Args:
        predict: `(latents [N h w C], timesteps [N], conditioning) -> prediction`, of the
            type that the schedule names.
        latents: standard normal noise, `[N, h, w, C]`.
        conditioning: pytree whose leaves have a leading axis N.
        guidance_scale: w in negative + w (conditional - negative). A Python number: at 1
            the model runs once per step, on N, otherwise on 2N, negatives first.
        negative: as conditioning; the empty prompt's, where guidance is used.
        timestep_spacing, steps_offset: see `ddim_timesteps`.
        set_alpha_to_one: whether the last step arrives at no noise rather than at the
            noise of timestep 0. The defaults are Stable Diffusion's; diffusers' own differ.
        clip_sample, clip_sample_range: bound the predicted x0 (pixel models only).

    Returns:
        Latents, float32 `[N, h, w, C]`, still scaled.

    Raises:
        ValueError: if guidance lacks `negative`, its rows are not N, or an epsilon
            prediction would be asked for at pure noise.

    Source: Denoising Diffusion Implicit Models, arXiv 2010.02502; diffusers' DDIMScheduler.
    """
    timesteps = ddim_timesteps(
        schedule.num_train_timesteps,
        num_steps,
        timestep_spacing=timestep_spacing,
        steps_offset=steps_offset,
    )
    if schedule.prediction_type == "epsilon" and not schedule.alphas_cumprod[timesteps].all():
        raise ValueError(
            "an epsilon prediction at zero terminal SNR holds no image: use a schedule of "
            f"v_prediction or sample, or 'leading' spacing (got {timestep_spacing!r})"
        )
    # A fixed stride, not the next entry of the table: they differ for linspace and
    # where num_steps does not divide T, and diffusers takes the stride.
    previous = timesteps - schedule.num_train_timesteps // num_steps
    final = np.float32(1) if set_alpha_to_one else schedule.alphas_cumprod[0]
    arrival = np.where(previous >= 0, schedule.alphas_cumprod[previous], final)
    guided = _guided(predict, conditioning, len(latents), guidance_scale, negative)

    def step(x, row):
        timestep, signal, noise = row
        at = jnp.full(len(x), timestep)
        sample, epsilon = to_sample_and_epsilon(guided(x, at), x, at, schedule)
        if clip_sample:  # epsilon stays as predicted, as in diffusers
            sample = jnp.clip(sample, -clip_sample_range, clip_sample_range)
        return signal * sample + noise * epsilon, None

    rows = (timesteps, np.sqrt(arrival), np.sqrt(np.float32(1) - arrival))
    return jax.lax.scan(step, latents.astype(jnp.float32), rows)[0]


def _guided(
    predict: Predict, conditioning: Any, rows: int, guidance_scale: float | int, negative: Any
) -> Callable[[Latents, Int[Array, "N"]], Latents]:
    """`predict` with its conditioning bound, and guidance where there is any."""
    if guidance_scale == 1:
        return lambda x, timesteps: predict(x, timesteps, conditioning)
    if negative is None:
        raise ValueError(
            f"guidance_scale={guidance_scale} needs `negative`, the empty prompt's conditioning, "
            "got None; pass it or set guidance_scale=1.0"
        )
    for leaf in jax.tree.leaves((negative, conditioning)):
        if leaf.shape[0] != rows:
            raise ValueError(
                f"conditioning and negative need a leading axis of {rows}, one row per latent, "
                f"but got a leaf of shape {leaf.shape}"
            )
    # One call on 2N fills the accelerator better than two on N, and compiles one model.
    both = jax.tree.map(lambda *x: jnp.concatenate(x), negative, conditioning)

    def guided(x, timesteps):
        prediction = predict(jnp.tile(x, (2, 1, 1, 1)), jnp.tile(timesteps, 2), both)
        without, conditional = jnp.split(prediction.astype(jnp.float32), 2)
        return without + guidance_scale * (conditional - without)

    return guided
