"""Trains on encoded pairs: open, check, build, loop, export."""

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from dmpo_jax import diffusers_io, storage
from dmpo_jax.config import arguments, configs, step_settings
from dmpo_jax.config.checks import parse_mix
from dmpo_jax.data.batches.mixture import Mixture, open_mixture
from dmpo_jax.data.encoded.records import EncodedPairs, open_pairs
from dmpo_jax.data.prompt_files import load_texts
from dmpo_jax.export.run import write_run
from dmpo_jax.parallel import meshes
from dmpo_jax.planning.flops import make_cost
from dmpo_jax.sampling.grids import make_draw, why_no_grids
from dmpo_jax.sampling.sampler import make_sampler
from dmpo_jax.training import checkpoint
from dmpo_jax.training.build import TrainingStep, build, make_batches
from dmpo_jax.training.hooks import Draw, standard, trained
from dmpo_jax.training.loop import run_loop, start_state
from dmpo_jax.training.provenance import check_encoders, content

LOG = logging.getLogger(__name__)


class Run(NamedTuple):
    """A run's config and data, its step, and its random key."""

    config: configs.Config
    pairs: EncodedPairs | Mixture
    step: TrainingStep
    key: jax.Array

    def batches(self, start: int = 0) -> Any:
        settings = step_settings.data_settings(self.config)
        return make_batches(self.step, self.pairs, start=start, **settings)


def train(config: configs.Config, workdir: epath.Path, hooks: Sequence[Any] = ()) -> None:
    """Trains to `config.train.steps`, resuming from the newest valid checkpoint in workdir.

    Writes metrics, checkpoints and sample grids during training, and `workdir/export` at the end.

    Args:
        hooks: further hooks (`hooks.HookLike`), called after the run's own.

    Raises:
        ValueError: model, data, mesh or workdir do not fit; raised before compiling.
        telemetry.NonFiniteError: names the update; nothing of it was kept or saved.
        SystemExit: stopped by SIGTERM or Ctrl-C, after saving.
    """
    run, params = prepare(config, workdir)
    with checkpoint.Checkpoints(
        workdir / "checkpoints",
        content=content(*arguments.weights(config), run.pairs),
        **arguments.checkpoints(config),
    ) as checkpoints:
        if jax.process_index() == 0:  # after the identity check
            storage.write_json(workdir / "config.json", configs.flatten(config))
        state = start_state(run.step, params, checkpoints)
        every = config.log.validate_every, config.log.checkpoint_every
        own = standard(run.step, run.pairs, run.key, checkpoints, *every)
        state = run_loop(
            run.step,
            state,
            run.batches(int(state.step)),
            run.key,
            [*own, *grids(run, workdir), *hooks],
            step_settings.read_loop(config),
            workdir=workdir,
            cost=make_cost(run.step),
        )
    write_run(arguments.card(config, workdir), trained(state), step=int(state.step))


def prepare(config: configs.Config, workdir: epath.Path) -> tuple[Run, dict[str, jax.Array]]:
    """Opens and checks everything; returns (run, parameters to train). Compiles no step."""
    settings = step_settings.read_step(config)
    devices = meshes.make_mesh(**step_settings.mesh_axes(config))
    meshes.check_batch(settings.batch_size, settings.accumulation, devices)
    mix = parse_mix(config.data.mix or ())
    pairs = open_mixture(mix) if mix else open_pairs(config.data.encoded or workdir / "encoded")
    check_encoders(pairs, **arguments.encoders(config))
    folder, family = diffusers_io.load_family(config.model.folder)
    noise, _ = diffusers_io.load_schedule(folder)
    model = arguments.trained(config).load(
        dtype=settings.compute_dtype,
        param_dtype=settings.frozen_dtype if settings.lora else "float32",
        sharding=functools.partial(meshes.parameter_sharding, devices),
    )
    built, params = build(family, model, noise, pairs.meta, devices, settings)
    return Run(config, pairs, built, built.make_key(config.seed)), params


def grids(run: Run, workdir: epath.Path) -> list[Draw]:
    """Returns the hook that draws image grids of the config's or the data's prompts, or []."""
    config, built, every = run.config, run.step, run.config.log.sample_every
    if every and (reason := why_no_grids(built.family)):
        LOG.warning(reason)
        every = 0
    if not every:
        return []

    def open_sampler() -> Any:
        loaded = diffusers_io.load_pipeline(config.model.folder, **arguments.pipeline(config))
        return make_sampler(loaded, built.model, devices=built.mesh, **arguments.sampling(config))

    given, count = config.sample.prompts, config.sample.count
    prompts = load_texts(given)[:count] if given else run.pairs.first_texts(count)
    return [Draw(built, make_draw(open_sampler, prompts, workdir / "samples"), every=every)]


def check(config: configs.Config, workdir: epath.Path) -> None:
    """Raises ValueError if the model or the prompts of image grids are missing."""
    diffusers_io.check_export(config.model.folder, workdir / "export")
    if config.log.sample_every and config.sample.prompts:
        load_texts(config.sample.prompts)
