"""Periodic work of a training run: validation, image grids, checkpoints, traces, custom hooks.

The loop receives its hooks and does not know what they do. A custom hook is any object with
`name`, `every` and `__call__(state, update)`; `Hook` is a base class for one:

    class Score(Hook):
        name, every = "score", 500

        def __call__(self, state, update):
            return {"score": my_score(state.params)}
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Key

from dmpo_jax.data.batches import pipeline
from dmpo_jax.parallel import meshes
from dmpo_jax.training.background import CLOSE_SECONDS, Background
from dmpo_jax.training.build import TrainingStep
from dmpo_jax.training.metrics import MetricsWriter
from dmpo_jax.training.step import TrainState, with_moving
from dmpo_jax.training.trace import Trace

Scalars = Mapping[str, float] | None

LOG = logging.getLogger(__name__)


@runtime_checkable
class HookLike(Protocol):
    """Interface that the loop requires of a hook.

    name: its time is logged as `seconds_NAME` and excluded from throughput. every: updates
    between two calls; 0 is never. Called with the state after an update and the update's number;
    scalars that it returns are written to the run's metrics.
    """

    name: str
    every: int

    def __call__(self, state: TrainState, update: int) -> Scalars: ...


class Hook:
    """A hook that is due at every `every`-th update.

    at_start: also before the first update of a fresh run. at_end: also after the last one.
    when_stopping: False if it must not run when training stops early after this update.
    """

    name = "hook"
    every = 0
    at_start = at_end = False
    when_stopping = True

    def due(self, update: int, *, total: int, stopping: bool) -> bool:
        """True if it must be called after this update."""
        asked = is_multiple(update, self.every) or (self.at_end and update == total)
        return asked and (self.when_stopping or not stopping)

    def attach(self, writer: MetricsWriter) -> None:
        """Called once before the first update, with what takes the run's scalars and images."""

    def poll(self) -> None:
        """Called after every update; raises background failures since the last call."""

    def wait(self) -> None:
        """Waits for the hook's background work to end."""

    def close(self) -> None:
        """Called once at the end of the run, however it ends; must return within a minute."""

    def __call__(self, state: TrainState, update: int) -> Scalars:
        raise NotImplementedError


class Adapted(Hook):
    """A custom hook, completed by the defaults of `Hook`."""

    def __init__(self, hook: HookLike):
        self._hook, self.name, self.every = hook, hook.name, hook.every

    def __call__(self, state: TrainState, update: int) -> Scalars:
        return self._hook(state, update)


def as_hook(hook: Any) -> Hook:
    """Converts a hook-like object to a `Hook`.

    Raises:
        TypeError: it lacks `name`, `every` or `__call__`.
    """
    if isinstance(hook, Hook):
        return hook
    missing = [x for x in ("name", "every", "__call__") if not hasattr(hook, x)]
    if missing:
        raise TypeError(
            f"a hook needs a name, every and a call (state, update), but {hook!r} has no "
            f"{' and no '.join(missing)}"
        )
    return Adapted(hook)


class Validate(Hook):
    """Measures loss and implicit accuracy on the validation split, always under the same noise.

    batch_size: pairs at a time; the noise does not depend on it. key: the run's.
    """

    name = "validation"

    def __init__(
        self, built: TrainingStep, pairs: Any, key: Key[Array, ""], *, batch_size: int, every: int
    ):
        self.every = every
        self._built, self._pairs, self._size = built, pairs, batch_size
        self._sharding = built.batch_sharding()
        self._rows = meshes.local_rows(self._sharding, batch_size)
        self._one = built.make_validate()
        # Differs from every step's key, so that validation never uses training's noise.
        self._key = jax.random.fold_in(key, 2**31)

    def __call__(self, state: TrainState, update: int) -> Scalars:
        return self.measure(trained(state), state.moving)

    def measure(self, params: Any, moving: Any = None) -> dict[str, float]:
        """Returns the means over the split, and its number of pairs.

        For these parameters, and this moving reference.
        """
        reference = with_moving(self._built.reference, moving)
        totals: dict[str, float] = {}
        epoch = pipeline.make_epoch(
            self._pairs,
            "validation",
            global_batch=self._size,
            rows=self._rows,
            sizes=self._built.settings.sizes,
        )
        for i, local in enumerate(epoch):
            numbers = np.asarray(i * self._size + self._rows, np.int32)
            given = meshes.shard_batch((*local, numbers), self._sharding, self._size)
            sums = self._one(params, reference, *given, self._key)
            for name, value in jax.device_get(sums).items():
                totals[name] = totals.get(name, 0.0) + float(value)
        weight = totals.pop("weight")
        means = {f"validation_{name}": value / weight for name, value in totals.items()}
        return {**means, "validation_pairs": weight}


class Draw(Hook):
    """Draws image grids at the start, at every `every`-th update and at the end.

    A grid that cannot be drawn or written is a warning: it must not end a run.

    draw: (all parameters of the policy, update) -> a function that writes the grid and returns
        it. It needs no device and is called in a thread.
    """

    name = "sampling"
    at_start = at_end = True
    when_stopping = False

    def __init__(
        self, built: TrainingStep, draw: Callable[[Any, int], Callable[[], Any]], *, every: int
    ):
        self.every, self._built, self._draw = every, built, draw
        self._background = Background("an image grid", size=4)
        self._writer: MetricsWriter | None = None

    def attach(self, writer: MetricsWriter) -> None:
        self._writer = writer

    def __call__(self, state: TrainState, update: int) -> Scalars:
        try:
            write = self._draw(self._built.policy(trained(state)), update)
        except Exception as error:  # the model's, the sampler's or a file's
            LOG.warning("no image grid at step %d: %s: %s", update, type(error).__name__, error)
            return
        self._background.call(self._write, write, update)

    def _write(self, write: Callable[[], Any], update: int) -> None:
        grid = write()
        if self._writer is not None:
            self._writer.image(update, "samples", grid)

    def close(self) -> None:
        self._background.close(time.monotonic() + CLOSE_SECONDS)


class Save(Hook):
    """Saves checkpoints at every `every`-th update, at the end, and before the run is stopped."""

    name = "checkpoint"
    at_end = True

    def __init__(self, checkpoints: Any, *, every: int):
        self.every, self._checkpoints = every, checkpoints

    def due(self, update: int, *, total: int, stopping: bool) -> bool:
        return stopping or super().due(update, total=total, stopping=stopping)

    def poll(self) -> None:
        self._checkpoints.check()

    def wait(self) -> None:
        self._checkpoints.wait()

    def __call__(self, state: TrainState, update: int) -> Scalars:
        self._checkpoints.save(update, state)


class Profile(Hook):
    """Traces the updates `steps` (first, last) with JAX's profiler, into a folder."""

    name = "profile"

    def __init__(self, steps: tuple[int, int] | None, folder: epath.Path):
        self.trace = Trace(steps, folder)

    def due(self, update: int, *, total: int, stopping: bool) -> bool:
        return self.trace.due(update)

    def __call__(self, state: TrainState, update: int) -> Scalars:
        self.trace.switch()


def standard(
    built: TrainingStep,
    pairs: Any,
    key: Key[Array, ""],
    checkpoints: Any,
    validate_every: int,
    checkpoint_every: int,
) -> list[Hook]:
    """Returns every run's own hooks: validation, if there is a split for it, and checkpoints."""
    found: list[Hook] = []
    if validate_every and "validation" in pairs.meta.counts:
        size = built.settings.batch_size // built.settings.accumulation
        found.append(Validate(built, pairs, key, batch_size=size, every=validate_every))
    elif validate_every:
        LOG.warning("the encoded pairs have no validation split: nothing is validated")
    return [*found, Save(checkpoints, every=checkpoint_every)]


def trained(state: TrainState) -> dict[str, jax.Array]:
    """Returns the result of a run: the moving average if one is kept, else the parameters."""
    return state.params if state.ema is None else state.ema


def is_multiple(update: int, every: int) -> bool:
    return every > 0 and update % every == 0
