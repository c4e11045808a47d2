"""Preference objectives: pure functions from predictions to one loss per pair.

Letters: n images of a pair (2, or 1 where the rejected one is not needed); l is the
policy's mean squared error over H, W, C, r the reference's; c chosen, x rejected;
u = beta/2 * [(r_c - l_c) - (r_x - l_x)], the logit of the policy's implied preference.
To add an objective, write one function here under `@objective` and one row in its test.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmpo_jax.types import Pair, PerPair

Images = Float[Array, "B n H W C"]


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss and what it asks for. Hashable, so that it may be a static argument.

    Attributes:
        fn: `(policy, reference, target, preference, **hyperparameters) -> [B]`.
        name: the key in `OBJECTIVES`.
        needs_reference: whether the frozen model's predictions are used; where not,
            its forward pass can be left out and `reference` may be None.
        needs_rejected: whether image 1 is used; where not, n may be 1.
        hyperparameters: names of `fn`'s keyword-only arguments.
    """

    fn: Callable[..., PerPair]
    name: str
    needs_reference: bool
    needs_rejected: bool
    hyperparameters: tuple[str, ...]

    def __call__(
        self,
        policy: Images,
        reference: Images | None,
        target: Images,
        preference: PerPair | None = None,
        **hyperparameters: float | int,
    ) -> PerPair:
        """One loss per pair, float32 `[B]`, not reduced; no pair sees another.

        Args:
            policy: predictions of the trained model, `[B, n, H, W, C]`, any float type.
            reference: the frozen model's. Only `policy` is meant to be differentiated.
            target: what both should have predicted (epsilon, v or x0).
            preference: the probability that image 0 is preferred; None is 1 everywhere.
            **hyperparameters: Python numbers, checked before anything compiles.

        Raises:
            ValueError: if what the objective needs is missing or out of range.
        """
        if self.needs_reference and reference is None:
            raise ValueError(
                f"objective {self.name!r} compares with a reference, got None; pass the frozen "
                "model's predictions or choose an objective with needs_reference=False"
            )
        if self.needs_rejected and policy.shape[1] != 2:
            raise ValueError(
                f"objective {self.name!r} needs policy of shape [B, 2, H, W, C], got "
                f"{policy.shape}; pass the rejected images too"
            )
        if preference is None:
            label = jnp.ones(policy.shape[0], jnp.float32)
        else:
            label = preference.astype(jnp.float32)
        return self.fn(policy, reference, target, label, **hyperparameters)


OBJECTIVES: dict[str, Objective] = {}


def objective(
    *, needs_reference: bool, needs_rejected: bool
) -> Callable[[Callable[..., PerPair]], Objective]:
    """Makes a function selectable in a config under its own name.

    Raises:
        ValueError: if the name is taken.
    """

    def register(fn: Callable[..., PerPair]) -> Objective:
        name = fn.__name__
        if name in OBJECTIVES:
            raise ValueError(f"objective {name!r} is already defined; give this one another name")
        parameters = inspect.signature(fn).parameters.values()
        keywords = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        OBJECTIVES[name] = Objective(fn, name, needs_reference, needs_rejected, keywords)
        return OBJECTIVES[name]

    return register


def margin(policy: Pair, reference: Pair, target: Pair) -> PerPair:
    """How much more the policy gained on the chosen image than on the rejected one.

    Returns:
        `(r_c - l_c) - (r_x - l_x)`, float32 `[B]`, in squared prediction units. Positive
        where the policy leans further to the chosen image than the reference does;
        exactly 0 where the two predict the same.
    """
    policy, reference, target = (x.astype(jnp.float32) for x in (policy, reference, target))
    # r - l as one product: beta/2 is in the thousands and multiplies whatever a
    # difference of two means would lose to rounding.
    gain = (reference - policy) * (reference + policy - 2 * target)
    gain = gain.mean((2, 3, 4))
    return gain[:, 0] - gain[:, 1]


def _implied_logit(policy: Pair, reference: Pair, target: Pair, beta: float | int) -> PerPair:
    """`u = beta/2 * margin`; the one place where beta is checked."""
    if not isinstance(beta, int | float) or not 0 < beta < math.inf:
        raise ValueError(
            f"beta must be a finite Python number above 0, got beta={beta}; "
            "2000 is a usual value for SD1.5"
        )
    return 0.5 * beta * margin(policy, reference, target)


@objective(needs_reference=True, needs_rejected=True)
def dmpo(
    policy: Pair,
    reference: Pair,
    target: Pair,
    preference: PerPair,
    *,
    beta: float | int,
    alpha: float | int,
) -> PerPair:
    """Divergence minimisation: KL from the policy's preference to a softened label.

    With `p = sigmoid(u)` and `q = clip(preference, alpha, 1 - alpha)`,

        loss = p log(p / q) + (1 - p) log((1 - p) / (1 - q)).

    It is zero at `u = logit(q)` and turns round beyond, so the margin is bounded; a pair
    that the policy has badly wrong tends to `log(1 / (1 - q))` with no slope. A tie
    (preference 0.5) keeps its weight and holds the policy at the reference's margin.

    Args:
        beta: inverse temperature, above 0; 2000 for SD1.5.
        alpha: how far the label is kept from certainty, in (0, 0.5]; a Python float.

    Source: Divergence Minimization Preference Optimization, arXiv 2507.07510;
    AIDC-AI/Diffusion-SDPO, train.py, branch `dmpo`.
    """
    if not isinstance(alpha, int | float) or not 0 < alpha <= 0.5:
        raise ValueError(
            f"dmpo needs a Python float alpha in (0, 0.5], got alpha={alpha}; it is the label's "
            "softening, 0.01 in published runs (for a label of 1 - alpha, pass its complement)"
        )
    u = _implied_logit(policy, reference, target, beta)
    # Both sides are clipped from below rather than 1 - q taken afterwards: in float32
    # 1 - (1 - alpha) is 0 for a small alpha, and its log infinite.
    log_q = jnp.log(jnp.clip(preference, alpha, 1 - alpha))
    log_not_q = jnp.log(jnp.clip(1 - preference, alpha, 1 - alpha))
    # Log space: the sigmoid saturates at |u| near 17, where beta in the thousands goes at
    # once. exp(-big) * (-big) is 0, and so is its derivative.
    log_p, log_not_p = jax.nn.log_sigmoid(u), jax.nn.log_sigmoid(-u)
    chosen = jnp.exp(log_p) * (log_p - log_q)
    rejected = jnp.exp(log_not_p) * (log_not_p - log_not_q)
    return chosen + rejected


@objective(needs_reference=True, needs_rejected=True)
def diffusion_dpo(
    policy: Pair,
    reference: Pair,
    target: Pair,
    preference: PerPair,
    *,
    beta: float | int,
    label_smoothing: float | int = 0.0,
) -> PerPair:
    """Direct preference optimisation: cross entropy of the label against the policy.

    With `q = clip(preference, label_smoothing, 1 - label_smoothing)`,

        loss = -q log sigmoid(u) - (1 - q) log sigmoid(-u).

    At preference 1 this is the published loss, smoothed or not. A softer preference is
    the label itself, so a tie (0.5) has its minimum, log 2, at `u = 0`.

    Args:
        beta: inverse temperature, above 0; 5000 in published runs.
        label_smoothing: how far the label is kept from certainty, in [0, 0.5].

    Source: Diffusion Model Alignment Using Direct Preference Optimization, arXiv
    2311.12908; SalesforceAIResearch/DiffusionDPO, train.py.
    """
    if not isinstance(label_smoothing, int | float) or not 0 <= label_smoothing <= 0.5:
        raise ValueError(
            "diffusion_dpo needs a Python float label_smoothing in [0, 0.5], got "
            f"label_smoothing={label_smoothing}; 0 is no smoothing"
        )
    u = _implied_logit(policy, reference, target, beta)
    q = jnp.clip(preference, label_smoothing, 1 - label_smoothing)
    return -q * jax.nn.log_sigmoid(u) - (1 - q) * jax.nn.log_sigmoid(-u)


@objective(needs_reference=False, needs_rejected=False)
def sft(policy: Images, reference: Images | None, target: Images, preference: PerPair) -> PerPair:
    """Supervised fine-tuning: `l_c`, the chosen image's own denoising error.

    A tie (preference exactly 0.5) has no chosen image and weighs 0; it still counts
    in a mean over B. The reference and the rejected image are not looked at.

    Source: SalesforceAIResearch/DiffusionDPO, train.py, `--sft`.
    """
    del reference
    error = policy[:, 0].astype(jnp.float32) - target[:, 0].astype(jnp.float32)
    return jnp.where(preference == 0.5, 0.0, jnp.square(error).mean((1, 2, 3)))
