"""The loop around `step.train_step`: reads metrics one step late and calls hooks between steps."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from etils import epath
from jax.profiler import StepTraceAnnotation
from jaxtyping import Array, Key

from dmpo_jax.parallel import layouts, meshes
from dmpo_jax.progress import Progress
from dmpo_jax.training.alarms import Alarms, Run
from dmpo_jax.training.build import StepSettings, TrainingStep, make_curves
from dmpo_jax.training.hooks import Hook, Profile, as_hook
from dmpo_jax.training.metrics import MetricsWriter
from dmpo_jax.training.run_page import About, RunPage
from dmpo_jax.training.step import TrainState
from dmpo_jax.training.stopping import Stopping, Watchdog
from dmpo_jax.training.telemetry import Cost, Watch
from dmpo_jax.types import PairBatch

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """Settings of a training loop.

    steps: total number of updates. every: updates between two lines of metrics.
    skip_limit: updates that may have a non-finite loss or gradient.
    hang_limit: seconds an update may take; 0 is no limit. profile: (first, last) update to trace.
    stop_on_alarm: ends the run, once it has saved, after an alarm.
    wandb: a project; "" is none. title: of the progress bar.
    page: facts for the run's page; None writes none.
    """

    steps: int
    every: int = 10
    skip_limit: int = 0
    hang_limit: float | int = 0
    stop_on_alarm: bool = False
    profile: tuple[int, int] | None = None
    tensorboard: bool = True
    wandb: str = ""
    title: str = "training"
    page: About | None = None


def run_loop(
    built: TrainingStep,
    state: TrainState,
    batches: Iterator[PairBatch],
    key: Key[Array, ""],
    hooks: Sequence[Any],
    settings: LoopSettings,
    *,
    workdir: epath.Path,
    cost: Cost,
) -> TrainState:
    """Trains from the state's update to the last one; returns the final state.

    Args:
        batches: this process's rows, from the state's update on. Closed at the end.
        hooks: see `hooks.HookLike`; called in this order, after a trace's start or end.
        workdir: receives metrics and traces. cost: of a pair, for throughput.

    Raises:
        NonFiniteError: more updates than `skip_limit` were not finite; names the last.
        SystemExit: stopped by a signal or an alarm, after the hooks' background work has ended.
    """
    start, total = int(state.step), settings.steps
    profile, sharding = Profile(settings.profile, workdir / "profile"), built.batch_sharding()
    known = [profile, *map(as_hook, hooks)]
    watch = make_watch(built, settings, start, cost)
    pages = make_page(settings, workdir, start, watch)
    LOG.info("%s", built.settings.describe_rate())
    with (
        profile.trace,
        MetricsWriter(
            workdir,
            tensorboard=settings.tensorboard,
            wandb=settings.wandb or None,
            resume_step=start,
            sinks=pages,
        ) as writer,
        contextlib.ExitStack() as closing,  # hooks end while their images can still be written
        Progress(total, start, settings.title) as progress,
        Stopping() as stop,
        Watchdog(settings.hang_limit) as watchdog,
    ):
        closing.callback(watch.alarms.close)
        for page in pages:
            closing.push(page.ended)
        for hook in known:
            hook.attach(writer)
            closing.callback(hook.close)
        watch.alarms.replay(workdir, start)  # the writer has dropped later rows
        if start == 0:
            call([hook for hook in known if hook.at_start], state, 0, watch, writer, progress)
        update, unread = built.make_update(state), None  # the last update's number and metrics
        for number in range(start + 1, total + 1):
            watchdog.alive(f"update {number}", slow=number == start + 1)
            with watch.timed("input"):
                batch = meshes.shard_batch(next(batches), sharding, built.settings.batch_size)
            if number == start + 1:  # all batches have the same shapes
                with progress.doing("compiling the step"):
                    update = watch.compile(update, state, built.reference, batch, key)
            with jax.transfer_guard("disallow"), StepTraceAnnotation("train", step_num=number):
                state, measured = update(state, built.reference, batch, key)
            if unread is not None:
                watch.report(*unread, writer, progress)
            unread = (number, measured)
            alarmed = settings.stop_on_alarm and watch.alarms.asked()
            stopping = stop.asked(number) or alarmed
            for hook in known:
                hook.poll()
            due = [hook for hook in known if hook.due(number, total=total, stopping=stopping)]
            if due:
                watchdog.alive(f"what follows update {number}", slow=True)
                watch.report(*unread, writer, progress)  # a non-finite update ends the job here
                unread = None
                call(due, state, number, watch, writer, progress)
            if stopping and number < total:
                for hook in known:
                    hook.wait()
                stop.leave(number, alarm=alarmed)
    if (close := getattr(batches, "close", None)) is not None:
        close()
    return state


def start_state(built: TrainingStep, params: dict[str, Any], checkpoints: Any) -> TrainState:
    """Returns the state of the newest valid checkpoint, or else the first state of `params`.

    params: emptied: the state owns them now, or restoring needs their memory.
    """
    wanted = built.abstract_state(params)
    fresh: Any = None if checkpoints.steps() else built.make_state(params)
    params.clear()
    start, state = checkpoints.restore(wanted) or (0, fresh)
    state = layouts.arrange(state, built.mesh, donate=True)  # restored in the default order
    if start:
        LOG.info("resuming from step %d", start)
    return state


def make_watch(built: TrainingStep, settings: LoopSettings, start: int, cost: Cost) -> Watch:
    """Returns the run's telemetry."""
    return Watch(
        start,
        total=settings.steps,
        batch_size=built.settings.batch_size,
        every=settings.every,
        skip_limit=settings.skip_limit,
        learning_rate=built.learning_rate,
        cost=cost,
        curves=make_curves(built.settings, built.setup),
        alarms=Alarms(make_alarm_run(built.settings, settings.steps)),
    )


def make_page(
    settings: LoopSettings, workdir: epath.Path, start: int, watch: Watch
) -> list[RunPage]:
    """Returns the run's page, or [] if it has none."""
    if settings.page is None:
        return []
    page = RunPage(
        workdir,
        settings.page,
        total=settings.steps,
        resume_step=start,
        alarms=lambda: watch.alarms.raised,
    )
    LOG.info("the run's page, rewritten as training goes: %s", page.path)
    return [page]


def make_alarm_run(settings: StepSettings, total: int) -> Run:
    """Returns what alarms know of a run of `total` updates beside its curves."""
    given, moving = settings.hyperparameters, settings.moving
    return Run(
        total=total,
        batch_size=settings.batch_size,
        warmup=settings.rate.warmup_steps,
        beta=f"objectives.{settings.objective.name}.beta" if "beta" in given else "",
        moving=None if moving is None else (moving.decay, moving.every),
        clip_norm=settings.optimizer.get("clip_norm", 0.0),
    )


def call(
    hooks: Sequence[Hook],
    state: TrainState,
    update: int,
    watch: Watch,
    writer: MetricsWriter,
    progress: Progress,
) -> None:
    """Calls hooks in order, timed by name; writes and logs the scalars that they return."""
    for hook in hooks:
        with progress.doing(hook.name), watch.timed(hook.name):
            if scalars := hook(state, update):
                writer.write(update, {**scalars, **watch.alarms.add(update, scalars)})
                words = ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in scalars.items())
                LOG.info("step %d: %s", update, words)
