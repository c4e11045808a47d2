"""Fits a run into the devices' memory: `train.accumulation=auto`, and what to do without memory."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from dmpo_jax import storage
from dmpo_jax.config import checks, step_settings
from dmpo_jax.config.configs import Config
from dmpo_jax.diffusers_io import load_family
from dmpo_jax.parallel import processes
from dmpo_jax.planning import fitting, plan
from dmpo_jax.planning.report import memory_advice
from dmpo_jax.planning.step import Model
from dmpo_jax.training.build import NO_RATE

LOG = logging.getLogger(__name__)
FILE = "accumulation.json"
LoadModel = Callable[[Config], Model]


def within_memory(job: Callable[..., Any], load_model: LoadModel) -> Callable[..., Any]:
    """Wraps a job that is called as (config, workdir, ...) and takes training steps.

    It gets the config of `with_accumulation`. Where a device's memory does not suffice, it raises
    UserError with the options that need less. load_model: the shapes of a config's model.
    """

    @functools.wraps(job)
    def call(config: Config, workdir: epath.Path, *rest: Any, **kw: Any) -> Any:
        axes = step_settings.mesh_axes(config)
        with memory_advice(step_settings.read_step(config), axes):
            fitted = with_accumulation(config, workdir, load_model)
        with memory_advice(step_settings.read_step(fitted), axes):
            return job(fitted, workdir, *rest, **kw)

    return call


def with_accumulation(config: Config, workdir: epath.Path, load_model: LoadModel) -> Config:
    """Returns the config with a number for `train.accumulation`, chosen if that is 0 ("auto").

    WORKDIR/accumulation.json keeps the choice and its reason: a run that is resumed with the same
    settings on like devices keeps it. Every process must call it.

    Raises:
        UserError: as `fitting.fit`.
    """
    if config.train.accumulation:
        return config
    found = config.copy_and_resolve_references()
    settings, axes = step_settings.read_step(config), step_settings.mesh_axes(config)
    limit, kind = fitting.device_memory(), jax.devices()[0].device_kind
    if limit is None:
        found.train.accumulation = 1
        LOG.info("train.accumulation=1, chosen: a %s does not say how much memory it has", kind)
        return found
    model = load_model(shapes_of(config, workdir))
    same = dataclasses.replace(settings, rate=NO_RATE)  # neither it nor the length of the run
    devices = f"{jax.device_count()} x {kind} of {limit} bytes"
    about = plan.hash_identity(plan.plan_identity(model, same, axes, devices, steps=0))
    before = storage.find_json(workdir / FILE) or {}
    # A workdir need not be seen by every process, and all must compile the same steps.
    kept = before.get("accumulation", 0) if before.get("for") == about else 0
    if kept := processes.of_first(kept):
        found.train.accumulation = kept
        LOG.info("train.accumulation=%d, as chosen before (%s)", kept, workdir / FILE)
        return found
    choice = fitting.fit(model, settings, axes, limit)
    why = fitting.reason(choice, settings, limit)
    LOG.info("%s", why)
    if jax.process_index() == 0:
        made = {"accumulation": choice.accumulation, "reason": why, "for": about}
        storage.write_json(workdir / FILE, made)
    found.train.accumulation = choice.accumulation
    return found


def shapes_of(config: Config, workdir: epath.Path) -> Config:
    """Returns a config from which `load_model` finds the shapes of a run's model and pairs."""
    config = config.copy_and_resolve_references()
    own = workdir / "encoded"
    if not (config.data.encoded or config.data.mix):
        config.data.encoded = str(own) if own.exists() or "encode" not in config.jobs else ""
    if mix := checks.parse_mix(config.data.mix or ()):
        config.data.encoded = mix[0][0]
    if not config.debug.family:  # a hub id is in the cache by now
        config.model.folder = str(load_family(config.model.folder)[0])
    return config
