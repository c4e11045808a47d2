"""A probe: the first updates of a run, at another beta and another rate, by one compiled step."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dmpo_jax.errors import UserError
from dmpo_jax.parallel import meshes
from dmpo_jax.training import health, optim, step
from dmpo_jax.training.build import Params, StepSettings, TrainingStep
from dmpo_jax.types import PairBatch

ENOUGH = 200  # pairs behind a 95 % quantile


class Probe(NamedTuple):
    """What a probe measured.

    rate: factor on the config's learning rate. summed: of the learning rates up to each update, in
    units of the config's peak. pairs: `health.by_pair` of each update.
    """

    beta: float
    rate: float
    summed: Float[np.ndarray, " N"]
    pairs: Float[np.ndarray, "N 8 B"]

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.pairs).all())

    def end(self) -> "Probe":
        """Returns the last quarter of the updates, or so many that there are ENOUGH pairs."""
        updates, _, pairs = self.pairs.shape
        kept = min(max(updates // 4, -(-ENOUGH // pairs)), updates)
        return self._replace(summed=self.summed[-kept:], pairs=self.pairs[-kept:])

    def rows(self) -> dict[str, np.ndarray]:
        """Returns {field of `health.FIELDS`: float64 [N, B]}."""
        return dict(zip(health.FIELDS, np.moveaxis(self.pairs.astype(np.float64), 1, 0)))  # noqa: B905


Prober = Callable[[float, float], Probe]  # (beta, rate) -> Probe


def summed_rate(built: TrainingStep, steps: int) -> float:
    """Returns the sum of a run's learning rates, in units of the peak.

    With a moving reference, of the updates that it lags behind alone: margins are those updates'.
    """
    moving = built.settings.moving
    if moving is not None and moving.decay < 1:
        steps = min(steps, round(moving.every / (1 - moving.decay)))
    return float(_rates(built.learning_rate, steps).sum() / built.settings.rate.peak)


def make_prober(
    built: TrainingStep,
    params: Params,
    batches: Callable[[], Iterator[PairBatch]],
    key: jax.Array,
    updates: int,
) -> Prober:
    """Returns a function that runs probes; every one begins with `params`, on the same batches.

    The step is the run's, but for three things: beta and rate are arguments, so that it compiles
    once; the warmup takes at most a quarter of the updates, and the rate then stays at its peak;
    and no moving average is kept. A copy of `params` waits in host memory, this process's shards of
    them; nothing is written.

    Args:
        built: of an objective with a beta. params: those to train, from `build`; emptied.
        batches: makes an iterator over this process's rows from the first update on.
        key: the run's.
    """
    settings, size = built.settings, built.settings.batch_size
    built = built._replace(setup=built.setup._replace(ema_decay=0.0))
    schedule = probe_schedule(settings, updates)
    summed = np.cumsum(_rates(schedule, updates)) / settings.rate.peak
    placed = jax.device_put(params, meshes.parameter_sharding(built.mesh, params))
    params.clear()
    restore = keep(placed)
    del placed
    update: Any = None

    def probe(beta: float, rate: float) -> Probe:
        nonlocal update
        state = built.make_state(restore())
        update = update or make_update(built, state, schedule)
        found, given = [], (np.float32(beta), np.float32(rate))
        rows = batches()
        for _ in range(updates):
            batch = meshes.shard_batch(next(rows), built.batch_sharding(), size)
            state, metrics = update(state, built.reference, batch, key, *given)
            found.append(metrics["pairs"])
        if (close := getattr(rows, "close", None)) is not None:
            close()
        return Probe(beta, rate, summed * rate, np.stack(jax.device_get(found)))

    return probe


def probe_schedule(settings: StepSettings, updates: int) -> Callable[[Any], jax.Array]:
    """Returns the learning rate of a probe by update: a short warmup, then the run's peak."""
    warmup = min(settings.rate.warmup_steps, updates // 4)
    return optim.make_learning_rate(
        peak=settings.rate.peak, warmup_steps=warmup, total_steps=updates, schedule="constant"
    )


def make_update(
    built: TrainingStep, state: step.TrainState, schedule: Callable[[Any], jax.Array]
) -> Any:
    """Returns the jitted update, (state, reference, batch, key, beta, rate) -> (state, metrics).

    It is jitted for this state's shardings; the state is donated.
    """
    settings, setup = built.settings, step.on_mesh(built.setup, built.mesh)
    others = {name: x for name, x in settings.hyperparameters.items() if name != "beta"}
    fn = settings.objective.fn

    def objective(policy, reference, target, preference, *, beta):
        # Not the objective itself, which takes Python numbers and checks them.
        return fn(policy, reference, target, preference.astype(jnp.float32), beta=beta, **others)

    def probe_step(state, reference, batch, key, beta, rate):
        tx = optim.make_optimizer(lambda count: rate * schedule(count), **settings.optimizer)
        asked = setup._replace(objective=functools.partial(objective, beta=beta), tx=tx)
        return step.train_step(state, reference, batch, key, setup=asked)

    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(
        probe_step,
        donate_argnums=0,
        out_shardings=(shardings, meshes.replicated(built.mesh)),
        compiler_options=step.COMPILER_OPTIONS,
    )


def keep(params: Params) -> Callable[[], Params]:
    """Copies arrays to host memory, this process's shards alone; returns what makes them again."""
    kept: dict[str, dict[str, np.ndarray]] = {path: {} for path in params}
    for path, x in params.items():
        for shard in x.addressable_shards:
            if str(shard.index) not in kept[path]:  # replicas are kept once
                kept[path][str(shard.index)] = np.array(shard.data)
    placed = {path: (x.shape, x.sharding) for path, x in params.items()}

    def restore() -> Params:
        # Copies again: an array may use the memory that it is made from, and a state is donated.
        return {
            path: jax.make_array_from_callback(
                *placed[path], lambda index, shards=shards: shards[str(index)].copy()
            )
            for path, shards in kept.items()
        }

    return restore


def _rates(schedule: Callable[[Any], jax.Array], updates: int) -> np.ndarray:
    return np.asarray(schedule(np.arange(updates)), np.float64)


def check_finite(probe: Probe) -> Probe:
    """Returns the probe; UserError if a loss or a margin of it is not finite."""
    if not probe.finite:
        raise UserError(
            f"the probe at beta={probe.beta:g} and {probe.rate:g} times the learning rate has "
            "numbers that are not finite: lower optimizer.learning_rate, or look for broken pairs"
        )
    return probe
