"""Noise tables (DDPM and rectified flow), noised latents, prediction targets.

With x = signal x0 + noise epsilon, a model predicts one of

    epsilon
    sample          x0
    v_prediction    signal epsilon - noise x0, where signal^2 + noise^2 = 1 (DDPM)
    flow            epsilon - x0, where signal + noise = 1 (rectified flow)
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Key, Shaped

from dmpo_jax.errors import UserError

DDPM_PREDICTIONS = ("epsilon", "v_prediction", "sample")
PREDICTION_TYPES = (*DDPM_PREDICTIONS, "flow")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

RandomKey = Key[Array, ""]
Rows = Float[Array, "B ..."]
Table = Float32[np.ndarray, " T"]
Moments = Float[Array, "*batch M"]
Latents = Float[Array, "..."]  # [..., H, W, C]; packing changes all three axes
Factor = float | int | Sequence[float]  # one for all channels, or one per channel


@dataclasses.dataclass(frozen=True, eq=False)
class NoiseTable:
    """Signal and noise at each training timestep, from the least noise to the most.

    Compared and hashed by identity: a constant to close over, or a static argument.

    signal, noise: factors of x0 and of epsilon.
    times: the model's time input at each timestep.
    prediction_type: the model's output, one of PREDICTION_TYPES.
    alphas_cumprod: DDPM's own table, the square of signal; None for flow. It falls from near
        1 to near 0, or to exactly 0 with zero terminal SNR.
    """

    signal: Table
    noise: Table
    times: Shaped[np.ndarray, " T"]
    prediction_type: str
    alphas_cumprod: Table | None = None

    def __post_init__(self):
        if self.prediction_type not in PREDICTION_TYPES:
            raise UserError(
                f"prediction_type must be one of {PREDICTION_TYPES}, got {self.prediction_type!r}"
            )

    @property
    def num_train_timesteps(self) -> int:
        return len(self.signal)

    @property
    def signal_squared(self) -> Table:
        """alphas_cumprod, as DDPM's samplers use it.

        Raises:
            UserError: the noise is not DDPM's.
        """
        if self.alphas_cumprod is None:
            raise UserError(
                f"this needs DDPM's noise, but the model's noise is {self.kind}: use flow_euler"
            )
        return self.alphas_cumprod

    @property
    def kind(self) -> str:
        """ "ddpm" or "flow", as `Family.noise`."""
        return "flow" if self.prediction_type == "flow" else "ddpm"


def make_flow_table(shift: float | int = 1.0, num_train_timesteps: int = 1000) -> NoiseTable:
    """Makes rectified flow's table: sigma = noise = 1 - signal, even in (0, 1], then shifted.

    This is the table of diffusers' FlowMatchEulerDiscreteScheduler in ascending order. Models
    receive num_train_timesteps * sigma.

    Args:
        shift: above 0; larger values move the levels towards noise. 1 for schedulers that
            shift dynamically, which train on the unshifted table.

    Source: Scaling Rectified Flow Transformers, arXiv 2403.03206, equation 23.
    """
    if not 0 < shift < math.inf:
        raise UserError(f"shift must be above 0 and finite, got {shift}; 1 shifts nothing")
    if num_train_timesteps < 1:
        raise UserError(f"num_train_timesteps must be at least 1, got {num_train_timesteps}")
    even = np.arange(1, num_train_timesteps + 1, dtype=np.float64) / num_train_timesteps
    sigma = shifted(even, shift)
    return NoiseTable(
        signal=(1 - sigma).astype(np.float32),
        noise=sigma.astype(np.float32),
        times=(num_train_timesteps * sigma).astype(np.float32),
        prediction_type="flow",
    )


def shifted(sigma: Float[np.ndarray, " S"], shift: float | int) -> Float[np.ndarray, " S"]:
    """Shifts flow levels towards noise: `shift sigma / (1 + (shift - 1) sigma)`."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def make_ddpm_table(
    *,
    num_train_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    beta_schedule: str = "linear",
    prediction_type: str = "epsilon",
    rescale_betas_zero_snr: bool = False,
    trained_betas: Sequence[float] | np.ndarray | None = None,
) -> NoiseTable:
    """Makes the table that diffusers' DDPMScheduler builds from the same settings.

    Args:
        beta_schedule: linear, scaled_linear (linear in sqrt(beta), Stable Diffusion's) or
            squaredcos_cap_v2 (which ignores beta_start and beta_end).
        rescale_betas_zero_snr: shift the table so that the last timestep is pure noise
            (arXiv 2305.08891, algorithm 1). The last entry is then exactly 0, as in
            diffusers' DDPM and DDIM; its Euler family writes 2**-24 there instead. An
            epsilon prediction cannot be turned into a sample at that timestep.
        trained_betas: the betas themselves, num_train_timesteps of them.

    Raises:
        ValueError: naming the values supported.

    Source: huggingface/diffusers, schedulers/scheduling_ddpm.py.
    """
    if trained_betas is not None:
        betas = np.asarray(trained_betas, np.float32)
        if betas.shape != (num_train_timesteps,):
            raise UserError(
                f"trained_betas shape should be {(num_train_timesteps,)}, but got {betas.shape}; "
                "set num_train_timesteps to their number"
            )
    else:
        betas = _betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
    # The last beta may be 1 (zero SNR). A first beta of 0 would divide by zero noise.
    if not (betas[0] > 0 and betas.min() >= 0 and betas.max() <= 1):
        raise UserError(
            f"betas must be in (0, 1], got {betas.min()} to {betas.max()}; change "
            "beta_start, beta_end or trained_betas"
        )
    alphas_cumprod = _cumprod(np.float32(1) - betas)
    if rescale_betas_zero_snr:
        alphas_cumprod = _zero_terminal_snr(alphas_cumprod)
    if prediction_type not in DDPM_PREDICTIONS:
        raise UserError(
            f"prediction_type must be one of {DDPM_PREDICTIONS}, got {prediction_type!r}"
        )
    return NoiseTable(
        signal=np.sqrt(alphas_cumprod),
        noise=np.sqrt(np.float32(1) - alphas_cumprod),
        times=np.arange(num_train_timesteps, dtype=np.int32),
        prediction_type=prediction_type,
        alphas_cumprod=alphas_cumprod,
    )


# Functions that make a table from a scheduler's settings, by `Family.noise`.
TABLES = {"ddpm": make_ddpm_table, "flow": make_flow_table}


def _betas(name: str, steps: int, start: float, end: float) -> Table:
    if name == "linear":
        return _linspace(start, end, steps)
    if name == "scaled_linear":
        return _linspace(start**0.5, end**0.5, steps) ** 2
    if name == "squaredcos_cap_v2":
        alpha_bar = [
            math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)
        ]
        betas = [min(1 - b / a, 0.999) for a, b in itertools.pairwise(alpha_bar)]
        return np.asarray(betas, np.float32)
    raise UserError(f"beta_schedule must be one of {BETA_SCHEDULES}, got {name!r}")


def _linspace(start: float, end: float, steps: int) -> Table:
    # PyTorch's rounding: a float32 step, counted from the nearer end, rounded once. NumPy's
    # differs in the last bit, which the rescaling to zero SNR magnifies tenfold and more.
    if steps < 2:
        return np.full(steps, start, np.float32)
    low, high = np.float32(start), np.float32(end)
    step = np.float64((high - low) / np.float32(steps - 1))
    i = np.arange(steps)
    points = np.where(i < steps // 2, low + step * i, high - step * (steps - 1 - i))
    return points.astype(np.float32)


def _cumprod(alphas: Table) -> Table:
    # PyTorch accumulates a float32 product in float64 on CPU, where published tables are made.
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _zero_terminal_snr(alphas_cumprod: Table) -> Table:
    # Through betas and back, in float32, although alphas_cumprod has a direct formula: the
    # last entries are differences of near-equals, and agree only under the same rounding.
    signal = np.sqrt(alphas_cumprod)
    first, last = signal[0], signal[-1]
    alphas_cumprod = ((signal - last) * (first / (first - last))) ** 2
    alphas = np.concatenate([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    betas = np.float32(1) - alphas
    return _cumprod(np.float32(1) - betas)


def _at(table: Table, timesteps: Int[Array, " B"], rank: int) -> Rows:
    """Returns `table[timesteps]` with axes of 1 up to `rank`, since ranks never promote."""
    return jnp.asarray(table)[timesteps].reshape(-1, *(1,) * (rank - 1))


def pack_latents(latents: Float[Array, "*batch H W C"], pack: int) -> Float[Array, "*batch h w D"]:
    """Packs blocks of pack x pack latents into channels: `c pack^2 + row pack + column`.

    Raises:
        ValueError: height or width is not a multiple of `pack`.
    """
    if pack == 1:
        return latents
    *batch, height, width, channels = latents.shape
    if height % pack or width % pack:
        raise UserError(
            f"latents packed {pack} x {pack} need a height and width in multiples of {pack}, but "
            f"got {height} x {width}: change the resolution"
        )
    blocks = latents.reshape(*batch, height // pack, pack, width // pack, pack, channels)
    n = len(batch)
    order = (*range(n), n, n + 2, n + 4, n + 1, n + 3)
    return blocks.transpose(order).reshape(*batch, height // pack, width // pack, -1)


def unpack_latents(
    latents: Float[Array, "*batch h w D"], pack: int
) -> Float[Array, "*batch H W C"]:
    """The inverse of `pack_latents`."""
    if pack == 1:
        return latents
    *batch, height, width, channels = latents.shape
    blocks = latents.reshape(*batch, height, width, channels // pack**2, pack, pack)
    n = len(batch)
    order = (*range(n), n, n + 3, n + 1, n + 4, n + 2)
    return blocks.transpose(order).reshape(*batch, height * pack, width * pack, -1)


def sample_latents(
    key: RandomKey,
    moments: Moments,
    *,
    scaling_factor: Factor,
    shift_factor: Factor = 0.0,
    mean_only: bool = False,
    pack: int = 1,
) -> Latents:
    """Samples the VAE's posterior, then packs and scales the latents as the model expects.

    Args:
        moments: unscaled mean, then log-variance, on the last axis (M = 2C). With mean_only
            the mean alone (M = C), which is used without sampling.
        scaling_factor: of the VAE: 0.18215 for SD1.5, 0.13025 for SDXL; or one per packed
            channel.
        shift_factor: likewise; 0 for both.
        pack: latents are packed `pack` x `pack`; 1 leaves them unpacked.

    Returns:
        `(packed(mean + std * noise) - shift_factor) * scaling_factor`, float32.
    """
    if mean_only:
        latents = moments.astype(jnp.float32)
    else:
        if moments.shape[-1] % 2:
            raise UserError(
                f"moments shape should be [..., 2C], mean then log-variance, but got "
                f"{moments.shape}"
            )
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        # The VAE's own bounds: beyond them the log-variance is the encoder's noise.
        std = jnp.exp(0.5 * jnp.clip(logvar, -30.0, 20.0))
        latents = mean + std * jax.random.normal(key, mean.shape, jnp.float32)
    if pack > 1:
        latents = pack_latents(latents, pack)
    shift, scale = (_by_channel(x, latents) for x in (shift_factor, scaling_factor))
    return (latents - shift) * scale


def restore_latents(
    latents: Latents, *, scaling_factor: Factor, shift_factor: Factor = 0.0, pack: int = 1
) -> Latents:
    """Converts scaled latents to the VAE decoder's input: the inverse of `sample_latents`."""
    shift, scale = (_by_channel(x, latents) for x in (shift_factor, scaling_factor))
    latents = latents / scale + shift
    return unpack_latents(latents, pack) if pack > 1 else latents


def _by_channel(factor: Factor, latents: Latents) -> float | int | Array:
    """Returns a number as is, a vector with leading axes of 1, since ranks never promote."""
    if isinstance(factor, float | int):
        return factor
    if len(factor) != latents.shape[-1]:
        raise UserError(
            f"scaling and shift factors must be numbers or vectors of {latents.shape[-1]} "
            f"channels, but got {len(factor)}: encode the pairs with this model's VAE"
        )
    return jnp.asarray(factor, jnp.float32).reshape((1,) * (latents.ndim - 1) + (-1,))


def add_noise(
    latents: Rows,
    noise: Rows,
    timesteps: Int[Array, " B"],
    schedule: NoiseTable,
) -> Rows:
    """Computes `signal latents + noise epsilon`; the two may differ in axes of 1."""
    signal = _at(schedule.signal, timesteps, latents.ndim)
    return signal * latents + _at(schedule.noise, timesteps, latents.ndim) * noise


def prediction_target(
    latents: Rows,
    noise: Rows,
    timesteps: Int[Array, " B"],
    schedule: NoiseTable,
) -> Rows:
    """Returns the model's target, in the latents' shape: epsilon, v, x0 or velocity."""
    if schedule.prediction_type == "epsilon":
        return jnp.broadcast_to(noise, latents.shape)
    if schedule.prediction_type == "sample":
        return latents
    if schedule.prediction_type == "flow":
        return noise - latents
    signal = _at(schedule.signal, timesteps, latents.ndim)
    return signal * noise - _at(schedule.noise, timesteps, latents.ndim) * latents


def to_sample_and_epsilon(
    prediction: Rows,
    latents: Rows,
    timesteps: Int[Array, " B"],
    schedule: NoiseTable,
) -> tuple[Rows, Rows]:
    """Converts a prediction on noised `latents` to (x0, epsilon), in float32.

    The inverse of `add_noise` and `prediction_target` together. Not finite for an epsilon
    prediction at pure noise (the last timestep under zero terminal SNR).
    """
    signal = _at(schedule.signal, timesteps, latents.ndim)
    noise = _at(schedule.noise, timesteps, latents.ndim)
    return split_prediction(prediction, latents, signal, noise, schedule.prediction_type)


def split_prediction(
    prediction: Rows,
    latents: Rows,
    signal: Float[Array, "..."],
    noise: Float[Array, "..."],
    prediction_type: str,
) -> tuple[Rows, Rows]:
    """Computes `to_sample_and_epsilon` at any level: `latents = signal x0 + noise epsilon`."""
    prediction, latents = prediction.astype(jnp.float32), latents.astype(jnp.float32)
    if prediction_type == "epsilon":
        return (latents - noise * prediction) / signal, prediction
    if prediction_type == "sample":
        return prediction, (latents - signal * prediction) / noise
    if prediction_type == "flow":
        return latents - noise * prediction, latents + signal * prediction
    return signal * latents - noise * prediction, signal * prediction + noise * latents
