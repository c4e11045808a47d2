"""The jobs that a config names, one after another."""

import logging
import os
import time

import jax
from etils import epath

from dmpo_jax.config.leaves import Config
from dmpo_jax.encoding.encode import encode
from dmpo_jax.jobs.collect import collect
from dmpo_jax.jobs.evaluate import evaluate, summary
from dmpo_jax.jobs.train import train
from dmpo_jax.parallel import processes
from dmpo_jax.sampling.sampler import load_prompts
from dmpo_jax.toy.tiny import make_debug
from dmpo_jax.training import checkpoint

LOG = logging.getLogger(__name__)


def run(config: Config, workdir: epath.PathLike) -> None:
    """Runs `config.jobs` in order in `workdir`. What collect and
    encode have made whole is not made again, and training goes on from its checkpoint.

    Raises:
        ValueError: what the config asks for cannot be done, said before compiling.
        SystemExit: training was told to stop; its state is saved.
    """
    processes.join(**config.distributed)
    workdir = epath.Path(workdir)
    if "train" in config.jobs:
        checkpoint.check_folder(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    cache_compilations()
    if config.mesh.cpu_devices > 1:  # has no effect where there is an accelerator
        jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)
    check_processes(config)
    if config.debug.family:
        config = make_debug(config, workdir)
    steps = {"collect": _collect, "encode": _encode, "train": train, "evaluate": _evaluate}
    for job in config.jobs:
        LOG.info("%s ...", job)
        began = time.monotonic()
        steps[job](config, workdir)
        LOG.info("%s took %.0f s", job, time.monotonic() - began)


def check_processes(config: Config) -> None:
    """ValueError at jobs that several processes cannot share; the others only say what is bad."""
    if jax.process_count() == 1:
        return
    if alone := [job for job in config.jobs if job in ("collect", "evaluate")]:
        raise ValueError(
            f"{jax.process_count()} processes share the jobs encode and train, but jobs has "
            f"{' and '.join(alone)}: run those on one machine, with --config.jobs={','.join(alone)}"
        )
    if jax.process_index() > 0:  # what all would say, process 0 says
        logging.getLogger("dmpo_jax").setLevel(logging.WARNING)


def cache_compilations() -> None:
    """Keeps compiled programs in the user's cache, unless JAX was told of another place."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "dmpo_jax", "xla"))


def _sampling(config: Config) -> dict:
    return {
        "variant": config.model.variant or None,
        "steps": config.sample.steps,
        "guidance_scale": config.sample.guidance_scale,
        "batch_size": config.sample.batch_size,
        "seed": config.seed,
        "dtype": config.model.compute_dtype,
    }


def _collect(config: Config, workdir: epath.Path) -> None:
    collect(
        model=config.model.folder,
        prompts=load_prompts(config.collect.prompts or config.sample.prompts),
        scorer=config.collect.scorer,
        out=workdir / "pairs.parquet",
        pairs=config.collect.pairs,
        temperature=config.collect.temperature,
        labels=config.collect.labels,
        tie_margin=config.collect.tie_margin,
        **_sampling(config),
    )


def _encode(config: Config, workdir: epath.Path) -> None:
    encode(
        source=config.data.source or f"pickapic:{workdir / 'pairs.parquet'}",
        model=config.model.folder,
        out=config.data.encoded or workdir / "encoded",
        vae=config.model.vae,
        variant=config.model.variant or None,
        resolution=config.data.resolution,
        validation_fraction=config.data.validation_fraction,
        dtype=config.model.compute_dtype,
        moments=config.data.moments,
        moments_dtype=config.data.moments_dtype,
        flip=config.data.flip,
        num_threads=config.data.num_threads,
    )


def _evaluate(config: Config, workdir: epath.Path) -> None:
    result = evaluate(
        a=config.model.folder,
        b=str(workdir / "export"),
        prompts=load_prompts(config.collect.prompts or config.sample.prompts),
        judges=config.evaluate.judges or (config.collect.scorer,),
        seeds=config.evaluate.seeds,
        out=workdir,
        **_sampling(config),
    )
    print(summary(result))
    print(f"before and after: {workdir / 'samples' / 'before_after.png'}")
