"""Trains on encoded pairs: open, check, build, loop, export."""

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.config import checks as config_checks
from dmpo_jax.config import leaves as configs
from dmpo_jax.config import step_settings
from dmpo_jax.data.batches.mixture import Mixture
from dmpo_jax.data.encoded import folder as records
from dmpo_jax.jobs.convert import export
from dmpo_jax.parallel import mesh
from dmpo_jax.planning.flops import make_cost
from dmpo_jax.sampling.grids import data_prompts, make_draw
from dmpo_jax.sampling.sampler import load_prompts
from dmpo_jax.training import checkpoint, hooks
from dmpo_jax.training.build import TrainingStep, build
from dmpo_jax.training.loop import run_loop

LOG = logging.getLogger(__name__)


class Run(NamedTuple):
    """A run's config and data, its step, and its random key."""

    config: configs.Config
    pairs: records.EncodedPairs | Mixture
    step: TrainingStep
    key: jax.Array

    def batches(self, start: int = 0) -> Any:
        return hooks.make_batches(
            self.step, self.pairs, start=start, **step_settings.data_settings(self.config)
        )


def train(config: configs.Config, workdir: epath.Path, extra: Sequence[Any] = ()) -> None:
    """Trains to `config.train.steps`, resuming from the newest valid checkpoint in workdir.

    Writes metrics, checkpoints and sample grids as it goes, and `workdir/export` at the end.

    Args:
        extra: further hooks (`hooks.HookLike`), called after the run's own.

    Raises:
        ValueError: before compiling, where model, data, mesh or workdir do not fit.
        telemetry.NonFiniteError: naming the update; nothing of it was kept or saved.
        SystemExit: stopped by SIGTERM or Ctrl-C, after saving.
    """
    run, params = prepare(config, workdir)
    folder, identity = workdir / "checkpoints", configs.identity(config)
    with checkpoint.Checkpoints(folder, keep=config.log.keep, identity=identity) as checkpoints:
        if jax.process_index() == 0:  # only now: the folder is this run's own
            diffusers_io.write_json(workdir / "config.json", configs.leaves(config))
        wanted = run.step.abstract_state(params)
        fresh: Any = None if checkpoints.steps() else run.step.make_state(params)
        del params  # the state's own now, or in the way of what is restored
        start, state = checkpoints.restore(wanted) or (0, fresh)
        if start:
            LOG.info("going on from step %d in %s", start, folder)
        LOG.info("%s", run.step.settings.describe_rate())
        state = run_loop(
            run.step,
            state,
            run.batches(start),
            run.key,
            [*make_hooks(run, workdir, checkpoints), *extra],
            step_settings.read_loop(config),
            workdir=workdir,
            cost=make_cost(run.step),
        )
    export(config, workdir, int(state.step), hooks.trained(state))


def prepare(config: configs.Config, workdir: epath.Path) -> tuple[Run, dict[str, jax.Array]]:
    """Opens and checks everything; compiles nothing of the step.

    Returns the run, and the parameters to train: the model's, or its adapters.
    """
    settings = step_settings.read_step(config)
    devices = mesh.make_mesh(**step_settings.mesh_axes(config))
    mesh.check_batch(settings.batch_size, settings.accumulation, devices)
    pairs = open_pairs(config, workdir)
    folder, family = diffusers_io.load_family(config.model.folder)
    noise, _ = diffusers_io.load_schedule(folder)
    model = diffusers_io.load_unet(
        folder,
        variant=config.model.variant or None,
        dtype=settings.compute_dtype,
        param_dtype=settings.frozen_dtype if settings.lora else "float32",
        sharding=functools.partial(mesh.parameter_sharding, devices),
    )
    built, params = build(family, model, noise, pairs.meta, devices, settings)
    return Run(config, pairs, built, built.make_key(config.seed)), params


def open_pairs(config: configs.Config, workdir: epath.Path) -> records.EncodedPairs | Mixture:
    """The encoded pairs that a config names: one folder, or several by weight."""
    if not config.data.mix:
        return records.open_pairs(config.data.encoded or workdir / "encoded")
    folders, weights = zip(*config_checks.parse_mix(config.data.mix), strict=True)
    return Mixture([records.open_pairs(folder) for folder in folders], weights)


def make_hooks(run: Run, workdir: epath.Path, checkpoints: Any) -> list[hooks.Hook]:
    """The run's own hooks, in the order in which they are called."""
    log, size = run.config.log, run.config.train.batch_size // run.config.train.accumulation
    found: list[hooks.Hook] = [hooks.Save(checkpoints, every=log.checkpoint_every)]
    if log.validate_every and "validation" in run.pairs.meta.counts:
        validate = hooks.Validate(
            run.step, run.pairs, run.key, batch_size=size, every=log.validate_every
        )
        found.insert(0, validate)
    elif log.validate_every:
        LOG.warning("the encoded pairs have no validation split: nothing is validated")
    if log.sample_every and jax.process_count() > 1:
        LOG.warning("image grids are drawn by single-process runs only")
    elif log.sample_every and run.pairs.meta.image_kind:
        LOG.warning("no image grids are drawn: this model needs an image beside each prompt")
    elif log.sample_every:
        found.append(hooks.Draw(run.step, make_grids(run, workdir), every=log.sample_every))
    return found


def make_grids(run: Run, workdir: epath.Path) -> Any:
    """What draws the image grids of a run."""
    model, sample = run.config.model, run.config.sample
    prompts = load_prompts(sample.prompts) if sample.prompts else None
    return make_draw(
        model.folder,
        run.step.model,
        prompts[: sample.count] if prompts else data_prompts(run.pairs, sample.count),
        workdir / "samples",
        pipeline={
            "vae": model.vae,
            "variant": model.variant or None,
            "dtype": model.compute_dtype,
        },
        sampling={
            "steps": sample.steps,
            "guidance_scale": sample.guidance_scale,
            "batch_size": sample.batch_size,
            "devices": run.step.mesh,
        },
    )
