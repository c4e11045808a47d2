"""The command `train`: runs the jobs that a config names, in order."""

import logging
import time
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from dmpo_jax import diffusers_io, storage
from dmpo_jax.config.configs import Config
from dmpo_jax.errors import UserError
from dmpo_jax.families import family_named
from dmpo_jax.jobs import collect, encode, evaluate, train
from dmpo_jax.parallel import processes
from dmpo_jax.parallel.compilation import cache_compilations
from dmpo_jax.toy.debug import write_debug_files
from dmpo_jax.training import checkpoint

LOG = logging.getLogger(__name__)


def run(config: Config, workdir: epath.PathLike, hooks: Sequence[Any] = ()) -> epath.Path:
    """Runs `config.jobs` in order in `workdir`; completed work is not repeated.

    Collect and encode keep what they have completed, and training resumes from its checkpoint.
    Every job is checked before the first one starts.

    Args:
        hooks: `training.hooks.HookLike`, called by training after the run's own.

    Returns:
        The workdir.

    Raises:
        ValueError: the config cannot be run; raised before compiling.
        SystemExit: training was stopped by a signal; its state is saved.
    """
    processes.join(**config.distributed)
    workdir = epath.Path(workdir)
    if "train" in config.jobs:
        checkpoint.check_folder(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    cache_compilations()
    if config.mesh.cpu_devices > 1:  # no effect if there is an accelerator
        jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)
    check_processes(config)
    if config.debug.family:
        config = with_debug_files(config, workdir)
    config = with_commits(config, workdir)
    collected = f"pickapic:{workdir / 'pairs.parquet'}"
    checks = {
        "collect": lambda: collect.check(config),
        "encode": lambda: encode.check(config, source=collected),
        "train": lambda: train.check(config, workdir),
        "evaluate": lambda: evaluate.check(config),
    }
    jobs = {
        "collect": lambda: collect.collect(config, out=workdir),
        "encode": lambda: encode.encode(
            config, source=collected, out=config.data.encoded or workdir / "encoded"
        ),
        "train": lambda: train.train(config, workdir, hooks),
        "evaluate": lambda: evaluate.evaluate(
            config, a=config.model.folder, b=workdir / "export", out=workdir
        ),
    }
    with processes.writing(workdir, "train"):
        for job in config.jobs:
            checks[job]()
        for job in config.jobs:
            LOG.info("%s ...", job)
            began = time.monotonic()
            jobs[job]()
            LOG.info("%s took %.0f s", job, time.monotonic() - began)
    return workdir


def check_processes(config: Config) -> None:
    """Raises ValueError if several processes would run a job that they cannot share.

    Processes other than 0 then log warnings and errors only.
    """
    if jax.process_count() == 1:
        return
    if alone := [job for job in config.jobs if job in ("collect", "evaluate")]:
        raise UserError(
            f"{jax.process_count()} processes share the jobs encode and train, but jobs has "
            f"{' and '.join(alone)}: run those on one machine, with --config.jobs={','.join(alone)}"
        )
    if jax.process_index() > 0:  # process 0 logs for all
        logging.getLogger("dmpo_jax").setLevel(logging.WARNING)


def with_commits(config: Config, workdir: epath.Path) -> Config:
    """Returns the config with the commit of each hub id.

    A resumed run keeps those of its config.json: its reference must not change with the hub.
    """
    before = storage.find_json(workdir / "config.json") or {}
    config = config.copy_and_resolve_references()
    for leaf in ("folder", "vae"):
        name, recorded = config.model[leaf], before.get(f"model.{leaf}") or ""
        config.model[leaf] = diffusers_io.pinned(name, recorded)
    return config


def with_debug_files(config: Config, workdir: epath.Path) -> Config:
    """Returns the config with a tiny random model and synthetic pairs, written into workdir.

    The real jobs then run on them unchanged: encode, and train to `train.steps`.
    """
    model, pairs = write_debug_files(workdir, family_named(config.debug.family))
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.folder, config.model.vae = str(model), ""
        config.data.source = f"pickapic:{pairs}"
        config.data.encoded, config.data.mix, config.data.flip = "", None, False
        config.jobs = ("encode", "train")
    return config
