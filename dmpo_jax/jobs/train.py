"""Trains on encoded pairs: open, check, build, loop, export."""

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.config import arguments, step_settings
from dmpo_jax.config import checks as config_checks
from dmpo_jax.config import leaves as configs
from dmpo_jax.data.batches.mixture import Mixture, open_mixture
from dmpo_jax.data.encoded.folder import EncodedPairs, open_pairs
from dmpo_jax.data.prompt_files import load_texts
from dmpo_jax.jobs.convert import export
from dmpo_jax.parallel import mesh
from dmpo_jax.planning.flops import make_cost
from dmpo_jax.sampling.grids import make_draw, why_no_grids
from dmpo_jax.sampling.sampler import make_sampler
from dmpo_jax.training import checkpoint, hooks
from dmpo_jax.training.build import TrainingStep, build
from dmpo_jax.training.loop import run_loop

LOG = logging.getLogger(__name__)


class Run(NamedTuple):
    """A run's config and data, its step, and its random key."""

    config: configs.Config
    pairs: EncodedPairs | Mixture
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
            diffusers_io.write_json(workdir / "config.json", configs.flatten(config))
        wanted = run.step.abstract_state(params)
        fresh: Any = None if checkpoints.steps() else run.step.make_state(params)
        del params  # the state's own now, or in the way of what is restored
        start, state = checkpoints.restore(wanted) or (0, fresh)
        if start:
            LOG.info("going on from step %d in %s", start, folder)
        LOG.info("%s", run.step.settings.describe_rate())
        log = config.log
        own = hooks.standard(
            run.step,
            run.pairs,
            run.key,
            checkpoints,
            validate_every=log.validate_every,
            checkpoint_every=log.checkpoint_every,
        )
        state = run_loop(
            run.step,
            state,
            run.batches(start),
            run.key,
            [*own, *grids(run, workdir), *extra],
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
    mix = config_checks.parse_mix(config.data.mix or ())
    pairs = open_mixture(mix) if mix else open_pairs(config.data.encoded or workdir / "encoded")
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


def grids(run: Run, workdir: epath.Path) -> list[hooks.Draw]:
    """The hook that draws image grids, where there are to be any and can be.

    Of the config's prompts, or of the data's first captions.
    """
    config, sample, every = run.config, run.config.sample, run.config.log.sample_every
    reason = why_no_grids(run.step.family)
    if every and reason:
        LOG.warning(reason)
    if not every or reason:
        return []

    def open_sampler() -> Any:
        loaded = diffusers_io.load_pipeline(config.model.folder, **arguments.pipeline(config))
        settings = arguments.sampling(config)
        return make_sampler(loaded, run.step.model, devices=run.step.mesh, **settings)

    prompts = load_texts(sample.prompts) if sample.prompts else run.pairs.first_texts(sample.count)
    draw = make_draw(open_sampler, prompts[: sample.count], workdir / "samples")
    return [hooks.Draw(run.step, draw, every=every)]


def check(config: configs.Config) -> None:
    """ValueError where the model or the prompts of image grids are missing."""
    diffusers_io.load_family(config.model.folder)
    if config.log.sample_every and config.sample.prompts:
        load_texts(config.sample.prompts)
