"""The commands `train` and `calibrate`: run the jobs that a config names, in order."""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from dmpo_jax import storage
from dmpo_jax.config import arguments, checks, fitted, step_settings
from dmpo_jax.config.configs import Config
from dmpo_jax.errors import UserError
from dmpo_jax.export.run import write_cards
from dmpo_jax.jobs import calibrate, collect, encode, evaluate, plan, train
from dmpo_jax.jobs import dry_run as said
from dmpo_jax.parallel import meshes, processes
from dmpo_jax.parallel.compilation import cache_compilations
from dmpo_jax.training import checkpoint

LOG = logging.getLogger(__name__)


def run(
    config: Config,
    workdir: epath.PathLike,
    hooks: Sequence[Any] = (),
    fork: epath.PathLike = "",
    dry_run: bool = False,
    calibration: Mapping[str, Any] | None = None,
) -> epath.Path:
    """Runs `config.jobs` in order in `workdir`; completed work is not repeated.

    Collect and encode keep what is complete; training resumes. All jobs are checked first.

    Args:
        hooks: `training.hooks.HookLike`, called by training after the run's own.
        fork: another folder, to run in instead, from the newest checkpoint of `workdir`.
        dry_run: only print what would be done, needed and refused; exits with 1 if anything is.
        calibration: keywords of `calibrate.calibrate`, which then runs in place of train and of
            what comes after it.

    Returns:
        The folder of the run.

    Raises:
        ValueError: the config cannot be run; raised before compiling.
        SystemExit: training was stopped by a signal; its state is saved.
    """
    if "train" in config.jobs:
        checkpoint.check_folder(fork or workdir)
    if not dry_run:  # which lists these refusals among the others
        checks.validate(config)
        if not storage.may_be_folder(fork or workdir):
            words = (
                f"a workdir must be a folder that can be made and written, got {fork or workdir}"
            )
            raise UserError(words)
        processes.join_and_quiet(**config.distributed)
    workdir, source = epath.Path(workdir), None
    if fork:
        config = step_settings.for_fork(config, workdir)
        workdir, source = epath.Path(fork), workdir
    cache_compilations()
    meshes.split_cpu(config.mesh.cpu_devices)
    if not dry_run:
        workdir.mkdir(parents=True, exist_ok=True)
    if config.debug.family:
        config = step_settings.with_debug_files(config, workdir, write=not dry_run)
    if not dry_run:  # which lists a model that is not there among the refusals
        config = step_settings.with_commits(config, workdir)
    collected = f"pickapic:{workdir / 'pairs.parquet'}"
    ready = {
        "collect": lambda: collect.check(config),
        "encode": lambda: encode.check(config, source=collected),
        "train": lambda: train.check(config, workdir, source),
        "evaluate": lambda: evaluate.check(config),
        "calibrate": lambda: calibrate.check(config, workdir),
    }
    train_it = fitted.within_memory(train.train, plan.load_model)
    calibrate_it = fitted.within_memory(calibrate.calibrate, plan.load_model)
    jobs = {
        "collect": lambda: collect.collect(config, out=workdir),
        "encode": lambda: encode.encode(
            config, source=collected, out=config.data.encoded or workdir / "encoded"
        ),
        "train": lambda: train_it(config, workdir, hooks, found["train"]),
        "evaluate": lambda: (
            evaluate.evaluate(config, a=config.model.folder, b=workdir / "export", out=workdir),
            write_cards(arguments.card(config, workdir)),
        ),
        "calibrate": lambda: calibrate_it(config, workdir, train.prepare, **(calibration or {})),
    }
    if dry_run:  # nothing of a debug run is there to be checked
        each = {} if config.debug.family else ready
        if said.dry_run(config, workdir, each, plan.load_model):
            raise SystemExit(1)
        return workdir
    names = config.jobs
    if calibration is not None:
        names = (*(job for job in names if job in ("collect", "encode")), "calibrate")
    with processes.writing(workdir, "train" if calibration is None else "calibrate"):
        found = {job: ready[job]() for job in names}
        for job in names:
            LOG.info("%s ...", job)
            began = time.monotonic()
            jobs[job]()
            LOG.info("%s took %.0f s", job, time.monotonic() - began)
    return workdir
