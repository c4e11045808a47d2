"""Training timesteps, their densities and weights, and pairs noised at them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from dmpo_jax.diffusion.noise import NoiseTable, Table, add_noise, prediction_target, shifted
from dmpo_jax.errors import UserError
from dmpo_jax.types import Noised

DENSITIES = ("uniform", "logit_normal")
WEIGHTINGS = ("uniform", "min_snr", "x0", "sigma_sqrt", "cosmap")
FLOW_WEIGHTINGS = ("sigma_sqrt", "cosmap")

Images = Float[Array, "B n H W C"]


@dataclasses.dataclass(frozen=True, eq=False)
class Timesteps:
    """Distribution of training timesteps, from first to last - 1, and the weight of each.

    weights: of a pair's loss, by training timestep; None is 1 everywhere.
    density: one of DENSITIES. mean, std: of the logit, for logit_normal.
    steps: in total; logit_normal is a density over all of them, truncated to the range.
    moved: the training timestep that each draw maps to; None is itself.
    """

    first: int
    last: int
    weights: Table | None = None
    density: str = "uniform"
    mean: float | int = 0.0
    std: float | int = 1.0
    steps: int = 0
    moved: Int[np.ndarray, " T"] | None = None


def make_timesteps(
    schedule: NoiseTable,
    *,
    weighting: str = "uniform",
    gamma: float | int = 5.0,
    low: float | int = 0.0,
    high: float | int = 1.0,
    density: str = "uniform",
    mean: float | int = 0.0,
    std: float | int = 1.0,
    shift: float | int | None = None,
) -> Timesteps:
    """Makes the distribution and the weights of training timesteps.

    Args:
        weighting: uniform; min_snr, which downweights timesteps with little noise: with s the
            signal-to-noise ratio, min(s, gamma) of the loss in x0, that is
            min(s, gamma) / s where epsilon is predicted, min(s, gamma) / (s + 1) for v and
            min(signal^2, gamma noise^2) for flow; x0, the size of an error in x0 for one in what
            is predicted: noise / signal for epsilon, noise for v and flow; for flow also
            sigma_sqrt, 1 / sigma^2, and cosmap, 2 / (pi (1 - 2 sigma + 2 sigma^2)).
        gamma: of min_snr, above 0; 5 in its paper.
        low, high: ends of the range, as fractions of the training timesteps: 0 is no noise.
        density: uniform, or logit_normal: `u = sigmoid(mean + std z)` with z standard normal,
            and the timestep that lies u from the top, so that a higher mean is less noise.
        shift: of flow noise: draws as if the table had this shift (static, or e^mu of a
            dynamic one); None leaves the table as it is.

    Raises:
        ValueError: naming the values supported.

    Source: Efficient Diffusion Training via Min-SNR Weighting Strategy, arXiv 2303.09556;
        Scaling Rectified Flow Transformers, arXiv 2403.03206; the densities and weights as
        huggingface/diffusers, training_utils.compute_density_for_timestep_sampling.
    """
    steps = schedule.num_train_timesteps
    first, last = (round(x * steps) for x in (low, high))
    if not 0 <= low < high <= 1 or first == last:
        raise UserError(
            f"timesteps must be a range in [0, 1] with at least one of {steps} timesteps in it, "
            f"but got low={low}, high={high}"
        )
    if density not in DENSITIES:
        raise UserError(f"density must be one of {DENSITIES}, got {density!r}")
    if not (0 < std < math.inf and math.isfinite(mean)):
        raise UserError(f"std must be above 0 and mean finite, got mean={mean}, std={std}")
    weights = _weights(schedule, weighting, gamma)
    moved = None
    if shift is not None:
        moved = _moved(schedule, shift)
        inside = np.flatnonzero((moved >= first) & (moved < last))
        if not len(inside):
            raise UserError(
                f"no timestep of shift={shift} lies between low={low} and high={high}: widen them"
            )
        first, last = int(inside[0]), int(inside[-1]) + 1
    drawn = np.arange(first, last) if moved is None else moved[first:last]
    if weights is not None and not weights[drawn].any():
        raise UserError(
            f"weighting {weighting!r} is 0 at every timestep from low={low} to high={high}, so "
            "nothing would be trained: lower timesteps.low, or use timesteps.weighting=uniform"
        )
    return Timesteps(first, last, weights, density, mean, std, steps, moved)


def _weights(schedule: NoiseTable, weighting: str, gamma: float | int) -> Table | None:
    if weighting not in WEIGHTINGS:
        raise UserError(f"weighting must be one of {WEIGHTINGS}, got {weighting!r}")
    if weighting == "uniform":
        return None
    if weighting in FLOW_WEIGHTINGS:
        if schedule.kind != "flow":
            raise UserError(
                f"weighting {weighting!r} is of flow noise, but this model's noise is DDPM's: use "
                "uniform or min_snr"
            )
        sigma = schedule.noise.astype(np.float64)
        cosmap = 2 / (np.pi * (1 - 2 * sigma + 2 * sigma**2))
        return (cosmap if weighting == "cosmap" else sigma**-2).astype(np.float32)
    if weighting == "x0":
        return _in_x0(schedule)
    if not 0 < gamma < math.inf:
        raise UserError(f"gamma must be above 0 and finite, got {gamma}; 5 is usual")
    # From the shares of signal and noise: either may be 0 at an end of the table.
    if schedule.kind == "flow":
        signal, noise = (x.astype(np.float64) ** 2 for x in (schedule.signal, schedule.noise))
    else:
        signal = schedule.signal_squared.astype(np.float64)
        noise = 1 - signal
    with np.errstate(divide="ignore"):
        weights = {
            "epsilon": np.minimum(1, gamma * noise / signal),
            "sample": np.minimum(signal / noise, gamma),
            "v_prediction": np.minimum(signal, gamma * noise),  # min(s, gamma) / (s + 1)
            "flow": np.minimum(signal, gamma * noise),
        }[schedule.prediction_type]
    return weights.astype(np.float32)


def _in_x0(schedule: NoiseTable) -> Table:
    signal, noise = (x.astype(np.float64) for x in (schedule.signal, schedule.noise))
    if schedule.prediction_type == "sample":
        return np.ones(len(noise), np.float32)
    if schedule.prediction_type != "epsilon":
        return noise.astype(np.float32)
    if not signal.all():
        raise UserError(
            "weighting 'x0' has no value where this model's noise table has no signal left: use "
            "uniform or min_snr"
        )
    return (noise / signal).astype(np.float32)


def _moved(schedule: NoiseTable, shift: float | int) -> Int[np.ndarray, " T"]:
    """Maps timestep k of a table with this shift to the nearest timestep of `schedule`."""
    if schedule.kind != "flow":
        raise UserError(
            f"shift={shift} is of flow noise, but this model's noise is DDPM's: leave it unset"
        )
    if not 0 < shift < math.inf:
        raise UserError(f"shift must be above 0 and finite, got {shift}; 1 shifts nothing")
    steps = schedule.num_train_timesteps
    wanted = shifted(np.arange(1, steps + 1) / steps, shift)
    table = schedule.noise.astype(np.float64)
    above = np.searchsorted(table, wanted).clip(1, steps - 1)
    return above - (wanted - table[above - 1] < table[above] - wanted)


def draw_timesteps(key: Key[Array, ""], count: int, among: Timesteps) -> Int[Array, " B"]:
    """Draws independent training timesteps, int32."""
    if among.density == "uniform":
        drawn = jax.random.randint(key, (count,), among.first, among.last)
    else:
        # The range in z: timestep k covers u from 1 - (k + 1) / steps to 1 - k / steps.
        ends = (_logit(1 - among.last / among.steps), _logit(1 - among.first / among.steps))
        low, high = ((x - among.mean) / among.std for x in ends)
        z = jax.random.truncated_normal(key, low, high, (count,), jnp.float32)
        drawn = logit_normal_timesteps(z, mean=among.mean, std=among.std, steps=among.steps)
        drawn = drawn.clip(among.first, among.last - 1)  # rounding at the ends
    return drawn if among.moved is None else jnp.asarray(among.moved, jnp.int32)[drawn]


def logit_normal_timesteps(
    z: Float[Array, " B"], *, mean: float | int, std: float | int, steps: int
) -> Int[Array, " B"]:
    """Maps standard normal draws to `steps - 1 - floor(steps sigmoid(mean + std z))`, int32.

    Published scripts index a table from the most noise to the least; ours has the least first.
    """
    u = jax.nn.sigmoid(mean + std * z)
    return (steps - 1 - jnp.floor(steps * u).astype(jnp.int32)).clip(0)


def _logit(share: float) -> float:
    if not 0 < share < 1:
        return math.copysign(math.inf, share - 0.5)
    return math.log(share / (1 - share))


def noise_pair(
    key: Key[Array, ""], latents: Images, schedule: NoiseTable, among: Timesteps | None = None
) -> Noised:
    """Noises the images of a pair with the same timestep and the same noise.

    The comparison is then between the images alone. Draws cover the batch as given: pass the
    global batch, so that draws depend on neither hosts nor sharding.

    Args:
        latents: scaled clean latents; n is 2, or 1 without rejected images.
        among: distribution and weights of timesteps; None is uniform, of weight 1.

    Returns:
        Noised latents and target, float32 `[B, n, H, W, C]`, and timesteps `[B]`, int32.
    """
    latents = latents.astype(jnp.float32)
    timestep_key, noise_key = jax.random.split(key)
    batch, _, *image = latents.shape
    among = among or Timesteps(0, schedule.num_train_timesteps)
    timesteps = draw_timesteps(timestep_key, batch, among)
    noise = jax.random.normal(noise_key, (batch, 1, *image), jnp.float32)
    return Noised(
        latents=add_noise(latents, noise, timesteps, schedule),
        timesteps=timesteps,
        target=prediction_target(latents, noise, timesteps, schedule),
        times=jnp.asarray(schedule.times)[timesteps],
        weights=None if among.weights is None else jnp.asarray(among.weights)[timesteps],
    )
