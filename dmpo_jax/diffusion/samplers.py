"""Samplers from noise to latents: each is one scan over a table precomputed in NumPy.

With x = signal x0 + noise epsilon, a step splits the model's prediction into x0 and epsilon
and recombines them at the next, lower noise level:

    x' = signal' x0 + noise' epsilon + correction (x0 - x0 of the step before)

Samplers differ in their levels and in the correction, which is 0 except for DPM-Solver++. Each
has a `Solver`: its scheduler class, and the keys of scheduler_config.json that it does not
support.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Shaped

from dmpo_jax.diffusion.flow_euler import FLOW_EULER
from dmpo_jax.diffusion.noise import NoiseTable
from dmpo_jax.diffusion.walk import OFF, Config, Latents, Predict, Solver, Table, Times, walk
from dmpo_jax.errors import UserError

SPACINGS = ("leading", "trailing", "linspace")
FINAL_SIGMAS = ("zero", "sigma_min")
# diffusers' last signal squared under zero terminal SNR, where it divides by it.
SMALLEST_SIGNAL = np.float32(2.0**-24)


def guide(
    predict: Callable[[Latents, Times, Any], Latents],
    parts: Sequence[Any],
    weights: Sequence[float | int],
) -> Predict:
    """Returns a predictor of `sum_i weights[i] predict(latents, timesteps, parts[i])`, float32.

    It calls the model once on k N rows (k parts). Each latent's k rows are adjacent, so that
    rows stay on their device under data sharding. One part of weight 1 is `predict` alone.

    Args:
        parts: conditionings, pytrees of one structure whose leaves have a leading axis N.
        weights: one per part. Classifier-free guidance w on (conditional, negative): w and
            1 - w. Editing on (text and image, negative and image, negative and no image):
            s_text, s_image - s_text and 1 - s_image.

    Raises:
        ValueError: if the numbers of weights and parts differ, or the rows are not N.

    Source: arXiv 2207.12598, equation 6; InstructPix2Pix, arXiv 2211.09800, equation 3.
    """
    if len(parts) != len(weights) or not parts:
        raise UserError(
            f"guidance needs one weight for each of its parts, one at least, but got "
            f"{len(parts)} parts and weights {list(weights)}"
        )
    k = len(parts)
    if k == 1 and weights[0] == 1:
        return lambda x, timesteps: predict(x, timesteps, parts[0])
    rows = {leaf.shape[0] for leaf in jax.tree.leaves(list(parts))}

    def merge(*leaves):
        return jnp.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:])

    def guided(x, timesteps):
        if rows - {len(x)}:
            raise UserError(
                f"every conditioning needs a leading axis of {len(x)}, one row per latent, "
                f"but got leading axes {sorted(rows)}"
            )
        told = jax.tree.map(merge, *parts)
        prediction = predict(jnp.repeat(x, k, axis=0), jnp.repeat(timesteps, k), told)
        prediction = prediction.astype(jnp.float32).reshape(len(x), k, *prediction.shape[1:])
        # Not a matrix product, which accelerators compute in fewer bits.
        return (prediction * jnp.asarray(weights, jnp.float32).reshape(1, k, 1, 1, 1)).sum(1)

    return guided


def ddim(
    predict: Predict,
    latents: Latents,
    *,
    schedule: NoiseTable,
    num_steps: int,
    timestep_spacing: str = "leading",
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
    clip_sample: bool = False,
    clip_sample_range: float | int = 1.0,
) -> Latents:
    """Samples by deterministic DDIM (eta 0). Pure: jit it over latents and `predict`'s closure.

    Args:
        predict: `(latents [N h w C], timesteps [N]) -> prediction`, of the schedule's
            prediction type; see `guide`.
        latents: standard normal noise, `[N, h, w, C]`.
        timestep_spacing, steps_offset: see `spaced_timesteps`.
        set_alpha_to_one: the last step ends at zero noise rather than at the noise of
            timestep 0.
        clip_sample, clip_sample_range: bound the predicted x0 (pixel models only). diffusers
            clips by default, which destroys latents; pipelines turn it off on loading.

    Returns:
        Latents, float32 `[N, h, w, C]`, still scaled.

    Raises:
        ValueError: if the timesteps are not in the schedule, or an epsilon prediction would
            be required at pure noise.

    Source: Denoising Diffusion Implicit Models, arXiv 2010.02502; diffusers' DDIMScheduler.
    """
    count = schedule.num_train_timesteps
    timesteps = spaced_timesteps(
        count, num_steps, timestep_spacing=timestep_spacing, steps_offset=steps_offset
    )
    if timestep_spacing == "linspace":
        timesteps = timesteps.round()
    timesteps = timesteps.astype(np.int32)
    here = schedule.signal_squared[timesteps]
    if schedule.prediction_type == "epsilon" and not here.all():
        raise UserError(
            "an epsilon prediction at zero terminal SNR holds no image: use a schedule of "
            f"v_prediction or sample, or 'leading' spacing (got {timestep_spacing!r})"
        )
    # A fixed stride, as in diffusers, not the next entry of the table: they differ for
    # linspace and where num_steps does not divide T.
    previous = timesteps - count // num_steps
    final = np.float32(1) if set_alpha_to_one else schedule.signal_squared[0]
    arrival = np.where(previous >= 0, schedule.signal_squared[previous], final)
    one = np.float32(1)
    table = Table(
        timesteps,
        np.sqrt(here),
        np.sqrt(one - here),
        np.sqrt(arrival),
        np.sqrt(one - arrival),
        np.zeros_like(here),
    )
    bound = clip_sample_range if clip_sample else None
    return walk(predict, latents, table, schedule.prediction_type, clip=bound)


DDIM = Solver(ddim, "DDIMScheduler", only=lambda config: {"thresholding": OFF})


def euler(
    predict: Predict,
    latents: Latents,
    *,
    schedule: NoiseTable,
    num_steps: int,
    timestep_spacing: str = "linspace",
    steps_offset: int = 0,
    use_karras_sigmas: bool = False,
    final_sigmas_type: str = "zero",
) -> Latents:
    """Samples by Euler's method in sigma = noise / signal, without churn. As `ddim` otherwise.

    Args:
        timestep_spacing, steps_offset: see `spaced_timesteps`; linspace visits fractional
            timesteps, between the training timesteps.
        use_karras_sigmas: EDM's spacing of levels between the same ends.
        final_sigmas_type: the level at which the last step ends: zero, or sigma_min, the
            noise of timestep 0.

    Source: EDM, arXiv 2206.00364, algorithm 1; diffusers' EulerDiscreteScheduler.
    """
    table = sigma_table(schedule)
    timesteps = spaced_timesteps(
        len(table), num_steps, timestep_spacing=timestep_spacing, steps_offset=steps_offset
    ).astype(np.float32)
    sigmas = np.interp(timesteps, np.arange(len(table)), table)
    if use_karras_sigmas:
        sigmas = karras_sigmas(sigmas[0], sigmas[-1], num_steps)
        timesteps = _timesteps_of(sigmas, table).astype(np.float32)
    if (timesteps == timesteps.round()).all():
        timesteps = timesteps.astype(np.int32)
    sigmas = _with_final(sigmas, table, final_sigmas_type)
    rows = _table_of(timesteps, sigmas, np.zeros(len(timesteps)))
    # As in diffusers: leading starts below the last timestep, yet from noise of variance 1.
    largest = float(sigmas.max())
    start = np.hypot(largest, 1) if timestep_spacing == "leading" else largest
    scale = np.float32(start / np.hypot(float(sigmas[0]), 1))
    latents = walk(predict, latents * scale, rows, schedule.prediction_type)
    # diffusers' latents are x0 + sigma epsilon: the image has full strength at any noise.
    return latents * np.float32(np.hypot(float(sigmas[-1]), 1))


_SIGMAS = {"use_exponential_sigmas": OFF, "use_beta_sigmas": OFF}


def _euler_only(config: Config) -> dict[str, tuple[Any, ...]]:
    only: dict[str, tuple[Any, ...]] = {**_SIGMAS, "interpolation_type": ("linear",)}
    if config.get("prediction_type") == "v_prediction":  # continuous ones exist for v only
        only["timestep_type"] = ("discrete",)
    if config.get("use_karras_sigmas"):
        only |= {"sigma_min": (None,), "sigma_max": (None,)}
    return only


EULER = Solver(
    euler,
    "EulerDiscreteScheduler",
    stands_in=("EulerAncestralDiscreteScheduler",),
    only=_euler_only,
)


def dpmpp_2m(
    predict: Predict,
    latents: Latents,
    *,
    schedule: NoiseTable,
    num_steps: int,
    timestep_spacing: str = "linspace",
    steps_offset: int = 0,
    use_karras_sigmas: bool = False,
    final_sigmas_type: str = "zero",
    solver_order: int = 2,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> Latents:
    """Samples by DPM-Solver++, deterministic multistep, midpoint. As `ddim` otherwise.

    Args:
        timestep_spacing, steps_offset, use_karras_sigmas, final_sigmas_type: as of `euler`,
            but spaced so that the last step ends where the next level would be, and rounded
            to training timesteps.
        solver_order: 2 corrects a step by the previous one; 1 is DDIM at other timesteps.
        lower_order_final: order 1 for the last step if there are fewer than 15.
        euler_at_final: order 1 for the last step of any number. A last step to zero always
            has order 1.

    Source: DPM-Solver++, arXiv 2211.01095, algorithm 2; diffusers'
        DPMSolverMultistepScheduler.
    """
    if solver_order not in (1, 2):
        raise UserError(f"solver_order must be 1 or 2, got {solver_order}")
    table = sigma_table(schedule)
    timesteps = spaced_timesteps(
        len(table),
        num_steps,
        timestep_spacing=timestep_spacing,
        steps_offset=steps_offset,
        ends=1,
    ).round()
    sigmas = np.interp(timesteps, np.arange(len(table)), table)
    if use_karras_sigmas:  # between the table's ends; Euler's are between the visited ones
        sigmas = karras_sigmas(table[-1], table[0], num_steps)
        timesteps = _timesteps_of(sigmas, table).round()
    sigmas = _with_final(sigmas, table, final_sigmas_type)
    last = len(timesteps) - 1
    first_order = np.full(len(timesteps), solver_order == 1)
    first_order[last] |= (
        euler_at_final or final_sigmas_type == "zero" or (lower_order_final and last < 14)
    )
    correction = np.where(first_order, 0.0, _half_step_ratio(sigmas))
    rows = _table_of(timesteps.astype(np.int32), sigmas, correction)
    return walk(predict, latents, rows, schedule.prediction_type)


DPMPP_2M = Solver(
    dpmpp_2m,
    "DPMSolverMultistepScheduler",
    only=lambda config: {
        **_SIGMAS,
        "thresholding": OFF,
        "solver_order": (2, 1),
        "algorithm_type": ("dpmsolver++", "deis"),  # diffusers also treats DEIS as its own
        "solver_type": ("midpoint", "logrho", "bh1", "bh2"),  # likewise
        "lambda_min_clipped": (float("-inf"), None),
        "use_lu_lambdas": OFF,
        "use_flow_sigmas": OFF,
    },
)

SAMPLERS = {solver.name: solver for solver in (DDIM, EULER, DPMPP_2M, FLOW_EULER)}


def solver_of(scheduler: str, noise: str) -> tuple[Solver, bool]:
    """Returns (sampler of a scheduler class, true if it is the class's own, not a stand-in)."""
    for solver in SAMPLERS.values():
        if scheduler == solver.scheduler:
            return solver, True
    alike = [solver for solver in SAMPLERS.values() if solver.noise == noise]
    named = [solver for solver in alike if scheduler in solver.stands_in]
    return (named or alike)[0], False


def spaced_timesteps(
    num_train_timesteps: int,
    num_steps: int,
    *,
    timestep_spacing: str,
    steps_offset: int,
    ends: int = 0,
) -> Float[np.ndarray, " S"]:
    """Returns the visited timesteps, decreasing, float64; integers except for linspace.

    Args:
        timestep_spacing: leading (multiples of T // num_steps, plus steps_offset, so T - 1
            itself is not visited), trailing (from T - 1 down, for zero terminal SNR)
            or linspace (both ends).
        steps_offset: used by leading only, as in diffusers.
        ends: 1 spaces for one more step and drops the lowest (DPM-Solver++'s leading and
            linspace).

    Raises:
        ValueError: if the spacing is unknown or a timestep would lie outside the table.

    Source: `set_timesteps` of diffusers' schedulers; arXiv 2305.08891, table 2.
    """
    most = num_train_timesteps - ends
    if not 1 <= num_steps <= most:
        raise UserError(f"num_steps must be in 1..{most}, the training timesteps, got {num_steps}")
    points = num_steps + ends
    if timestep_spacing == "leading":
        ratio = num_train_timesteps // points
        timesteps = (np.arange(points)[::-1] * ratio + steps_offset).astype(np.float64)
    elif timestep_spacing == "trailing":
        ratio = num_train_timesteps / num_steps
        timesteps = np.round(np.arange(num_train_timesteps, 0, -ratio)) - 1
    elif timestep_spacing == "linspace":
        timesteps = np.linspace(0, num_train_timesteps - 1, points)[::-1]
    else:
        raise UserError(f"timestep_spacing must be one of {SPACINGS}, got {timestep_spacing!r}")
    timesteps = timesteps[:num_steps]
    if timesteps[0] >= num_train_timesteps or timesteps[-1] < 0:
        raise UserError(
            f"timesteps must be in 0..{num_train_timesteps - 1}, got {timesteps[0]:.0f} to "
            f"{timesteps[-1]:.0f}; lower num_steps={num_steps} or steps_offset={steps_offset}"
        )
    return timesteps


def sigma_table(schedule: NoiseTable) -> Float32[np.ndarray, " T"]:
    """Returns noise / signal at each training timestep, increasing; finite at zero terminal SNR."""
    signal = schedule.signal_squared.copy()
    if signal[-1] == 0:
        signal[-1] = SMALLEST_SIGNAL
    return np.sqrt((np.float32(1) - signal) / signal)


def karras_sigmas(
    largest: float | np.floating, smallest: float | np.floating, num_steps: int
) -> Float[np.ndarray, " S"]:
    """Returns EDM's levels, decreasing, even in sigma^(1/7). arXiv 2206.00364, equation 5."""
    high, low = float(largest) ** (1 / 7), float(smallest) ** (1 / 7)
    return (high + np.linspace(0, 1, num_steps) * (low - high)) ** 7


def _timesteps_of(
    sigmas: Float[np.ndarray, " S"], table: Float32[np.ndarray, " T"]
) -> Float[np.ndarray, " S"]:
    return np.interp(np.log(sigmas), np.log(table), np.arange(len(table)))


def _with_final(
    sigmas: Float[np.ndarray, " S"], table: Float32[np.ndarray, " T"], kind: str
) -> Float32[np.ndarray, " S1"]:
    if kind not in FINAL_SIGMAS:
        raise UserError(f"final_sigmas_type must be one of {FINAL_SIGMAS}, got {kind!r}")
    return np.append(sigmas, 0 if kind == "zero" else table[0]).astype(np.float32)


def _half_step_ratio(sigmas: Float32[np.ndarray, " S1"]) -> Float[np.ndarray, " S"]:
    """Returns h / (2 h of the previous step), h a step's length in log(1 / sigma).

    The first is 0, so that the first step has order 1.
    """
    with np.errstate(divide="ignore"):
        lengths = np.diff(-np.log(sigmas.astype(np.float64)))
    return np.append(0.0, lengths[1:] / (2 * lengths[:-1]))


def _table_of(
    timesteps: Shaped[np.ndarray, " S"],
    sigmas: Float32[np.ndarray, " S1"],
    correction: Float[np.ndarray, " S"],
) -> Table:
    """Makes the table of a walk from sigma to sigma; correction in units of the weight of x0."""
    wide = sigmas.astype(np.float64)
    signal = 1 / np.hypot(wide, 1)
    noise = wide * signal
    # The weight of x0 in x' = (noise' / noise) x + (...) x0, the paper's form.
    weight = signal[1:] - noise[1:] / noise[:-1] * signal[:-1]
    columns = signal[:-1], noise[:-1], signal[1:], noise[1:], correction * weight
    return Table(timesteps, *(column.astype(np.float32) for column in columns))
