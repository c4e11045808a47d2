"""Gaussian mixtures in the plane, and integrals over them as sums over a fine grid.

Used by mode_seeking.py. Letters: M components, G points of a grid, `...` any leading axes.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float
from sklearn.mixture import GaussianMixture

Numbers = Array | np.ndarray


class Mixture(NamedTuple):
    """Gaussian mixture: `scale_i (y - mean_i)` whitens component i, of weight softmax(logits)_i.

    scale's last axis holds the lower triangular whitening matrix as the logarithms of its
    diagonal and the corner below, so that every number is allowed and the density exact.
    """

    logits: Float[Numbers, "... M"]
    mean: Float[Numbers, "... M 2"]
    scale: Float[Numbers, "... M 3"]

    def log_density(self, points: Float[Numbers, "... 2"]) -> Float[Numbers, "..."]:
        """Natural logarithm of the density at each point; no leading axes of parameters."""

        def component(log_weight, mean, scale):
            x, y = points[..., 0] - mean[0], points[..., 1] - mean[1]
            first, second = jnp.exp(scale[0]) * x, jnp.exp(scale[1]) * y + scale[2] * x
            log_normal = scale[0] + scale[1] - np.log(2 * np.pi) - 0.5 * (first**2 + second**2)
            return log_weight + log_normal

        log_weights = jax.nn.log_softmax(self.logits)
        return logsumexp(jax.vmap(component, out_axes=-1)(log_weights, self.mean, self.scale), -1)


def round_mixture(weights: np.ndarray, means: np.ndarray, spreads: list[float]) -> Mixture:
    """Makes a mixture of round components; `spreads` are their standard deviations."""
    inverse = -np.log(spreads)
    return Mixture(np.log(weights), means, np.stack([inverse, inverse, 0 * inverse], -1))


def draw(mixture: Mixture, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draws points of a `round_mixture`, `[count, 2]`."""
    weights = np.exp(mixture.logits)
    which = rng.choice(len(weights), size=count, p=weights / weights.sum())
    spread = np.exp(-np.asarray(mixture.scale)[which, :1])
    return np.asarray(mixture.mean)[which] + spread * rng.normal(size=(count, 2))


def fit(points: np.ndarray, components: int, seed: int) -> Mixture:
    """Fits the likeliest mixture to points `[N, 2]`: EM from k-means, whose start `seed` draws."""
    found = GaussianMixture(components, random_state=seed, n_init=3).fit(points)
    # Whitening matrices of scikit-learn are upper triangular and multiply from the right.
    lower = np.swapaxes(np.asarray(found.precisions_cholesky_), -1, -2)
    scale = [np.log(lower[:, 0, 0]), np.log(lower[:, 1, 1]), lower[:, 1, 0]]
    return Mixture(
        np.log(np.asarray(found.weights_)), np.asarray(found.means_), np.stack(scale, -1)
    )


@dataclasses.dataclass(frozen=True)
class Grid:
    """Cell centres of a square about the origin, `side` long, with `cells` along each edge.

    Sums over it are integrals up to rounding, if densities are smooth over a few cells and zero
    outside.
    """

    side: float
    cells: int

    @functools.cached_property
    def axis(self) -> np.ndarray:
        """Centres along one edge, `[cells]`."""
        return (np.arange(self.cells) + 0.5) * self.side / self.cells - self.side / 2

    @property
    def points(self) -> np.ndarray:
        """`[cells**2, 2]`, x fastest."""
        return np.stack(np.meshgrid(self.axis, self.axis), -1).reshape(-1, 2)

    @property
    def area(self) -> float:
        """Area of one cell."""
        return (self.side / self.cells) ** 2

    def log_density(self, mixture: Mixture) -> np.ndarray:
        """Log density of one mixture at the points, float64 `[G]`."""
        with jax.enable_x64(True):
            exact = Mixture(*(jnp.asarray(x, jnp.float64) for x in mixture))
            return np.asarray(_log_density(exact, self.points))


@jax.jit
def _log_density(mixture: Mixture, points: Float[Numbers, "G 2"]) -> Float[Numbers, " G"]:
    return mixture.log_density(points)


def compare(
    grid: Grid,
    log_policy: np.ndarray,
    log_optimum: np.ndarray,
    modes: np.ndarray,
    radius: float,
) -> dict[str, float | list[float]]:
    """Compares a density `[G]` with the optimum `[G]`; both as natural logarithms.

    Returns:
        reverse_kl: KL(policy || optimum) in nats, which the RL objective counts.
        forward_kl: KL(optimum || policy) in nats.
        on_modes: the policy's probability within `radius` of each of `modes`, `[M, 2]`.
        elsewhere: the remaining probability.
    """
    policy, optimum = (np.exp(x) * grid.area for x in (log_policy, log_optimum))
    away = np.linalg.norm(grid.points[:, None] - modes[None], axis=-1)
    on_modes = policy @ (away < radius)
    return {
        "reverse_kl": float(policy @ (log_policy - log_optimum)),
        "forward_kl": float(optimum @ (log_optimum - log_policy)),
        "on_modes": [float(x) for x in on_modes],
        "elsewhere": float(1 - on_modes.sum()),
    }
