"""Euler's method for rectified flow, as diffusers' FlowMatchEulerDiscreteScheduler."""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from dmpo_jax.diffusion.noise import NoiseTable, make_flow_table, shifted
from dmpo_jax.diffusion.walk import OFF, Latents, Predict, Solver, Table, walk
from dmpo_jax.errors import UserError

TIME_SHIFTS = ("exponential", "linear")
Mu = Callable[[int, int], float]  # (tokens of an image, steps) -> the dynamic shift


def flow_euler(
    predict: Predict,
    latents: Latents,
    *,
    schedule: NoiseTable,
    num_steps: int,
    shift: float | int = 1.0,
    use_dynamic_shifting: bool = False,
    base_shift: float | int = 0.5,
    max_shift: float | int = 1.15,
    base_image_seq_len: int = 256,
    max_image_seq_len: int = 4096,
    time_shift_type: str = "exponential",
    shift_terminal: float | None = None,
    even_sigmas: bool = True,
    mu: Mu | None = None,
    tokens: int | None = None,
) -> Latents:
    """Samples by Euler's method from sigma 1 to 0: `x + (sigma' - sigma) velocity`.

    Arguments and result are as for `ddim` otherwise.

    Args:
        shift: static shift towards noise; ignored with use_dynamic_shifting.
        use_dynamic_shifting: shift by mu, which grows with the image: by e^mu if
            time_shift_type is exponential, by mu if it is linear.
        base_shift, max_shift, base_image_seq_len, max_image_seq_len: mu is linear in the
            image's tokens: base_shift at the base length, max_shift at the largest.
        shift_terminal: the levels are stretched so that the last one before 0 is this.
        even_sigmas: the pipeline passes levels from 1 to 1 / num_steps to its scheduler.
            False spaces them between the ends of the training table, which are already
            shifted, and shifts them again, as StableDiffusion3Pipeline does.
        mu: the pipeline's own rule in place of the linear one.
        tokens: of an image, as the transformer counts them; dynamic shifting requires them.

    Raises:
        ValueError: the schedule is not flow noise, or the settings give no levels.

    Source: arXiv 2403.03206; diffusers' FlowMatchEulerDiscreteScheduler.
    """
    if schedule.kind != "flow":
        raise UserError(
            f"flow_euler walks rectified flow's noise, but the model's is {schedule.kind}: use "
            "another sampler"
        )
    amount = shift
    if use_dynamic_shifting:
        if tokens is None:
            raise UserError("use_dynamic_shifting needs the tokens of an image, but got none")
        if mu is None:
            slope = (max_shift - base_shift) / (max_image_seq_len - base_image_seq_len)
            exponent = base_shift + slope * (tokens - base_image_seq_len)
        else:
            exponent = mu(tokens, num_steps)
        if time_shift_type not in TIME_SHIFTS:
            raise UserError(f"time_shift_type must be one of {TIME_SHIFTS}, got {time_shift_type}")
        amount = math.exp(exponent) if time_shift_type == "exponential" else exponent
    sigmas = flow_sigmas(
        num_steps,
        shift=amount,
        table_shift=1.0 if use_dynamic_shifting else shift,
        even=even_sigmas,
        terminal=shift_terminal,
        num_train_timesteps=schedule.num_train_timesteps,
    )
    times = schedule.num_train_timesteps * sigmas[:-1]
    columns = times, 1 - sigmas[:-1], sigmas[:-1], 1 - sigmas[1:], sigmas[1:], 0 * times
    rows = Table(*(column.astype(np.float32) for column in columns))
    return walk(predict, latents, rows, schedule.prediction_type)


def flow_sigmas(
    num_steps: int,
    *,
    shift: float | int,
    table_shift: float | int = 1.0,
    even: bool = True,
    terminal: float | None = None,
    num_train_timesteps: int = 1000,
) -> Float[np.ndarray, " S1"]:
    """Returns the visited levels, decreasing, followed by 0; float64.

    Args:
        shift: of the levels. table_shift: of the training table, whose ends bound the levels
            if not even. Others: see `flow_euler`.
    """
    if num_steps < 1:
        raise UserError(f"num_steps must be at least 1, got {num_steps}")
    if even:
        sigmas = np.linspace(1.0, 1.0 / num_steps, num_steps)
    else:
        ends = make_flow_table(table_shift, num_train_timesteps).noise
        sigmas = np.linspace(ends[-1], ends[0], num_steps, dtype=np.float64)
    if not 0 < shift < math.inf:
        raise UserError(f"the shift must be above 0 and finite, got {shift}; 1 shifts nothing")
    sigmas = shifted(sigmas, shift)
    if terminal:
        if not 0 < terminal < 1 or sigmas[-1] >= 1:
            raise UserError(
                f"shift_terminal must lie in (0, 1) and there must be two steps or more, got "
                f"shift_terminal={terminal} and {num_steps} steps"
            )
        sigmas = 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])
    return np.append(sigmas, 0.0)


FLOW_EULER = Solver(
    flow_euler,
    "FlowMatchEulerDiscreteScheduler",
    noise="flow",
    only=lambda config: {
        "use_karras_sigmas": OFF,
        "use_exponential_sigmas": OFF,
        "use_beta_sigmas": OFF,
        "invert_sigmas": OFF,
        "stochastic_sampling": OFF,
        "num_train_timesteps": (config.get("num_train_timesteps", 1000),),  # the noise table's
    },
    given=frozenset({"even_sigmas", "mu", "tokens"}),
    strict=True,
)
