"""One optimisation step, the page to read first.

Letters as in `types`: B pairs, 2 images a pair, A microbatches.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from dmpo_jax import health
from dmpo_jax.noising import NoiseSchedule, noise_pair, sample_latents
from dmpo_jax.types import Conditioning, Noised, PairBatch, PerPair

# Without it XLA keeps bfloat16 intermediates of one forward in float32 and not of the
# other, and beta turns the difference into margins of policy against itself.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}


class TrainState(NamedTuple):
    """Everything a step changes. The reference is not in it: nothing can change it."""

    step: Int[Array, ""]
    params: dict[str, jax.Array]
    opt_state: Any
    skipped: Int[Array, ""]  # updates left out because loss or gradient was not finite


class Setup(NamedTuple):
    """What a step closes over: pure functions and Python numbers."""

    predict: Callable[..., jax.Array]  # (params, latents [N...], timesteps [N], conditioning)
    objective: Callable[..., PerPair]  # hyperparameters bound
    needs_reference: bool
    needs_rejected: bool
    schedule: NoiseSchedule
    scaling_factor: float
    tx: optax.GradientTransformation
    shift_factor: float = 0.0
    accumulation: int = 1


def make_state(params: dict[str, jax.Array], tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step, float32 master parameters."""
    # Copies: the state is donated, and what came in may be the reference too.
    params = {path: jnp.array(x, jnp.float32, copy=True) for path, x in params.items()}
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), jnp.zeros((), jnp.int32))


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
        reference: frozen parameters, not donated; None where the objective needs none.
        batch: the global batch. key: the run's; the step's own is folded in here.

    Returns:
        The next state, and float32 scalars. Where loss or gradient is not finite, the
        parameters and the optimizer stay as they were and `skipped` goes up by one.
    """
    noised = noise_batch(jax.random.fold_in(key, state.step), batch, setup)
    parts = microbatches((noised, batch.preference, batch.conditioning), setup.accumulation)

    def gradient(part):
        policy_loss = functools.partial(pair_loss, reference=reference, part=part, setup=setup)
        (_, metrics), gradient = jax.value_and_grad(policy_loss, has_aux=True)(state.params)
        return gradient, metrics

    grads, metrics = accumulate(gradient, parts, setup.accumulation)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
    updates, opt_state = setup.tx.update(grads, state.opt_state, state.params)
    moved = (optax.apply_updates(state.params, updates), opt_state)
    kept = (state.params, state.opt_state)
    params, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, kept)
    skipped = state.skipped + (1 - finite.astype(jnp.int32))
    metrics |= {"grad_norm": grad_norm, "skipped": skipped.astype(jnp.float32)}
    return TrainState(state.step + 1, params, opt_state, skipped), metrics


def pair_loss(params, reference, part, setup: Setup):
    """(mean loss, metrics) of some noised pairs; differentiable in params."""
    noised, preference, conditioning = part
    reference_prediction = None
    if setup.needs_reference:
        reference_prediction = jax.lax.stop_gradient(
            predict_pairs(setup.predict, reference, noised, conditioning)
        )
    policy_prediction = predict_pairs(setup.predict, params, noised, conditioning)
    compared = (policy_prediction, reference_prediction, noised.target, preference)
    loss = setup.objective(*compared).mean()
    metrics = health.preference_health(*jax.lax.stop_gradient(compared))
    return loss, {"loss": loss, **metrics}


def noise_batch(key: Key[Array, ""], batch: PairBatch, setup: Setup) -> Noised:
    """Latents drawn from the moments and noised, over the global batch."""
    latent_key, noise_key = jax.random.split(key)
    moments = batch.moments if setup.needs_rejected else batch.moments[:, :1]
    latents = sample_latents(
        latent_key,
        moments,
        scaling_factor=setup.scaling_factor,
        shift_factor=setup.shift_factor,
    )
    return noise_pair(noise_key, latents, setup.schedule)


def predict_pairs(predict, params, noised: Noised, conditioning: Conditioning):
    """The UNet over pairs: flattened B-major, so that a device keeps its rows."""
    b, n = noised.latents.shape[:2]

    def each_image(x):  # [B, ...] -> [B n, ...]
        return jnp.broadcast_to(x[:, None], (b, n, *x.shape[1:])).reshape(b * n, *x.shape[1:])

    context, pooled, time_ids, image = conditioning
    rows = Conditioning(
        each_image(context),
        None if pooled is None else each_image(pooled),
        None if time_ids is None else time_ids[:, :n].reshape(b * n, -1),
        None if image is None else each_image(image),
    )
    latents = noised.latents.reshape(b * n, *noised.latents.shape[2:])
    prediction = predict(params, latents, each_image(noised.timesteps), rows)
    return prediction.reshape(b, n, *prediction.shape[1:])


def microbatches(tree: Any, count: int) -> Any:
    """[B, ...] -> [A, B/A, ...], cut so that each device keeps its rows.

    Row b goes to microbatch b % A: the reshape to (B/A, A) splits no device's block,
    where (A, B/A) would gather the batch.
    """
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), tree)


def accumulate(gradient: Callable, parts: Any, count: int) -> tuple[Any, dict[str, jax.Array]]:
    """Mean gradient and metrics over microbatches, one at a time; exact in the mean."""
    if count == 1:
        return gradient(jax.tree.map(lambda x: x[0], parts))

    def add(total, part):
        grads, metrics = gradient(part)
        return jax.tree.map(jnp.add, total, grads), metrics

    shapes = jax.eval_shape(lambda p: gradient(jax.tree.map(lambda x: x[0], p))[0], parts)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, metrics = jax.lax.scan(add, zero, parts)
    reduced = {k: v.max() if k.endswith("_max") else v.mean() for k, v in metrics.items()}
    return jax.tree.map(lambda x: x / count, total), reduced


def validate_batch(
    params, reference, batch: PairBatch, weights: PerPair, key: Key[Array, ""], *, setup: Setup
) -> dict[str, jax.Array]:
    """Weighted sums over pairs: `loss`, `implicit_accuracy` and `weight`."""
    setup = setup._replace(needs_rejected=True)  # accuracy compares the two images
    noised = noise_batch(key, batch, setup)
    reference_prediction = None
    if setup.needs_reference:
        reference_prediction = predict_pairs(setup.predict, reference, noised, batch.conditioning)
    policy_prediction = predict_pairs(setup.predict, params, noised, batch.conditioning)
    compared = (policy_prediction, reference_prediction, noised.target)
    losses = setup.objective(*compared, batch.preference)
    right = health.correct(*compared, batch.preference)
    return {
        "loss": (losses * weights).sum(),
        "implicit_accuracy": (right * weights).sum(),
        "weight": weights.sum(),
    }


def jit_train_step(setup: Setup, shardings: Any = None):
    """`train_step` compiled for the mesh that its arguments lie on; the state is donated."""
    return jax.jit(
        functools.partial(train_step, setup=setup),
        donate_argnums=0,
        out_shardings=None if shardings is None else (shardings, None),
        compiler_options=COMPILER_OPTIONS,
    )
