"""One optimisation step, the page to read first.

Letters as in `types`: B pairs, 2 images a pair, A microbatches.
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
from dmpo_jax.objectives import winner_preserving
from dmpo_jax.parallel import mesh as meshes
from dmpo_jax.parallel import placement
from dmpo_jax.training import health
from dmpo_jax.types import Condition, Noised, PairBatch, PerPair

# Without it XLA keeps bfloat16 intermediates of one forward in float32 and not of the
# other, and beta turns the difference into margins of policy against itself.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}


class TrainState(NamedTuple):
    """Everything a step changes. The reference is not in it: nothing can change it."""

    step: Int[Array, ""]
    params: dict[str, jax.Array]  # all of the policy's, or its adapters
    opt_state: Any
    skipped: Int[Array, ""]  # updates left out because loss or gradient was not finite
    ema: dict[str, jax.Array] | None = None  # moving average of params, where one is kept


class Setup(NamedTuple):
    """What a step closes over: pure functions and Python numbers."""

    predict: Callable[..., jax.Array]  # (params, latents [N...], times [N], condition)
    objective: Callable[..., PerPair]  # hyperparameters bound
    needs_reference: bool
    needs_rejected: bool
    schedule: NoiseTable
    scaling_factor: Factor
    tx: optax.GradientTransformation
    shift_factor: Factor = 0.0
    pack: int = 1  # latents are packed so before they are scaled and noised
    accumulation: int = 1
    adapters: bool = False  # whether the state's parameters are adapters on the frozen ones
    dropout: float = 0.0  # of the adapters
    ema_decay: float = 0.0
    mean_only: bool = False  # whether batches hold the moments' mean alone
    timesteps: Timesteps | None = None  # which are drawn, and what each weighs; None: all alike
    safeguard: float | None = None  # mu of `objectives.winner_preserving`; None: without


def make_state(
    params: dict[str, jax.Array], tx: optax.GradientTransformation, *, ema: bool = False
) -> TrainState:
    """The state before the first step, float32 master parameters."""

    # Copies: the state is donated, and what came in may be the reference too.
    def copy(params):
        return {path: jnp.array(x, jnp.float32, copy=True) for path, x in params.items()}

    params, average = copy(params), copy(params) if ema else None
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, tx.init(params), jnp.zeros((), jnp.int32), average)


def train_step(
    state: TrainState,
    reference: dict[str, jax.Array] | None,
    batch: PairBatch,
    key: Key[Array, ""],
    *,
    setup: Setup,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Noise the pairs, predict twice, compare, update. Pure: a function of its arguments.

    Args:
        reference: frozen parameters, not donated. Also what adapters sit on, and the buffers
            of a model that has any: arrays that are not trained. None where neither they nor
            the objective need it.
        batch: the global batch. key: the run's; the step's own is folded in here.

    Returns:
        The next state, and float32 scalars; under "pairs", what `health.by_pair` says of each
        pair, in no order that means anything. Where loss or gradient is not finite, the
        parameters and the optimizer stay as they were and `skipped` goes up by one.
    """
    key = jax.random.fold_in(key, state.step)
    noised = noise_batch(key, batch, setup)
    parts = microbatches((noised, batch.preference, batch.condition), setup.accumulation)
    if setup.dropout:  # far from the keys that noise_batch splits off
        parts += (jax.random.split(jax.random.fold_in(key, 2**31), setup.accumulation),)

    def gradient(part):
        policy_loss = functools.partial(pair_loss, reference=reference, part=part, setup=setup)
        (_, measured), gradient = jax.value_and_grad(policy_loss, has_aux=True)(state.params)
        return gradient, measured

    grads, (scalars, pairs) = accumulate(gradient, parts, setup.accumulation)
    with jax.named_scope("health"):  # `hlo` knows by it what is gathered of pairs
        pairs = jnp.moveaxis(pairs, 0, 1).reshape(len(health.FIELDS), -1)
    metrics = {name: x.mean() for name, x in scalars.items()}
    metrics |= health.summary(pairs, reference=setup.needs_reference, rejected=setup.needs_rejected)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
    updates, opt_state = setup.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new = (params, opt_state, average(state.ema, params, state.step, setup.ema_decay))
    old = (state.params, state.opt_state, state.ema)
    params, opt_state, ema = jax.tree.map(functools.partial(jnp.where, finite), new, old)
    skipped = state.skipped + (1 - finite.astype(jnp.int32))
    # Of what they moved by, not of `updates`: that norm would read the whole state once more.
    moved = jax.tree.map(jnp.subtract, params, state.params)
    metrics |= {
        "grad_norm": grad_norm,
        "update_norm": optax.tree.norm(moved),
        "skipped": skipped.astype(jnp.float32),
        "pairs": pairs,
    }
    return TrainState(state.step + 1, params, opt_state, skipped, ema), metrics


def average(ema: Any, params: Any, step: Int[Array, ""], decay: float) -> Any:
    """The next moving average; None where none is kept.

    Early on it forgets faster, by (1 + step) / (10 + step): it would hold the start for
    thousands of steps otherwise. Source: huggingface/diffusers, training_utils.EMAModel.
    """
    if ema is None:
        return None
    now = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: old + (1 - now) * (new - old), ema, params)


def pair_loss(params, reference, part, setup: Setup):
    """(mean loss, (scalars, `health.by_pair`)) of some noised pairs; differentiable in params.

    part: noised pairs, preference, condition and, for dropout alone, a key.
    """
    noised, preference, condition, *keys = part
    policy, frozen = predict_both(params, reference, noised, condition, setup, *keys)
    scalars = {}
    judged = policy
    if setup.safeguard is not None:
        judged, scalars["safeguard"] = winner_preserving(policy, noised.target, mu=setup.safeguard)
    losses = pair_losses(judged, frozen, noised, preference, setup)
    scalars["loss"] = losses.mean()
    seen = (policy, frozen, noised.target, preference, noised.timesteps, losses)
    return scalars["loss"], (scalars, health.by_pair(*jax.lax.stop_gradient(seen)))


def pair_losses(policy, reference, noised: Noised, preference: PerPair, setup: Setup) -> PerPair:
    """The objective of each pair, weighed by its timestep."""
    losses = setup.objective(policy, reference, noised.target, preference)
    return losses if noised.weights is None else losses * noised.weights


def predict_both(params, reference, noised, condition, setup: Setup, dropout_key=None):
    """(the policy's predictions, the reference's or None)."""
    frozen = reference
    if setup.adapters:  # on the same frozen parameters, switched off for the reference
        frozen = {**reference, **lora.switched_off(jax.lax.stop_gradient(params))}
        if dropout_key is not None:
            params = lora.drop(dropout_key, params, setup.dropout)
    params = parameters.completed(params, reference)
    reference_prediction = None
    if setup.needs_reference:
        reference_prediction = jax.lax.stop_gradient(
            predict_pairs(setup.predict, frozen, noised, condition)
        )
        # The policy waits: what the reference's forward keeps is gone before a backward's is.
        reference_prediction, latents = jax.lax.optimization_barrier(
            (reference_prediction, noised.latents)
        )
        noised = noised._replace(latents=latents)
    return predict_pairs(setup.predict, params, noised, condition), reference_prediction


def noise_batch(key: Key[Array, ""], batch: PairBatch, setup: Setup) -> Noised:
    """Latents drawn from the moments and noised, over the global batch."""
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
    """The model over pairs: flattened B-major, so that a device keeps its rows."""
    b, n = noised.latents.shape[:2]
    latents = noised.latents.reshape(b * n, *noised.latents.shape[2:])
    times = jnp.broadcast_to(noised.times[:, None], (b, n)).reshape(b * n)
    prediction = predict(params, latents, times, condition.per_image(n))
    return prediction.reshape(b, n, *prediction.shape[1:])


def microbatches(tree: Any, count: int) -> Any:
    """[B, ...] -> [A, B/A, ...], cut so that each device keeps its rows.

    Row b goes to microbatch b % A: the reshape to (B/A, A) splits no device's block,
    where (A, B/A) would gather the batch.
    """
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), tree)


def accumulate(gradient: Callable, parts: Any, count: int) -> tuple[Any, Any]:
    """The mean gradient over microbatches, one at a time, and what each had beside it, stacked."""
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


def validate_batch(
    params, reference, batch: PairBatch, weights: PerPair, key: Key[Array, ""], *, setup: Setup
) -> dict[str, jax.Array]:
    """Weighted sums over pairs: `loss`, `implicit_accuracy` and `weight`."""
    setup = setup._replace(needs_rejected=True)  # accuracy compares the two images
    noised = noise_batch(key, batch, setup)
    predictions = predict_both(params, reference, noised, batch.condition, setup)
    losses = pair_losses(*predictions, noised, batch.preference, setup)
    seen = (*predictions, noised.target, batch.preference, noised.timesteps, losses)
    right = health.correct(health.by_pair(*seen))
    return {
        "loss": (losses * weights).sum(),
        "implicit_accuracy": (right * weights).sum(),
        "weight": weights.sum(),
    }


def on_mesh(setup: Setup, mesh: Mesh | None) -> Setup:
    """The same, each device predicting its own rows."""
    return setup._replace(predict=placement.over_rows(setup.predict, mesh))


def jit_train_step(setup: Setup, shardings: Any = None):
    """`train_step` compiled for the mesh of `shardings`, those of the state, which is donated.

    Without shardings, for wherever its arguments lie.
    """
    mesh = None if shardings is None else jax.tree.leaves(shardings)[0].mesh
    return jax.jit(
        functools.partial(train_step, setup=on_mesh(setup, mesh)),
        donate_argnums=0,
        # Of the metrics too: every process reads them whole.
        out_shardings=None if mesh is None else (shardings, meshes.replicated(mesh)),
        compiler_options=COMPILER_OPTIONS,
    )
