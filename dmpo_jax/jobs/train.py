"""Trains on encoded pairs: open, check, build, loop, export."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from dmpo_jax import diffusers_io, storage
from dmpo_jax.config import arguments, configs, step_settings
from dmpo_jax.data.batches.mixture import Mixture
from dmpo_jax.data.encoded.records import EncodedPairs
from dmpo_jax.export.run import write_run
from dmpo_jax.planning.flops import make_cost
from dmpo_jax.training import checkpoint, fork
from dmpo_jax.training.build import TrainingStep, build, make_batches
from dmpo_jax.training.hooks import standard, trained
from dmpo_jax.training.loop import run_loop, start_state
from dmpo_jax.training.provenance import check_encoders, content


class Run(NamedTuple):
    """A run's config and data, its step, its random key, and `step_settings.grid_texts`."""

    config: configs.Config
    pairs: EncodedPairs | Mixture
    step: TrainingStep
    key: jax.Array
    texts: tuple[list[str], dict[str, Any]]

    def batches(self, start: int = 0) -> Any:
        settings = step_settings.data_settings(self.config)
        return make_batches(self.step, self.pairs, start=start, **settings)


def train(
    config: configs.Config,
    workdir: epath.Path,
    hooks: Sequence[Any] = (),
    source: epath.Path | None = None,
) -> None:
    """Trains to `config.train.steps`, resuming from the newest valid checkpoint in workdir.

    Writes metrics, a page, checkpoints and grids meanwhile, and `workdir/export` at the end.

    Args:
        hooks: `hooks.HookLike`, called after the run's own. source: workdir to fork from.

    Raises:
        ValueError: model, data, mesh or workdir do not fit; raised before compiling.
        telemetry.NonFiniteError: names the update; nothing of it was kept or saved.
        SystemExit: stopped by SIGTERM, Ctrl-C or an alarm, after saving.
    """
    run, params = prepare(config, workdir)
    with checkpoint.Checkpoints(
        workdir / "checkpoints",
        content=content(*arguments.starts(config), run.pairs),
        **arguments.checkpoints(config),
    ) as checkpoints:
        if jax.process_index() == 0:  # after the identity check
            storage.write_json(workdir / "config.json", configs.flatten(config))
        if source:
            theirs = step_settings.of_forked(source)
            fork.fork(run.step, params, source, workdir, checkpoints, **theirs)
        state = start_state(run.step, params, checkpoints)
        every = config.log.validate_every, config.log.checkpoint_every
        own = standard(run.step, run.pairs, run.key, checkpoints, *every)
        state = run_loop(
            run.step,
            state,
            run.batches(int(state.step)),
            run.key,
            [*own, *step_settings.grids(config, run.step, run.texts, workdir), *hooks],
            step_settings.read_loop(config, workdir, run.texts[0]),
            workdir=workdir,
            cost=make_cost(run.step),
        )
    write_run(arguments.card(config, workdir), trained(state), step=int(state.step))


def prepare(config: configs.Config, workdir: epath.Path) -> tuple[Run, dict[str, jax.Array]]:
    """Opens and checks everything; returns (run, parameters to train). Compiles no step."""
    settings = step_settings.read_step(config)
    devices = step_settings.make_mesh(config)
    pairs = step_settings.open_data(config, workdir)
    check_encoders(pairs, **arguments.encoders(config))
    folder, family = diffusers_io.load_family(config.model.folder)
    noise, _ = diffusers_io.load_schedule(folder)
    texts = step_settings.grid_texts(config, family, pairs)
    model = step_settings.load_model(config, settings, family, devices)
    beginning = step_settings.read_beginning(config, settings, family, devices, model)
    built, params = build(family, model, noise, pairs.meta, devices, settings, beginning=beginning)
    step_settings.warn(config, pairs, built)
    return Run(config, pairs, built, built.make_key(config.seed), texts), params


def check(
    config: configs.Config, workdir: epath.Path, source: epath.Path | None = None
) -> epath.Path | None:
    """Raises ValueError for what can be known before the jobs ahead of this one have run.

    Returns:
        `source`, as `train` takes it.
    """
    diffusers_io.check_export(config.model.folder, workdir / "export")
    step_settings.make_mesh(config)
    step_settings.check_grids(config)
    if "encode" not in config.jobs:
        step_settings.check_data(config, workdir)
    step_settings.check_beginning(config)
    made_from = content(*arguments.starts(config))
    known = {**configs.identity(config), "content": made_from}, configs.places()
    checkpoint.check_identity(workdir / "checkpoints", *known)
    return source if fork.check(source, workdir, *known) else None
