"""One run of the comparison: trains a trial, draws images with it and has them judged."""

import contextlib
import dataclasses
import functools
import io
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jaxtyping import Float

from benchmarks.study.trials import (
    HELD_OUT_IMAGES,
    SPACES,
    TASKS,
    TUNING_IMAGES,
    Budget,
    Task,
    Trial,
    branches,
    short,
)
from dmpo_jax.config import arguments, configs
from dmpo_jax.config.files import load_config
from dmpo_jax.data.batches import pipeline
from dmpo_jax.data.encoded import records
from dmpo_jax.data.prompt_files import load_texts
from dmpo_jax.jobs import train
from dmpo_jax.jobs.run import run as run_jobs
from dmpo_jax.objectives import OBJECTIVES, Anchor
from dmpo_jax.objectives.anchor import ANCHORS
from dmpo_jax.sampling.sampler import Sampler, load_params, open_sampler
from dmpo_jax.sampling.seeds import EVALUATED
from dmpo_jax.scoring import make_scorer
from dmpo_jax.training import alarms, health, step
from dmpo_jax.training.build import StepSettings, make_curves
from dmpo_jax.training.hooks import trained
from dmpo_jax.training.loop import make_alarm_run
from dmpo_jax.types import PairBatch

LAST = 20  # final updates whose curves are averaged
CURVES = ("implicit_accuracy", "saturation", "past_optimum", "logit_p50", "logit_p95", "safeguard")
NOISES = 8  # timesteps and noises per validation pair
HEALTH = ("implicit_accuracy", "margin", "chosen_gain", "rejected_gain")


def base_config(task: Task, budget: Budget) -> configs.Config:
    """Returns the config of a task's own job at this budget, with the judge's probabilities."""
    config: configs.Config = load_config(str(task.config))
    config.train.steps, config.train.batch_size = budget.steps[task.name], budget.batch_size
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, config.train.steps // 2)
    config.collect.pairs, config.collect.labels = budget.pairs, "probability"
    config.mesh.cpu_devices = 1
    return config


def make_pairs(task: Task, budget: Budget, work: epath.Path) -> None:
    """Collects and encodes a task's pairs, by the project's own jobs, unless they exist."""
    config = base_config(task, budget)
    config.jobs = ("collect", "encode")
    run_jobs(config, work / task.name)


def program_config(trial: Trial, budget: Budget, work: epath.Path) -> configs.Config:
    """Returns the config of a trial's program, whose numbers are given to each update instead."""
    config = base_config(TASKS[trial.task], budget)
    if trial.mu:
        config.safeguard.mu = trial.mu
    if trial.moving:
        config.reference.decay, config.reference.every = trial.moving
    config.optimizer.learning_rate = 1.0  # the trial's own is given to the update
    config.data.encoded = str(work / trial.task / "encoded")
    return config


def draw_labels(
    probability: Float[np.ndarray, " N"], trial: Trial
) -> tuple[np.ndarray, Float[np.ndarray, " N"]]:
    """Returns the labels that a trial is trained with, drawn by its seed.

    probability: that image 0 is preferred, by the judge.

    Returns:
        (swap, preference): pairs whose image 1 is preferred, and the label, at least 1/2, after
        the swap. "drawn": one choice by the probability, of which `flipped` are then turned
        round. "votes": the share of K choices. "probability": itself.
    """
    rng = np.random.default_rng([trial.seed, 1])
    if trial.labels == "probability":
        first = probability
    else:
        votes = int(trial.labels.removeprefix("votes") or 1) if trial.labels != "drawn" else 1
        first = rng.binomial(votes, probability) / votes
    wrong = rng.permutation(len(first))[: round(trial.flipped * len(first))]
    first = first.copy()
    first[wrong] = 1 - first[wrong]
    return first < 0.5, np.maximum(first, 1 - first).astype(np.float32)


def relabelled(pairs: PairBatch, swap: np.ndarray, preference: np.ndarray) -> PairBatch:
    """Returns pairs with the preferred image first."""

    def turn(x):
        return np.where(swap.reshape(-1, *[1] * (x.ndim - 1)), x[:, ::-1], x)

    images = {
        name: turn(x)
        for name in pairs.condition.PER_IMAGE
        if (x := getattr(pairs.condition, name)) is not None
    }
    condition = pairs.condition._replace(**images)
    moments: Any = turn(pairs.moments)
    label: Any = preference
    return PairBatch(moments, label, condition)


def batches(pairs: PairBatch, size: int, seed: int) -> Iterator[PairBatch]:
    """Yields batches without end, each epoch in an order of its own."""
    rng, count = np.random.default_rng([seed, 2]), len(pairs.preference)
    rows = np.empty(0, int)
    while True:
        if len(rows) < size:
            rows = np.concatenate([rows, rng.permutation(count)])
        now, rows = rows[:size], rows[size:]
        yield jax.tree.map(lambda x, now=now: x[now], pairs)


def diversity(images: np.ndarray, prompts: list[str]) -> float:
    """Mean distance between two images of one caption: root mean square over pixels in [0, 1].

    images: uint8 `[N, H, W, 3]`. NaN if no caption has two images.
    """
    pixels = images.reshape(len(images), -1).astype(np.float64) / 255
    means = []
    for prompt in dict.fromkeys(prompts):
        x = pixels[[i for i, p in enumerate(prompts) if p == prompt]]
        square = np.square(x).sum(1)
        apart = np.maximum(square[:, None] + square - 2 * x @ x.T, 0) / x.shape[1]
        if len(x) > 1:
            means.append(np.sqrt(apart)[np.triu_indices(len(x), 1)].mean())
    return float(np.mean(means)) if means else float("nan")


class Program:
    """An update whose objective and numbers are arguments: compiled once for many trials.

    Each objective is a branch, so that the model's passes are compiled once for all. Those that
    need no reference are given one all the same, which changes nothing but time.
    """

    def __init__(self, trial: Trial, config: configs.Config, work: epath.Path):
        self.config = config
        self.run, params = train.prepare(config, work)
        self._params = jax.device_get(params)
        self._jitted = jax.jit(
            self._update, donate_argnums=1, compiler_options=step.COMPILER_OPTIONS
        )

    def __call__(self, trial: Trial, *arguments: Any) -> Any:
        return self._jitted(numbers_of(trial), *arguments)

    def state(self) -> step.TrainState:
        """Returns the state before the first update."""
        setup = self.run.step.setup
        tx = optax.chain(setup.tx, optax.scale(1.0))
        params = jax.tree.map(jnp.asarray, self._params)
        return step.make_state(params, tx, moving=setup.moving is not None)

    def _update(self, numbers, state, reference, batch, key):
        setup = self.run.step.setup
        if setup.moving is not None:
            setup = setup._replace(moving=step.Moving(numbers["decay"], numbers["every"]))
        setup = setup._replace(
            objective=functools.partial(any_objective, numbers),
            needs_reference=True,
            needs_rejected=True,
            # Exact, since the optimizer ends by scaling with the learning rate, whose peak is 1.
            tx=optax.chain(setup.tx, optax.scale(numbers["rate"])),
        )
        return step.train_step(state, reference, batch, key, setup=setup)


# What objectives branch on before compiling: all of their hyperparameters but beta.
Branch = tuple[str, tuple[tuple[str, float], ...]]
BRANCHES: list[Branch] = sorted({branch for name in SPACES for branch in branches(name)})


def branch_of(trial: Trial) -> Branch:
    constant = [(k, v) for k, v in trial.setting if k not in ("beta", "rate")]
    return trial.objective, tuple(sorted(constant))


def numbers_of(trial: Trial) -> dict[str, Any]:
    """Returns a trial's part of the arguments of a program."""
    given = dict(trial.setting)
    decay, every = trial.moving or (1.0, 1)
    kind, share = trial.anchor or ("", 0.0)
    beta = given.get("beta", 1.0)
    weights = {one: np.float32((one == kind) * share * beta) for one in ANCHORS}
    return {
        "branch": np.int32(BRANCHES.index(branch_of(trial))),
        "beta": np.float32(beta),
        "rate": np.float32(given["rate"]),
        "decay": np.float32(decay),
        "every": np.int32(every),
        **weights,
    }


def any_objective(numbers: dict[str, Any], policy, reference, target, preference):
    """Computes the losses of the objective that `numbers` names, with its anchor."""
    given = policy, reference, target, preference.astype(jnp.float32)

    def branch(name: str, constant: tuple[tuple[str, float], ...]) -> Any:
        objective = OBJECTIVES[name]
        values: dict[str, Any] = dict(constant)
        if "beta" in objective.hyperparameters:
            values["beta"] = numbers["beta"]
        return lambda: objective.fn(*given, **values).astype(jnp.float32)

    losses = jax.lax.switch(numbers["branch"], [branch(*one) for one in BRANCHES])
    return losses + sum(Anchor(kind, numbers[kind])(*given) for kind in ANCHORS)


@dataclasses.dataclass
class Ready:
    """All that the trials of a task share."""

    config: configs.Config
    pairs: PairBatch  # of training
    probability: np.ndarray
    validation: PairBatch
    sampler: Sampler
    base: dict[str, jax.Array]
    prompts: list[str]
    scorers: dict[str, Any]
    of_base: dict[int, dict[str, np.ndarray]]  # scores by judge, by block of image seeds
    measure: Any = None  # of health, compiled


class Bench:
    """Trains and judges trials, one after another, on this process's device.

    work: the folder that `make_pairs` filled. Compiled programs are kept.
    """

    def __init__(self, budget: Budget, work: epath.Path):
        self._budget, self._work = budget, work
        self._ready: dict[str, Ready] = {}
        self._programs: dict[str, Program] = {}

    def run(self, trial: Trial) -> dict[str, Any]:
        """Runs a trial; returns its result, JSON-serialisable, every number to 6 digits."""
        began, cpu = time.monotonic(), time.process_time()
        ready = self._open(trial.task)
        result: dict[str, Any] = {"trial": dataclasses.asdict(trial)}
        path = []
        params: Any = None
        for at, params, measured in self._train(trial, ready):
            if at < 1:
                judged = self._judge(ready, params, self._budget.path_images, HELD_OUT_IMAGES)
                path.append({"at": at, **judged, **measured})
            else:
                result |= measured
        block = TUNING_IMAGES if trial.tuning else HELD_OUT_IMAGES
        count = self._budget.tuning_images if trial.tuning else self._budget.images
        result |= self._judge(ready, params, count, block)
        if path:
            result["path"] = path
        result["seconds"] = short(time.monotonic() - began)
        result["cpu_seconds"] = short(time.process_time() - cpu)
        return result

    def base(self, task: str) -> dict[str, Any]:
        """Judges the untrained model on the tuning images and on the held-out ones."""
        ready, budget = self._open(task), self._budget
        tuning = self._judge(ready, ready.base, budget.tuning_images, TUNING_IMAGES)
        return {"tuning": tuning, **self._judge(ready, ready.base, budget.images, HELD_OUT_IMAGES)}

    def _open(self, task: str) -> Ready:
        if task in self._ready:
            return self._ready[task]
        config = base_config(TASKS[task], self._budget)
        pairs = records.open_pairs(self._work / task / "encoded")
        parts = {}
        for split in records.SPLITS:
            size = pairs.meta.counts[split]
            every = pipeline.make_epoch(pairs, split, global_batch=size, rows=range(size))
            parts[split] = next(iter(every))[0]
        sampler, _ = open_sampler(config.model.folder, **arguments.drawing(config))
        base = load_params(config.model.folder, variant=None, dtype="float32")
        ready = Ready(
            config,
            parts["train"],
            np.asarray(parts["train"].preference, np.float64),
            parts["validation"],
            sampler,
            base,
            list(load_texts(config.sample.prompts)),
            {name: make_scorer(name) for name in config.evaluate.judges or ()},
            {},
        )
        for block in (TUNING_IMAGES, HELD_OUT_IMAGES):
            count = max(self._budget.tuning_images, self._budget.images)
            ready.of_base[block] = self._scores(ready, base, count, block)[0]
        self._ready[task] = ready
        return ready

    def _train(self, trial: Trial, ready: Ready) -> Iterator[tuple[float, Any, dict[str, Any]]]:
        """Yields (share of the updates done, parameters, what was measured); the last share is 1.

        The shares before are those of a final run's path.
        """
        budget = self._budget
        if trial.program not in self._programs:
            config = program_config(trial, budget, self._work)
            self._programs[trial.program] = Program(trial, config, self._work)
        program = self._programs[trial.program]
        run, config, state = program.run, program.config, program.state()
        key = run.step.make_key(trial.seed)
        pairs = relabelled(ready.pairs, *draw_labels(ready.probability, trial))
        data = batches(pairs, budget.batch_size, trial.seed)
        settings = settings_of(trial, program)
        curves = make_curves(settings, run.step.setup)
        count = config.train.steps
        alarm = alarms.Alarms(make_alarm_run(settings, count))
        rows: list[dict[str, float]] = []
        shares = budget.path if trial.along and not (trial.tuning or trial.variant) else ()
        stops = {round(share * count): share for share in shares}
        for i in range(count):
            state, metrics = program(trial, state, run.step.reference, next(data), key)
            metrics = jax.device_get(metrics)
            row = {k: float(v) for k, v in metrics.items() if np.ndim(v) == 0}
            row |= curves.add(metrics["pairs"])
            row["learning_rate"] = trial.rate * float(run.step.learning_rate(i))
            alarm.add(i + 1, row)
            rows.append(row)
            if i + 1 in stops:
                params = run.step.policy(trained(state))
                yield stops[i + 1], params, self._health(run, ready, params)
        last = rows[-LAST:]
        measured = {
            "last": {k: short(np.mean([r[k] for r in last])) for k in CURVES if k in last[0]},
            "skipped": int(state.skipped),
            "alarms": {a.name: a.step for a in alarm.raised},
        }
        params = run.step.policy(trained(state))
        if not trial.tuning:  # a search looks at scores alone
            measured |= self._health(run, ready, params)
        yield 1.0, params, measured

    def _health(self, run: train.Run, ready: Ready, params: Any) -> dict[str, Any]:
        """Returns means of HEALTH and the distance from the base, over the validation split.

        Always at the same timesteps and noises, by the judge's own preference, and against the
        base, also for objectives that need no reference. distance: mean square of what the
        predictions differ by, over the base's mean squared error.
        """
        setup = run.step.setup._replace(needs_reference=True, needs_rejected=True)
        if ready.measure is None:
            measure = functools.partial(validation_health, setup=setup)
            ready.measure = jax.jit(measure, compiler_options=step.COMPILER_OPTIONS)
        found: dict[str, list[float]] = {}
        for i in range(NOISES):
            metrics = ready.measure(params, ready.base, ready.validation, np.uint32(i))
            for name, value in jax.device_get(metrics).items():
                found.setdefault(name, []).append(float(value))
        return {"health": {name: short(np.mean(values)) for name, values in found.items()}}

    def _scores(
        self, ready: Ready, params: Any, count: int, block: int
    ) -> tuple[dict[str, np.ndarray], float]:
        """Returns the scores of `count` images of a block of seeds by judge, and diversity."""
        asked = [ready.prompts[i % len(ready.prompts)] for i in range(count)]
        seeds = [EVALUATED + block * 2**20 + i for i in range(count)]
        with contextlib.redirect_stderr(io.StringIO()):  # a bar per run would hide the overall one
            images = ready.sampler(params, asked, seeds)
        scores = {n: np.asarray(s(images, asked), np.float64) for n, s in ready.scorers.items()}
        return scores, diversity(images, asked)

    def _judge(self, ready: Ready, params: Any, count: int, block: int) -> dict[str, Any]:
        """Returns mean scores, win rates against the base on the same seeds, and diversity."""
        scores, varied = self._scores(ready, params, count, block)
        base = {name: x[:count] for name, x in ready.of_base[block].items()}
        wins = {n: (s > base[n]).mean() + (s == base[n]).mean() / 2 for n, s in scores.items()}
        return {
            "scores": {name: short(x.mean()) for name, x in scores.items()},
            "wins": {name: short(x) for name, x in wins.items()},
            "diversity": short(varied),
        }


def settings_of(trial: Trial, program: Program) -> StepSettings:
    """Returns the step's settings as a config of the trial would give them."""
    return dataclasses.replace(
        program.run.step.settings,
        objective=OBJECTIVES[trial.objective],
        hyperparameters=trial.hyperparameters,
        moving=step.Moving(*trial.moving) if trial.moving else None,
    )


def validation_health(params, reference, batch, number, *, setup: step.Setup):
    """Computes HEALTH and the distance of a validation batch under noise `number`."""
    noised = step.noise_batch(jax.random.key(number), batch, setup)
    policy, base = step.predict_both(params, reference, noised, batch.condition, setup)
    assert base is not None
    # Losses differ in meaning between objectives and are ignored.
    none = jnp.zeros_like(batch.preference)
    by_pair = health.by_pair(policy, base, noised.target, batch.preference, noised.timesteps, none)
    found = health.summary(by_pair)
    distance = jnp.square(policy - base).mean() / jnp.square(base - noised.target).mean()
    return {**{name: found[name] for name in HEALTH}, "distance": distance}
