"""Says what a run would do, need and refuse; writes nothing."""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath

from dmpo_jax import storage
from dmpo_jax.config import checks, configs, fitted, step_settings
from dmpo_jax.data.encoded.records import load_meta
from dmpo_jax.parallel.compilation import describe_cache
from dmpo_jax.planning.report import GB, count_parts
from dmpo_jax.planning.step import Model, make_planned

NEEDS = {
    "collect": ("model.folder", "collect.scorer", "collect.prompts", "sample.prompts"),
    "encode": ("model.folder", "model.vae", "data.source", "data.prompts"),
    "train": (
        *("model.folder", "model.start", "model.reference"),
        *("data.encoded", "data.mix", "objective"),
    ),
    "evaluate": ("model.folder", "evaluate.judges", "collect.scorer", "collect.prompts"),
}


def dry_run(
    config: configs.Config,
    workdir: epath.Path,
    each: Mapping[str, Callable[[], Any]],
    load_model: Callable[[configs.Config], Model],
) -> list[str]:
    """Prints what `run` would do with a config; returns everything that it would refuse.

    Memory is that of shapes: state, reference and batch. What a step needs for a while beside
    them, and whether it compiles, the command `plan` says.

    Args:
        each: job -> its check. load_model: the shapes of a config's model.
    """
    refused: list[str] = []

    def attempt(check: Callable[[], Any]) -> Any:
        try:
            return check()
        except (ValueError, OSError) as error:
            if str(error) not in refused:  # jobs may lack the same
                refused.append(str(error))

    attempt(lambda: checks.validate(config))
    attempt(lambda: check_writable(workdir))
    for job in config.jobs:
        if job in each:
            attempt(each[job])
    flat, known = configs.flatten(config), configs.declared()
    changed = {k: v for k, v in flat.items() if k not in known or v != known[k].default}
    lines = ["changed options:", *(f"  {k} = {v!r}" for k, v in changed.items()), "jobs:"]
    for job in config.jobs:
        needs = ", ".join(f"{k} = {flat[k]!r}" for k in NEEDS.get(job, ()) if flat[k])
        lines.append(f"  {job}: {needs}")
    lines.append(f"folder: {workdir}")
    if "train" in config.jobs and not refused:
        lines += attempt(lambda: list(about_training(config, workdir, load_model))) or []
    print("\n".join([*lines, f"refusals: {len(refused) or 'none'}", *refused]))
    return refused


def about_training(
    config: configs.Config, workdir: epath.Path, load_model: Callable[[configs.Config], Model]
) -> Iterator[str]:
    """Yields lines; raises ValueError for what the mesh, model and pairs refuse together."""
    folders = [folder for folder, _ in checks.parse_mix(config.data.mix or ())]
    config = fitted.shapes_of(config, workdir)
    settings, axes = step_settings.read_step(config), step_settings.mesh_axes(config)
    planned = make_planned(load_model(config), settings, axes, jax.devices())
    batch, steps = settings.batch_size, config.train.steps
    folders = folders or [config.data.encoded] * bool(config.data.encoded)
    pairs = sum(load_meta(folder).counts.get("train", 0) for folder in folders)
    yield f"training: {steps} updates of {batch} pairs on {planned.built.mesh.size} devices"
    start = config.model.start or "model.folder's own weights"
    yield f"  begins with {start}, measured against {config.model.reference or 'the same'}"
    if pairs:
        yield (
            f"  {pairs} pairs an epoch, {pairs / batch:.4g} updates: {steps * batch / pairs:.4g} "
            "epochs"
        )
    else:
        yield "  pairs an epoch: known once they are encoded"
    if not config.train.accumulation:
        yield "  train.accumulation: chosen before the first update, from the devices' memory"
    yield f"  {settings.describe_rate()}: {checks.describe_rate(config)} a pair"
    parts = count_parts(planned.arguments)._asdict()
    names = ("params", "optimizer", "ema", "reference", "batch")
    sizes = ", ".join(f"{name} {parts[name] / GB:.3g}" for name in names)
    yield f"  GB a device, by shapes: {sizes}; a step needs more (command plan)"
    yield f"  {describe_cache()}"
    for words in checks.advice(config, pairs or batch, planned.built.model_size()):
        yield f"  warning: {words}"


def check_writable(workdir: epath.Path) -> None:
    """Raises ValueError if a local folder cannot be made or written to."""
    if storage.is_remote(workdir):
        return
    there = next(
        path for path in (workdir.absolute(), *workdir.absolute().parents) if path.exists()
    )
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--workdir={workdir} cannot be written: {there} is no writable folder")
