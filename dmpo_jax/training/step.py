"""One optimisation step, the module to read first.

Letters as in `types`: B pairs, 2 images of a pair, A microbatches.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from dmpo_jax.diffusion.noise import Factor, NoiseTable, sample_latents
from dmpo_jax.diffusion.timesteps import Timesteps, noise_pair
from dmpo_jax.models import lora, parameters
from dmpo_jax.objectives import Anchor, winner_preserving
from dmpo_jax.parallel import meshes, placement
from dmpo_jax.training import health, optim
from dmpo_jax.types import Condition, Noised, PairBatch, PerPair

# Otherwise XLA keeps bfloat16 intermediates of one forward pass in float32 and not of the
# other, and beta amplifies the difference into margins of the policy against itself.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}


class TrainState(NamedTuple):
    """Everything that a step changes. Excludes the reference, which is constant."""

    step: Int[Array, ""]
    params: dict[str, jax.Array]  # all parameters of the policy, or its adapters
    opt_state: Any
    skipped: Int[Array, ""]  # updates skipped for a non-finite loss or gradient
    ema: dict[str, jax.Array] | None = None  # moving average of params, if one is kept
    moving: dict[str, jax.Array] | None = None  # a reference that follows params, if it does


class Moving(NamedTuple):
    """How a reference follows the policy: after every `every` updates, as an average.

    decay: in [0, 1], what is kept of the reference; 0 takes the policy, 1 stays.
    """

    decay: float | int
    every: int = 1

    def follow(self, reference: Any, params: Any, step: Int[Array, ""]) -> Any:
        """Returns the reference after the update that was numbered `step`, from 0."""
        decay = jnp.where((step + 1) % self.every == 0, self.decay, 1.0)
        return jax.tree.map(lambda r, p: decay * r + (1 - decay) * p, reference, params)


class Setup(NamedTuple):
    """The constants of a step: pure functions and Python numbers."""

    predict: Callable[..., jax.Array]  # (params, latents [N...], times [N], condition)
    objective: Callable[..., PerPair]  # hyperparameters bound
    needs_reference: bool
    needs_rejected: bool
    schedule: NoiseTable
    scaling_factor: Factor
    tx: optax.GradientTransformation
    shift_factor: Factor = 0.0
    pack: int = 1  # latents are packed pack x pack, then scaled and noised
    accumulation: int = 1
    group: int | None = None  # consecutive pairs that means over the batch are of; None: all
    adapters: bool = False  # True if the state's parameters are adapters on the frozen ones
    dropout: float = 0.0  # of the adapters
    ema_decay: float = 0.0
    mean_only: bool = False  # True if batches hold the moments' mean alone
    timesteps: Timesteps | None = None  # their density and loss weights; None: uniform
    safeguard: float | None = None  # mu of `objectives.winner_preserving`; None: off
    anchor: Anchor | None = None
    moving: Moving | None = None  # None: the reference is fixed


def make_state(
    params: dict[str, jax.Array],
    tx: optax.GradientTransformation,
    *,
    ema: bool = False,
    moving: bool = False,
) -> TrainState:
    """Returns the state before the first step, with float32 master parameters."""

    # Copies: the state is donated, and the input may also be the reference.
    def copy(params):
        return {path: jnp.array(x, jnp.float32, copy=True) for path, x in params.items()}

    average, reference = (copy(params) if kept else None for kept in (ema, moving))
    params, zero = copy(params), jnp.zeros((), jnp.int32)
    return TrainState(zero, params, tx.init(params), jnp.zeros((), jnp.int32), average, reference)


def train_step(
    state: TrainState,
    reference: dict[str, Any] | None,
    batch: PairBatch,
    key: Key[Array, ""],
    *,
    setup: Setup,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Noises the pairs, predicts with policy and reference, computes the loss and updates. Pure.

    Args:
        reference: frozen parameters, not donated; kernels may be `Quantised`. Includes the base of
            adapters, the reference's own adapters if it has any, and the buffers of a model that
            has any: arrays that are not trained. A moving reference is the state's, in their place.
            None if neither they nor the objective need it.
        batch: the global batch. key: the run's; the step's own is folded in here.

    Returns:
        The next state, and float32 scalars; under "pairs", `health.by_pair` of each pair, in
        arbitrary order. If loss or gradient is not finite, the parameters, the optimizer and the
        average stay unchanged and `skipped` increases by one. If the optimizer makes parameters
        of finite gradients that are not finite, they are kept and "update_norm" is not finite:
        undoing that too would need memory for a second state.
    """
    key = jax.random.fold_in(key, state.step)
    reference = with_moving(reference, state.moving)
    noised = noise_batch(key, batch, setup)
    parts = (noised, batch.preference, batch.condition)
    parts = microbatches(parts, setup.accumulation, setup.group or 1)
    if setup.dropout:  # differs from the keys that noise_batch splits off
        parts += (jax.random.split(jax.random.fold_in(key, 2**31), setup.accumulation),)

    def gradient(part):
        policy_loss = functools.partial(pair_loss, reference=reference, part=part, setup=setup)
        (_, measured), gradient = jax.value_and_grad(policy_loss, has_aux=True)(state.params)
        return gradient, measured

    grads, (scalars, pairs) = accumulate(gradient, parts, setup.accumulation)
    with jax.named_scope("health"):  # `hlo` recognises the pairs' collectives by this name
        pairs = jnp.moveaxis(pairs, 0, 1).reshape(len(health.FIELDS), -1)
    metrics = {name: x.mean() for name, x in scalars.items()}
    metrics |= health.summary(pairs, reference=setup.needs_reference, rejected=setup.needs_rejected)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
    opt_state = optim.at_step(state.opt_state, state.step)
    updates, opt_state = setup.tx.update(grads, opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = average(state.ema, params, state.step, setup.ema_decay)
    moving = state.moving
    if setup.moving is not None:
        moving = setup.moving.follow(moving, params, state.step)
    new = (params, opt_state, ema, moving)
    old = (state.params, state.opt_state, state.ema, state.moving)
    params, opt_state, ema, moving = jax.tree.map(functools.partial(jnp.where, finite), new, old)
    skipped = state.skipped + (1 - finite.astype(jnp.int32))
    # Norm of the change, not of `updates`: that would read the full state once more.
    moved = jax.tree.map(jnp.subtract, params, state.params)
    metrics |= {
        "grad_norm": grad_norm,
        "update_norm": optax.tree.norm(moved),
        "skipped": skipped.astype(jnp.float32),
        "pairs": pairs,
    }
    return TrainState(state.step + 1, params, opt_state, skipped, ema, moving), metrics


def with_moving(reference: Any, moving: Any) -> Any:
    """Returns the frozen parameters, those of a moving reference in place of their own."""
    return reference if moving is None else {**(reference or {}), **moving}


def average(ema: Any, params: Any, step: Int[Array, ""], decay: float) -> Any:
    """Returns the next moving average; None if none is kept.

    Early on its decay is at most (1 + step) / (10 + step); otherwise it would keep the initial
    values for thousands of steps. Source: huggingface/diffusers, training_utils.EMAModel.
    """
    if ema is None:
        return None
    now = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: old + (1 - now) * (new - old), ema, params)


def pair_loss(params, reference, part, setup: Setup):
    """Returns (mean loss, (scalars, `health.by_pair`)) of noised pairs; differentiable in params.

    part: noised pairs, preference, condition and, for dropout only, a key.
    """
    noised, preference, condition, *keys = part
    policy, frozen = predict_both(params, reference, noised, condition, setup, *keys)
    losses, scalars = pair_losses(policy, frozen, noised, preference, setup)
    scalars["loss"] = losses.mean()
    seen = (policy, frozen, noised.target, preference, noised.timesteps, losses)
    return scalars["loss"], (scalars, health.by_pair(*jax.lax.stop_gradient(seen)))


def pair_losses(
    policy, reference, noised: Noised, preference: PerPair, setup: Setup
) -> tuple[PerPair, dict[str, jax.Array]]:
    """Returns (the objective of each pair, weighted by its timestep; scalars).

    The safeguard's lambda is one of the scalars, the mean over the groups.
    """

    def of_group(policy, reference, target, preference):
        scalars, judged = {}, policy
        if setup.safeguard is not None:
            judged, scalars["safeguard"] = winner_preserving(policy, target, mu=setup.safeguard)
        losses = setup.objective(judged, reference, target, preference)
        if setup.anchor is not None:
            losses += setup.anchor(judged, reference, target, preference)
        return losses, scalars

    rows = (policy, reference, noised.target, preference)
    if setup.group is None:
        losses, scalars = of_group(*rows)
    else:
        grouped = jax.tree.map(lambda x: x.reshape(-1, setup.group, *x.shape[1:]), rows)
        losses, scalars = jax.vmap(of_group)(*grouped)
        losses, scalars = losses.reshape(-1), jax.tree.map(jnp.mean, scalars)
    return losses if noised.weights is None else losses * noised.weights, scalars


def predict_both(params, reference, noised, condition, setup: Setup, dropout_key=None):
    """Returns (the policy's predictions, the reference's or None)."""
    frozen = reference
    if setup.adapters:
        if not any(map(lora.is_adapter, reference)):  # the base: adapters switched off
            frozen = {**reference, **lora.switched_off(jax.lax.stop_gradient(params))}
        if dropout_key is not None:
            params = lora.drop(dropout_key, params, setup.dropout)
    params = parameters.completed(params, reference)
    reference_prediction = None
    if setup.needs_reference:
        reference_prediction = jax.lax.stop_gradient(
            predict_pairs(setup.predict, frozen, noised, condition)
        )
        # The policy waits, so that the reference's activations are freed before its own are kept.
        reference_prediction, latents = jax.lax.optimization_barrier(
            (reference_prediction, noised.latents)
        )
        noised = noised._replace(latents=latents)
    return predict_pairs(setup.predict, params, noised, condition), reference_prediction


def noise_batch(key: Key[Array, ""], batch: PairBatch, setup: Setup) -> Noised:
    """Draws latents from the moments and noises them, over the global batch."""
    latent_key, noise_key = jax.random.split(key)
    moments = batch.moments if setup.needs_rejected else batch.moments[:, :1]
    latents = sample_latents(
        latent_key,
        moments,
        scaling_factor=setup.scaling_factor,
        shift_factor=setup.shift_factor,
        mean_only=setup.mean_only,
        pack=setup.pack,
    )
    return noise_pair(noise_key, latents, setup.schedule, setup.timesteps)


def predict_pairs(predict, params, noised: Noised, condition: Condition):
    """Applies the model to pairs, flattened B-major so that a device keeps its rows."""
    b, n = noised.latents.shape[:2]
    latents = noised.latents.reshape(b * n, *noised.latents.shape[2:])
    times = jnp.broadcast_to(noised.times[:, None], (b, n)).reshape(b * n)
    prediction = predict(params, latents, times, condition.per_image(n))
    return prediction.reshape(b, n, *prediction.shape[1:])


def microbatches(tree: Any, count: int, group: int = 1) -> Any:
    """Reshapes [B, ...] to [A, B/A, ...] such that each device keeps its rows.

    Groups of consecutive rows stay together. Group g goes to microbatch g % A: the reshape to
    (groups/A, A, group) splits no device's block, whereas (A, B/A) would gather the batch.
    """

    def cut(x: jax.Array) -> jax.Array:
        groups = jnp.moveaxis(x.reshape(-1, count, group, *x.shape[1:]), 1, 0)
        return groups.reshape(count, -1, *x.shape[1:])

    return jax.tree.map(cut, tree)


def accumulate(gradient: Callable, parts: Any, count: int) -> tuple[Any, Any]:
    """Returns the mean gradient over microbatches, one at a time, and their stacked aux values."""
    if count == 1:
        grads, beside = gradient(jax.tree.map(lambda x: x[0], parts))
        return grads, jax.tree.map(lambda x: x[None], beside)

    def add(total, part):
        grads, beside = gradient(part)
        return jax.tree.map(jnp.add, total, grads), beside

    shapes = jax.eval_shape(lambda p: gradient(jax.tree.map(lambda x: x[0], p))[0], parts)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, beside = jax.lax.scan(add, zero, parts)
    return jax.tree.map(lambda x: x / count, total), beside


def noise_each(
    key: Key[Array, ""], numbers: Int[Array, " B"], batch: PairBatch, setup: Setup
) -> Noised:
    """Noises each pair by itself: its noise depends on its number, and not on the batch."""

    def noise_one(number, moments):
        alone = batch._replace(moments=moments[None])
        noised = noise_batch(jax.random.fold_in(key, number), alone, setup)
        return jax.tree.map(lambda x: x[0], noised)

    return jax.vmap(noise_one)(numbers, batch.moments)


def validate_batch(
    params,
    reference,
    batch: PairBatch,
    weights: PerPair,
    numbers: Int[Array, " B"],
    key: Key[Array, ""],
    *,
    setup: Setup,
) -> dict[str, jax.Array]:
    """Returns weighted sums over pairs: `loss`, `implicit_accuracy` and `weight`.

    weights: 0 for padding. numbers: of the pairs in the split, which their noise depends on.
    """
    # Accuracy compares the two images; the safeguard changes gradients only.
    setup = setup._replace(needs_rejected=True, safeguard=None)
    noised = noise_each(key, numbers, batch, setup)
    predictions = predict_both(params, reference, noised, batch.condition, setup)
    preference = jnp.where(weights > 0, batch.preference.astype(jnp.float32), jnp.nan)
    losses, _ = pair_losses(*predictions, noised, preference, setup)
    seen = (*predictions, noised.target, batch.preference, noised.timesteps, losses)
    right = health.correct(health.by_pair(*seen))
    return {
        "loss": (losses * weights).sum(where=weights > 0),
        "implicit_accuracy": (right * weights).sum(),
        "weight": weights.sum(),
    }


def on_mesh(setup: Setup, mesh: Mesh | None) -> Setup:
    """Returns the setup with each device predicting its own rows."""
    return setup._replace(predict=placement.over_rows(setup.predict, mesh))


def jit_train_step(setup: Setup, shardings: Any = None):
    """Returns `train_step` jitted for the state's shardings and their mesh; the state is donated.

    shardings: or formats, as of `layouts.parameter_formats`. None: it runs wherever its arguments
        are.
    """
    # The update's number is a scalar, which has no format.
    mesh = None if shardings is None else jax.tree.leaves(shardings)[0].mesh
    return jax.jit(
        functools.partial(train_step, setup=on_mesh(setup, mesh)),
        donate_argnums=0,
        # Metrics are replicated: every process reads them in full.
        out_shardings=None if mesh is None else (shardings, meshes.replicated(mesh)),
        compiler_options=COMPILER_OPTIONS,
    )
