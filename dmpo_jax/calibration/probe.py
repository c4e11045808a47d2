"""A probe: the first updates of a run, at another beta and another rate, by one compiled step."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dmpo_jax.errors import UserError
from dmpo_jax.parallel import layouts, meshes
from dmpo_jax.training import health, optim, step
from dmpo_jax.training.build import Params, StepSettings, TrainingStep
from dmpo_jax.types import PairBatch

ENOUGH = 200  # pairs behind a 95 % quantile


class Probe(NamedTuple):
    """The measurements of a probe.

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


def summed_rate(built: TrainingStep, steps: int) -> float:
    """Returns the sum of a run's learning rates, in units of the peak.

    With a moving reference, of the updates that it lags behind alone: margins are those updates'.
    """
    moving = built.settings.moving
    if moving is not None and moving.decay < 1:
        steps = min(steps, round(moving.every / (1 - moving.decay)))
    return float(run_rates(built, steps).sum() / built.settings.rate.peak)


def run_rates(built: TrainingStep, steps: int) -> Float[np.ndarray, " N"]:
    """Returns the learning rate of each update of a run."""
    return np.asarray(built.learning_rate(np.arange(steps)), np.float64)


class Prober:
    """Runs probes; every one begins with the same parameters, on the same batches.

    The step is the run's, but for two things: beta and the learning rate are arguments, so that it
    compiles once, and no moving average is kept. A copy of the parameters waits in host memory;
    nothing is written.

    Args:
        built: of an objective with a beta. params: those to train, from `build`; emptied.
        batches: makes an iterator over this process's rows from the first update on.
        key: the run's. updates: of a probe.
    """

    def __init__(
        self,
        built: TrainingStep,
        params: Params,
        batches: Callable[[], Iterator[PairBatch]],
        key: jax.Array,
        updates: int,
    ):
        self._built = built._replace(setup=built.setup._replace(ema_decay=0.0))
        self._batches, self._key = batches, key
        self._rates = probe_rates(built.settings, updates)
        placed = jax.device_put(params, meshes.parameter_sharding(built.mesh, params))
        params.clear()
        self._restore = keep(placed)
        self._update: Any = None

    def __call__(self, beta: float, rate: float) -> Probe:
        """Probes a beta at `rate` times the config's learning rate.

        The warmup takes at most a quarter of the updates, and the rate then stays at its peak.
        """
        return self.run(beta, rate * self._rates)._replace(rate=rate)

    def run(self, beta: float, rates: Float[np.ndarray, " N"]) -> Probe:
        """Makes an update at each of the learning rates. Of a run's own rates, it is that run."""
        built, found = self._built, []
        state = built.make_state(self._restore())
        self._update = self._update or make_update(built, state)
        rows = self._batches()
        for rate in np.float32(rates):
            batch = next(rows)
            batch = meshes.shard_batch(batch, built.batch_sharding(), built.settings.batch_size)
            given = batch, self._key, np.float32(beta), rate
            state, metrics = self._update(state, built.reference, *given)
            found.append(metrics["pairs"])
        if (close := getattr(rows, "close", None)) is not None:
            close()
        summed = np.cumsum(rates) / built.settings.rate.peak
        return Probe(beta, 1.0, summed, np.stack(jax.device_get(found)))


def probe_rates(settings: StepSettings, updates: int) -> Float[np.ndarray, " N"]:
    """Returns the learning rates of a probe: a short warmup, then the run's peak."""
    warmup = min(settings.rate.warmup_steps, updates // 4)
    return settings.rate.peak * np.minimum((np.arange(updates) + 1) / max(warmup, 1), 1.0)


def make_update(built: TrainingStep, state: step.TrainState) -> Any:
    """Returns the jitted update, (state, reference, batch, key, beta, rate) -> (state, metrics).

    It is jitted for this state's shardings and formats; the state is donated.
    """
    settings, setup = built.settings, step.on_mesh(built.setup, built.mesh)
    others = {name: x for name, x in settings.hyperparameters.items() if name != "beta"}
    fn = settings.objective.fn

    def objective(policy, reference, target, preference, *, beta):
        # Not the objective itself, which takes Python numbers and checks them.
        return fn(policy, reference, target, preference.astype(jnp.float32), beta=beta, **others)

    def probe_step(state, reference, batch, key, beta, rate):
        tx = optim.make_optimizer(lambda count: rate, **settings.optimizer)
        asked = setup._replace(objective=functools.partial(objective, beta=beta), tx=tx)
        return step.train_step(state, reference, batch, key, setup=asked)

    shardings = layouts.formats_of(state)
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


def check_finite(probe: Probe) -> Probe:
    """Returns the probe; UserError if a loss or a margin of it is not finite."""
    if not probe.finite:
        raise UserError(
            f"the probe at beta={probe.beta:g} and {probe.rate:g} times the learning rate has "
            "numbers that are not finite: lower optimizer.learning_rate, or look for broken pairs"
        )
    return probe
