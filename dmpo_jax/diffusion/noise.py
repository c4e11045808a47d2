"""Noise-schedule tables, noise shared by a pair, prediction targets.

With a = alphas_cumprod[t]: noised = sqrt(a) x0 + sqrt(1 - a) epsilon. What a model
predicts is epsilon, x0 ("sample") or v = sqrt(a) epsilon - sqrt(1 - a) x0.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Key

from dmpo_jax.types import Noised

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
WEIGHTINGS = ("uniform", "min_snr")

RandomKey = Key[Array, ""]
Rows = Float[Array, "B ..."]
Table = Float32[np.ndarray, " T"]
Images = Float[Array, "B n H W C"]
Moments = Float[Array, "*batch M"]
Latents = Float[Array, "*batch C"]


@dataclasses.dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The signal left at each training timestep, and what the model predicts.

    Compared and hashed by identity: a constant to close over, or a static argument.
    `alphas_cumprod` falls from near 1 to near 0, or to exactly 0 with zero terminal SNR.
    """

    alphas_cumprod: Table
    prediction_type: str

    def __post_init__(self):
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type must be one of {PREDICTION_TYPES}, got {self.prediction_type!r}"
            )

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @functools.cached_property
    def signal(self) -> Table:
        """sqrt(alphas_cumprod), the factor of the image."""
        return np.sqrt(self.alphas_cumprod)

    @functools.cached_property
    def noise(self) -> Table:
        """sqrt(1 - alphas_cumprod), the factor of the noise."""
        return np.sqrt(np.float32(1) - self.alphas_cumprod)


def make_noise_schedule(
    *,
    num_train_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    beta_schedule: str = "linear",
    prediction_type: str = "epsilon",
    rescale_betas_zero_snr: bool = False,
    trained_betas: Sequence[float] | np.ndarray | None = None,
) -> NoiseSchedule:
    """The table that diffusers' DDPMScheduler builds from the same settings.

    Args:
        beta_schedule: linear, scaled_linear (linear in sqrt(beta), Stable Diffusion's) or
            squaredcos_cap_v2 (which has no beta_start or beta_end).
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
            raise ValueError(
                f"trained_betas shape should be {(num_train_timesteps,)}, but got {betas.shape}; "
                "set num_train_timesteps to their number"
            )
    else:
        betas = _betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
    # The last beta may be 1 (zero SNR); a beta of 0 first would divide by no noise.
    if not (betas[0] > 0 and betas.min() >= 0 and betas.max() <= 1):
        raise ValueError(
            f"betas must be in (0, 1], got {betas.min()} to {betas.max()}; change "
            "beta_start, beta_end or trained_betas"
        )
    alphas_cumprod = _cumprod(np.float32(1) - betas)
    if rescale_betas_zero_snr:
        alphas_cumprod = _zero_terminal_snr(alphas_cumprod)
    return NoiseSchedule(alphas_cumprod, prediction_type)


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
    raise ValueError(f"beta_schedule must be one of {BETA_SCHEDULES}, got {name!r}")


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
    # Through betas and back, in float32, although alphas_cumprod could be had at once: the
    # last entries are differences of near-equals, and only the same rounding agrees.
    signal = np.sqrt(alphas_cumprod)
    first, last = signal[0], signal[-1]
    alphas_cumprod = ((signal - last) * (first / (first - last))) ** 2
    alphas = np.concatenate([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    betas = np.float32(1) - alphas
    return _cumprod(np.float32(1) - betas)


def _at(table: Table, timesteps: Int[Array, " B"], rank: int) -> Rows:
    """`table[timesteps]`, with axes of 1 up to `rank`: ranks never promote by themselves."""
    return jnp.asarray(table)[timesteps].reshape(-1, *(1,) * (rank - 1))


@dataclasses.dataclass(frozen=True, eq=False)
class Timesteps:
    """Which timesteps are drawn, evenly from first to last - 1, and what each one weighs.

    weights: of a pair's loss, by training timestep; None is 1 everywhere.
    """

    first: int
    last: int
    weights: Table | None = None


def make_timesteps(
    schedule: NoiseSchedule,
    *,
    weighting: str = "uniform",
    gamma: float | int = 5.0,
    low: float | int = 0.0,
    high: float | int = 1.0,
) -> Timesteps:
    """Timesteps to train on.

    Args:
        weighting: uniform, or min_snr, which takes weight from the timesteps with little
            noise: with s the signal-to-noise ratio, min(s, gamma) of the loss in x0, that is
            min(s, gamma) / s where epsilon is predicted and min(s, gamma) / (s + 1) for v.
        gamma: of min_snr, above 0; 5 in its paper.
        low, high: ends of the range, as fractions of the training timesteps: 0 is no noise.

    Raises:
        ValueError: naming the values supported.

    Source: Efficient Diffusion Training via Min-SNR Weighting Strategy, arXiv 2303.09556.
    """
    steps = schedule.num_train_timesteps
    first, last = (round(x * steps) for x in (low, high))
    if not 0 <= low < high <= 1 or first == last:
        raise ValueError(
            f"timesteps must be a range in [0, 1] with at least one of {steps} timesteps in it, "
            f"but got low={low}, high={high}"
        )
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {WEIGHTINGS}, got {weighting!r}")
    if weighting == "uniform":
        return Timesteps(first, last)
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be above 0 and finite, got {gamma}; 5 is usual")
    # By the shares of signal and noise, of which either may be 0 at an end of the table.
    signal = schedule.alphas_cumprod.astype(np.float64)
    noise = 1 - signal
    with np.errstate(divide="ignore"):
        weights = {
            "epsilon": np.minimum(1, gamma * noise / signal),
            "sample": np.minimum(signal / noise, gamma),
            "v_prediction": np.minimum(signal, gamma * noise),  # min(s, gamma) / (s + 1)
        }[schedule.prediction_type]
    return Timesteps(first, last, weights.astype(np.float32))


def sample_latents(
    key: RandomKey,
    moments: Moments,
    *,
    scaling_factor: float,
    shift_factor: float = 0.0,
    mean_only: bool = False,
) -> Latents:
    """Draws latents from the VAE's posterior and scales them as the UNet expects.

    Args:
        moments: unscaled mean, then log-variance, on the last axis (M = 2C); with
            mean_only the mean alone (M = C), which is then what is drawn.
        scaling_factor: of the VAE's config: 0.18215 for SD1.5, 0.13025 for SDXL.
        shift_factor: likewise; 0 for both.

    Returns:
        `(mean + std * noise - shift_factor) * scaling_factor`, float32.
    """
    if mean_only:
        return (moments.astype(jnp.float32) - shift_factor) * scaling_factor
    if moments.shape[-1] % 2:
        raise ValueError(
            f"moments shape should be [..., 2C], mean then log-variance, but got {moments.shape}"
        )
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    # The VAE's own bounds: beyond them exp is noise of the encoder's, not of the posterior.
    std = jnp.exp(0.5 * jnp.clip(logvar, -30.0, 20.0))
    latents = mean + std * jax.random.normal(key, mean.shape, jnp.float32)
    return (latents - shift_factor) * scaling_factor


def add_noise(
    latents: Rows,
    noise: Rows,
    timesteps: Int[Array, " B"],
    schedule: NoiseSchedule,
) -> Rows:
    """`sqrt(a) latents + sqrt(1 - a) noise`; the two may differ in axes of 1."""
    signal = _at(schedule.signal, timesteps, latents.ndim)
    return signal * latents + _at(schedule.noise, timesteps, latents.ndim) * noise


def prediction_target(
    latents: Rows,
    noise: Rows,
    timesteps: Int[Array, " B"],
    schedule: NoiseSchedule,
) -> Rows:
    """What a perfect model predicts, in the latents' shape: epsilon, v or x0."""
    if schedule.prediction_type == "epsilon":
        return jnp.broadcast_to(noise, latents.shape)
    if schedule.prediction_type == "sample":
        return latents
    signal = _at(schedule.signal, timesteps, latents.ndim)
    return signal * noise - _at(schedule.noise, timesteps, latents.ndim) * latents


def to_sample_and_epsilon(
    prediction: Rows,
    latents: Rows,
    timesteps: Int[Array, " B"],
    schedule: NoiseSchedule,
) -> tuple[Rows, Rows]:
    """(x0, epsilon) that a prediction on noised `latents` stands for, in float32.

    The inverse of `add_noise` and `prediction_target` together. Not finite where an
    epsilon prediction meets pure noise (the last timestep under zero terminal SNR).
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
    """`to_sample_and_epsilon` at any noise level: `latents = signal x0 + noise epsilon`."""
    prediction, latents = prediction.astype(jnp.float32), latents.astype(jnp.float32)
    if prediction_type == "epsilon":
        return (latents - noise * prediction) / signal, prediction
    if prediction_type == "sample":
        return prediction, (latents - signal * prediction) / noise
    return signal * latents - noise * prediction, signal * prediction + noise * latents


def noise_pair(
    key: RandomKey, latents: Images, schedule: NoiseSchedule, among: Timesteps | None = None
) -> Noised:
    """Noises the images of a pair alike: one timestep and one noise for both.

    The comparison between them is then of the images alone. Draws cover the batch as
    given: pass the global one, so that neither hosts nor sharding change what is drawn.

    Args:
        latents: scaled clean latents; n is 2, or 1 without rejected images.
        among: the timesteps to draw, and what each weighs; None is all alike.

    Returns:
        Noised latents and target, float32 `[B, n, H, W, C]`, and timesteps `[B]`, int32.
    """
    latents = latents.astype(jnp.float32)
    timestep_key, noise_key = jax.random.split(key)
    batch, _, *image = latents.shape
    among = among or Timesteps(0, schedule.num_train_timesteps)
    timesteps = jax.random.randint(timestep_key, (batch,), among.first, among.last)
    noise = jax.random.normal(noise_key, (batch, 1, *image), jnp.float32)
    return Noised(
        latents=add_noise(latents, noise, timesteps, schedule),
        timesteps=timesteps,
        target=prediction_target(latents, noise, timesteps, schedule),
        weights=None if among.weights is None else jnp.asarray(among.weights)[timesteps],
    )
