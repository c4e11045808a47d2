"""One run of the digits comparison: trains a trial, draws images and has them judged."""

import contextlib
import functools
import io
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from benchmarks.study.digits_plan import HELD_OUT_IMAGES, TUNING_IMAGES, Budget, Trial
from dmpo_jax import diffusers_io
from dmpo_jax.config import configs
from dmpo_jax.config.files import load_config
from dmpo_jax.data.batches import pipeline
from dmpo_jax.data.encoded import records
from dmpo_jax.data.prompt_files import load_texts
from dmpo_jax.jobs import train
from dmpo_jax.jobs.run import run as run_jobs
from dmpo_jax.models import parameters
from dmpo_jax.parallel import meshes
from dmpo_jax.sampling.sampler import make_sampler
from dmpo_jax.sampling.seeds import EVALUATED
from dmpo_jax.scoring import make_scorer
from dmpo_jax.training import health, step
from dmpo_jax.training.hooks import trained
from tests.support.encoded import write_pairs

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "digits_dmpo.py"
PROBABILITIES = "probabilities"  # folder
LAST = 10  # final updates whose metrics are averaged
NOISES = 8  # timesteps and noises per validation pair
HEALTH = ("implicit_accuracy", "margin", "chosen_gain", "rejected_gain")


def base_config(budget: Budget) -> configs.Config:
    """Returns the digits job's config at this budget."""
    config: configs.Config = load_config(str(CONFIG))
    config.train.steps, config.train.batch_size = budget.steps, budget.batch_size
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, budget.steps // 2)
    config.collect.pairs = budget.pairs
    return config


def trial_config(budget: Budget, trial: Trial, work: epath.Path) -> configs.Config:
    """Returns a trial's config. Its peak rate is 1: the trial's own is in the optimizer's state."""
    config = base_config(budget)
    config.objective, config.seed = trial.objective, trial.seed
    for name, value in trial.setting.hyperparameters.items():
        config.objectives[trial.objective][name] = value
    if trial.safeguard:
        config.safeguard.mu = trial.safeguard
    config.optimizer.learning_rate = 1.0
    folder = encoded_folder(work, trial.flipped, trial.seed)
    config.data.encoded = str(work / PROBABILITIES / "encoded" if trial.probabilities else folder)
    return config


def make_pairs(budget: Budget, work: epath.Path, *, probabilities: bool = False) -> None:
    """Collects and encodes pairs in `work`, by the project's own jobs, unless they exist.

    probabilities: the same images in a folder of their own, with the judge's probabilities.
    """
    config = base_config(budget)
    config.jobs = ("collect", "encode")
    if probabilities:
        config.collect.labels = "probability"
    run_jobs(config, work / PROBABILITIES if probabilities else work)


def encoded_folder(work: epath.Path, share: float, seed: int) -> epath.Path:
    return work / "flipped" / f"{share:g}_seed{seed}" if share else work / "encoded"


def flip_labels(work: epath.Path, share: float, seed: int) -> None:
    """Copies the encoded pairs with `share` of the training labels flipped, unless done before.

    Only decided pairs are flipped; ties, the validation split and the order stay. The seed
    determines the flipped pairs, and those of a smaller share are among those of a larger.
    """
    out = encoded_folder(work, share, seed)
    with contextlib.suppress(FileNotFoundError, records.IncompleteError):
        records.load_meta(out)
        return
    pairs = records.open_pairs(work / "encoded")
    splits = {}
    for split in records.SPLITS:
        source = pairs.split(split)
        splits[split] = [source[i] for i in range(len(source))]
    wrong = flipped_rows(np.array([p.preference for p in splits["train"]]), share, seed)
    for i in wrong:  # write_pairs puts the preferred image first
        splits["train"][i] = splits["train"][i]._replace(
            preference=1 - splits["train"][i].preference
        )
    prompts = [pairs.prompts[i] for i in range(pairs.meta.counts["prompts"])]
    meta = {k: v for k, v in pairs.meta.to_json().items() if k not in records.WRITTEN_META}
    write_pairs(out, splits, prompts, {**meta, "flipped_share": share})


def flipped_rows(preference: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Returns rows of `preference` `[N]` to flip: `share` of those that are not 0.5, rounded."""
    decided = np.flatnonzero(preference != 0.5)
    return np.random.default_rng(seed).permutation(decided)[: round(share * len(decided))]


def diversity(images: np.ndarray, prompts: Sequence[str]) -> float:
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


class Bench:
    """Trains and judges trials, one after another, on this process's devices.

    work: the folder that `make_pairs` and `flip_labels` filled. Compiled programs are kept:
    the sampler and the measure of health for all trials, the step for trials of one `program`.
    """

    def __init__(self, budget: Budget, work: epath.Path):
        self._budget, self._work = budget, work
        config = self._config = base_config(budget)
        dtype = config.model.compute_dtype
        loaded = diffusers_io.load_pipeline(config.model.folder, dtype=dtype)
        unet = diffusers_io.load_unet(loaded.folder, dtype=dtype)
        self._sampler = make_sampler(
            loaded,
            unet,
            steps=config.sample.steps,
            guidance_scale=config.sample.guidance_scale,
            batch_size=config.sample.batch_size,
        )
        everywhere = meshes.replicated(meshes.make_mesh())
        self._base = jax.device_put(parameters.split(unet)[1], everywhere)
        self._prompts = load_texts(config.sample.prompts)
        self._update: tuple[str, Any] = ("", None)
        self._health_program: Any = None

    def judge_base(self) -> dict[str, Any]:
        """Judges the untrained model on the tuning images and on the held-out ones."""
        tuning, held_out = (self._judge(self._base, tuning=tuning) for tuning in (True, False))
        return {"tuning": tuning, "held_out": held_out}

    def run(self, trial: Trial) -> dict[str, Any]:
        """Runs a trial; returns its result, JSON-serialisable, every number to 6 digits."""
        run, params, result = self._train(trial)
        result |= {"health": self._measure_health(run, params)}
        began = time.monotonic()
        result |= self._judge(params, tuning=trial.tuning)
        return {**result, "seconds_judging": _short(time.monotonic() - began)}

    def _train(self, trial: Trial) -> tuple[train.Run, dict[str, jax.Array], dict[str, Any]]:
        config = trial_config(self._budget, trial, self._work)
        run, params = train.prepare(config, self._work)
        setup = run.step.setup._replace(tx=rate_in_state(run.step.setup.tx))
        built = run.step._replace(setup=setup)
        run = run._replace(step=built)
        state = with_rate(built.make_state(params), trial.setting.rate, built.mesh)
        sharding, batches = built.batch_sharding(), run.batches()
        batch = meshes.shard_batch(next(batches), sharding, config.train.batch_size)
        began = time.monotonic()
        if self._update[0] != trial.program:
            jitted = built.make_update(state)
            compiled = jitted.lower(state, built.reference, batch, run.key).compile()
            self._update = (trial.program, compiled)
        update, compiling = self._update[1], time.monotonic() - began
        began, cpu = time.monotonic(), time.process_time()
        last: list[dict[str, jax.Array]] = []
        for _ in range(config.train.steps):
            state, metrics = update(state, built.reference, batch, run.key)
            last = [*last[1 - LAST :], metrics]
            batch = meshes.shard_batch(next(batches), sharding, config.train.batch_size)
        jax.block_until_ready(state)
        seconds, cpu = time.monotonic() - began, time.process_time() - cpu
        ends = [jax.device_get(metrics) for metrics in last]
        scalars = [name for name, value in ends[0].items() if np.ndim(value) == 0]
        means = {name: _short(np.mean([end[name] for end in ends])) for name in scalars}
        result = {
            "trial": trial_fields(trial),
            "seconds_training": _short(seconds),
            "cpu_seconds_training": _short(cpu),  # over all cores; other jobs add nothing
            "seconds_compiling": _short(compiling),
            "devices": built.mesh.size,
            "skipped": int(state.skipped),
            "last_updates": means,
        }
        return run, trained(state), result

    def _measure_health(self, run: train.Run, params: dict[str, jax.Array]) -> dict[str, float]:
        """Means of HEALTH over the validation split, whose labels are never flipped.

        Always at the same timesteps and noises, and against the base, also for objectives
        that need no reference.
        """
        pairs: Any = run.pairs
        shares = meshes.batch_shares(run.step.mesh)
        size = pairs.meta.counts["validation"] // shares * shares
        sharding = run.step.batch_sharding()
        rows = meshes.local_rows(sharding, size)
        local, _ = next(
            iter(pipeline.make_epoch(pairs, "validation", global_batch=size, rows=rows))
        )
        batch = meshes.shard_batch(local, sharding, size)
        program = self._health(run)
        found: dict[str, list[float]] = {name: [] for name in HEALTH}
        for i in range(NOISES):
            metrics = jax.device_get(program(params, self._base, batch, np.uint32(i)))
            for name in HEALTH:
                found[name].append(float(metrics[name]))
        return {name: _short(np.mean(values)) for name, values in found.items()}

    def _health(self, run: train.Run) -> Any:
        # Independent of the objective and the optimizer of the first run.
        if self._health_program is None:
            setup = run.step.setup._replace(needs_reference=True, needs_rejected=True)
            self._health_program = jax.jit(
                functools.partial(validation_health, setup=step.on_mesh(setup, run.step.mesh)),
                compiler_options=step.COMPILER_OPTIONS,
            )
        return self._health_program

    def _judge(self, params: dict[str, jax.Array], *, tuning: bool) -> dict[str, Any]:
        """Returns scores by both judges (means alone for tuning images) and the diversity."""
        count = self._budget.tuning_images if tuning else self._budget.images
        block = TUNING_IMAGES if tuning else HELD_OUT_IMAGES
        asked = [self._prompts[i % len(self._prompts)] for i in range(count)]
        seeds = [EVALUATED + block * 2**20 + i for i in range(count)]
        with contextlib.redirect_stderr(io.StringIO()):  # a bar per run would hide the overall one
            images = self._sampler(params, asked, seeds)
        scores = {}
        for name in self._config.evaluate.judges or ():
            values = make_scorer(name)(images, asked)
            scores[name] = _short(values.mean()) if tuning else [round(float(x), 4) for x in values]
        return {"scores": scores, "diversity": _short(diversity(images, asked))}


def validation_health(params, reference, batch, number, *, setup: step.Setup):
    """Computes `health.summary` of a validation batch under noise `number`."""
    noised = step.noise_batch(jax.random.key(number), batch, setup)
    predictions = step.predict_both(params, reference, noised, batch.condition, setup)
    compared = (*predictions, noised.target, batch.preference, noised.timesteps)
    # Losses differ in meaning between objectives and are ignored.
    return health.summary(health.by_pair(*compared, jnp.zeros_like(batch.preference)))


def rate_in_state(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Scales `tx`, made for a peak of 1, by a number in its state: one program for every rate.

    Exact if `tx` ends by scaling with the learning rate, as `optim.make_optimizer`'s do.
    """
    return optax.chain(tx, optax.inject_hyperparams(optax.scale)(step_size=1.0))


def with_rate(state: step.TrainState, rate: float, devices: jax.sharding.Mesh) -> step.TrainState:
    """Returns the state with that peak learning rate, for a step made with `rate_in_state`."""
    value = jax.device_put(jnp.float32(rate), meshes.replicated(devices))
    return state._replace(opt_state=optax.tree.set(state.opt_state, step_size=value))


def trial_fields(trial: Trial) -> dict[str, Any]:
    """Returns a trial's fields, JSON-serialisable."""
    return {
        "objective": trial.objective,
        "hyperparameters": trial.setting.hyperparameters,
        "rate": trial.setting.rate,
        "seed": trial.seed,
        "flipped": trial.flipped,
        "safeguard": trial.safeguard,
        "probabilities": trial.probabilities,
        "tuning": trial.tuning,
    }


def _short(value: Any) -> float:
    return float(f"{float(value):.6g}")
