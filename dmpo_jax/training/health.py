"""Preference health: accuracy and margins of the policy, and its errors on either image.

A known failure: the loss falls because the rejected error grows, while the chosen error grows
too; `chosen_gain` then turns positive.

The step returns one small matrix, a column per pair (`by_pair`), and the means over it
(`summary`). The host derives quantiles and curves by timestep from it (`Curves`), at no cost
to a device.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dmpo_jax.objectives import errors, gains
from dmpo_jax.types import PerPair

Images = Float[Array, "B n H W C"]
Scalar = Float[Array, ""]
Table = Float[Array, "8 B"] | Float[np.ndarray, "8 B"]

# The rows of `by_pair`. l: the policy's mean squared error, r: the reference's; _c chosen,
# _x rejected.
FIELDS = (
    "timestep",
    "preference",
    "loss",
    "margin",  # (r_c - l_c) - (r_x - l_x); l_x - l_c without reference
    "chosen_error",  # l_c
    "rejected_error",
    "chosen_gain",  # l_c - r_c: below 0, the policy predicts it better than the reference
    "rejected_gain",
)
_ROW = {name: i for i, name in enumerate(FIELDS)}
_IMAGES = FIELDS[4:]  # means that are omitted if undefined
QUANTILES = (5, 50, 95)  # percent
BINS = 10  # of the training timesteps, for curves by timestep
# p (1 - p) below this: the pair has almost no gradient left under a divergence.
SATURATED = 0.01


def by_pair(
    policy: Images,
    reference: Images | None,
    target: Images,
    preference: PerPair | None,
    timesteps: Int[Array, " B"],
    losses: PerPair,
) -> Float[Array, "8 B"]:
    """Returns the metrics of each pair, float32, one row per name in FIELDS.

    Errors, gains and margins are in squared prediction units. Undefined values are NaN: margins
    and the rejected rows without rejected images, gains without reference.

    Args:
        policy, target: `[B, n, H, W, C]`, any float type; n is 2, or 1 without rejected.
        reference: as policy, or None.
        preference: probability that image 0 is preferred; None is 1 everywhere.
    """
    batch, images = policy.shape[:2]
    error = errors(policy, target)
    missing = jnp.full((batch, 2), jnp.nan, jnp.float32)
    gain = missing[:, :images] if reference is None else -gains(policy, reference, target)
    error, gain = (jnp.concatenate([x, missing], 1)[:, :2] for x in (error, gain))
    against = error if reference is None else gain
    label = jnp.ones(batch) if preference is None else preference
    rows = (timesteps, label, losses, against[:, 1] - against[:, 0], *error.T, *gain.T)
    return jnp.stack([x.astype(jnp.float32) for x in rows])


def summary(
    pairs: Float[Array, "8 B"], *, reference: bool = True, rejected: bool = True
) -> dict[str, Scalar]:
    """Returns float32 scalars over the pairs of `by_pair`.

        implicit_accuracy  share of pairs with a margin above 0; a margin of 0 counts 1/2,
                           and so does a tie (preference 0.5), which has no right answer.
                           Among decided pairs it is (accuracy - ties/2) / (1 - ties).
        ties               share of pairs with preference exactly 0.5
        margin             mean
        margin_abs_max     largest |margin|: exactly 0 if policy and reference agree
        chosen_error, rejected_error, chosen_gain, rejected_gain    means

    Without rejected images accuracy and margins are NaN and the rejected keys are absent;
    without reference the gains are absent.
    reference, rejected: True if `by_pair` was given a reference, and rejected images.
    """
    margin = pairs[_ROW["margin"]]
    means = [name for name in _IMAGES if rejected or not name.startswith("rejected")]
    return {
        "implicit_accuracy": correct(pairs).mean(),
        "ties": (pairs[_ROW["preference"]] == 0.5).mean(),
        "margin": margin.mean(),
        "margin_abs_max": jnp.abs(margin).max(),
        **{
            name: pairs[_ROW[name]].mean()
            for name in means
            if reference or not name.endswith("gain")
        },
    }


def correct(pairs: Table) -> Float[Array, " B"]:
    """Returns each pair's `implicit_accuracy`: 1, 0, or 1/2; NaN without rejected images."""
    margin, tied = pairs[_ROW["margin"]], pairs[_ROW["preference"]] == 0.5
    # (1 + sign) / 2 propagates NaN; a comparison would turn it into a wrong answer.
    return jnp.where(tied & ~jnp.isnan(margin), 0.5, 0.5 + 0.5 * jnp.sign(margin))


class Curves:
    """Scalars for plots, from the `by_pair` of successive updates.

    Args:
        beta: of u = beta/2 * margin, if the loss is a function of u; else None.
        alpha: of q, the label clipped by it, if the loss has its minimum at u = logit(q); else
            None.
        timesteps: number of training timesteps.
    """

    def __init__(self, *, beta: float | None, alpha: float | None, timesteps: int):
        self._beta, self._alpha, self._timesteps = beta, alpha, timesteps
        self._sums: dict[str, np.ndarray] = {}  # by bin, since the last `take`
        self._counts = np.zeros(BINS)

    def add(self, pairs: Float[np.ndarray, "8 B"]) -> dict[str, float]:
        """Adds an update's pairs and returns the update's own scalars.

        margin_p05, _p50, _p95   quantiles of the margin
        logit, logit_p05, ...    mean and quantiles of u, the policy's implied logit
        saturation               share of pairs with p (1 - p) < 0.01, p = sigmoid(u)
        past_optimum             share of pairs with u above logit(q), where the slope of a
                                 divergence has changed sign
        """
        rows: dict[str, np.ndarray] = dict(zip(FIELDS, np.asarray(pairs, np.float64), strict=True))
        implied = {} if self._beta is None else self._implied(rows, self._beta)
        bins = np.minimum(rows["timestep"] * BINS // self._timesteps, BINS - 1).astype(int)
        binned = {name: rows[name] for name in ("loss", "margin", *_IMAGES)} | implied
        for name, row in {**binned, "implicit_accuracy": np.asarray(correct(pairs))}.items():
            total = self._sums.setdefault(name, np.zeros(BINS))
            total += np.bincount(bins, row, BINS)
        self._counts += np.bincount(bins, minlength=BINS)
        if np.isnan(rows["margin"]).any():  # no rejected images, or a skipped update
            return {}
        found = {name: float(row.mean()) for name, row in implied.items()}
        found |= _quantiles("margin", rows["margin"])
        return found | _quantiles("logit", implied["logit"]) if implied else found

    def _implied(self, rows: dict[str, np.ndarray], beta: float) -> dict[str, np.ndarray]:
        """Returns u of each pair, and the indicators derived from it."""
        # 0 * u: a NaN pair is in no share.
        u = 0.5 * beta * rows["margin"]
        p = 1 / (1 + np.exp(-np.clip(u, -500, 500)))
        implied = {"logit": u, "saturation": (p * (1 - p) < SATURATED) + 0 * u}
        if self._alpha:
            q = np.clip(rows["preference"], self._alpha, 1 - self._alpha)
            implied["past_optimum"] = (u > np.log(q / (1 - q))) + 0 * u
        return implied

    def take(self) -> dict[str, float]:
        """Returns {"METRIC_by_timestep/FIRST-LAST": mean} over all pairs since the last call."""
        edges = [round(i * self._timesteps / BINS) for i in range(BINS + 1)]
        means = {
            f"{name}_by_timestep/{first:03d}-{last - 1:03d}": float(total / count)
            for name, sums in self._sums.items()
            for first, last, total, count in zip(edges, edges[1:], sums, self._counts, strict=False)
            if count and np.isfinite(total)
        }
        self._sums, self._counts = {}, np.zeros(BINS)
        return means


def _quantiles(name: str, values: np.ndarray) -> dict[str, float]:
    found = np.percentile(values, QUANTILES)
    return {f"{name}_p{q:02d}": float(x) for q, x in zip(QUANTILES, found, strict=True)}
