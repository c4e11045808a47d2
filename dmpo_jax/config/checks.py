"""The checks on a config that need no device, and the parsing of its few texts."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from dmpo_jax.config import leaves as configs


def validate(config: configs.Config, *, objectives: Mapping[str, Any]) -> None:
    """Raises ValueError in words, one line a fault, for what no device is needed to refuse.

    Args:
        config: a whole config, overrides applied.
        objectives: `objectives.OBJECTIVES`; the chosen one checks its own hyperparameters.
    """
    faults = list(
        itertools.chain(
            _check_objective(config, objectives),
            _check_names(config),
            _check_numbers(config),
            _check_jobs(config),
        )
    )
    if faults:
        raise ValueError("\n".join(faults))


def _check_objective(config: configs.Config, objectives: Mapping[str, Any]):
    name = config.objective
    if name not in objectives:
        near = configs.nearest(name, sorted(objectives))
        known = ", ".join(sorted(objectives))
        yield f"objective must be one of {known}, but got {name!r}: did you mean {near!r}?"
    elif name not in config.objectives:
        yield (
            f"objective {name!r} has no section objectives.{name}: add its hyperparameters to "
            "config.LEAVES"
        )
    else:
        try:
            objectives[name].check(**config.objectives[name])
        except ValueError as error:
            yield f"objectives.{name}: {error}"
        mu = config.safeguard.mu
        if mu is not None and not objectives[name].needs_rejected:
            yield f"safeguard.mu holds back rejected images, which {name!r} does not use: unset it"


def _check_names(config: configs.Config):
    choices = {
        "timesteps.weighting": configs.WEIGHTINGS,
        "timesteps.density": configs.DENSITIES,
        "model.compute_dtype": configs.DTYPES,
        "model.attention": configs.KERNELS,
        "model.remat": configs.REMAT,
        "data.moments": configs.MOMENTS,
        "data.moments_dtype": configs.STORED,
        "optimizer.name": configs.OPTIMIZERS,
        "optimizer.schedule": configs.SCHEDULES,
        "collect.labels": configs.LABELS,
    }
    flat = configs.leaves(config)
    for path, allowed in choices.items():
        if flat[path] not in allowed:
            yield f"{path} must be one of {', '.join(allowed)}, but got {flat[path]!r}"


_AT_LEAST_ONE = [
    "mesh.cpu_devices",
    "data.num_threads",
    "train.steps",
    "train.batch_size",
    "train.accumulation",
    "distributed.join_limit",
    "log.every",
    "log.checkpoint_every",
    "log.keep",
    "sample.steps",
    "sample.batch_size",
    "sample.count",
    "collect.pairs",
    "evaluate.seeds",
]
_AT_LEAST_ZERO = [
    "seed",
    "data.prefetch",
    "train.skip_limit",
    "train.hang_limit",
    "distributed.processes",
    "lora.rank",
    "optimizer.learning_rate",
    "optimizer.warmup_steps",
    "optimizer.eps",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "log.validate_every",
    "log.sample_every",
    "sample.guidance_scale",
    "collect.tie_margin",
]
# path: (predicate, the range in words)
_RANGES = {
    "safeguard.mu": (lambda x: x is None or 0 <= x <= 1, "in [0, 1]"),
    "timesteps.gamma": (lambda x: 0 < x < float("inf"), "above 0 and finite"),
    "timesteps.mean": (lambda x: abs(x) < float("inf"), "finite"),
    "timesteps.std": (lambda x: 0 < x < float("inf"), "above 0 and finite"),
    "timesteps.shift": (lambda x: x is None or 0 < x < float("inf"), "above 0 and finite"),
    "timesteps.low": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "timesteps.high": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "data.prompt_dropout": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "data.validation_fraction": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "data.resolution": (lambda x: x is None or (x > 0 and x % 8 == 0), "a positive multiple of 8"),
    "distributed.process_id": (lambda x: x >= -1, "-1, or a process's number"),
    "distributed.heartbeat": (lambda x: x >= 10, "at least 10: heartbeats are sent every few s"),
    "train.ema_decay": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "lora.alpha": (lambda x: x is None or x > 0, "above 0"),
    "lora.dropout": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "optimizer.b1": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "optimizer.b2": (lambda x: 0 <= x < 1, "in [0, 1)"),
    **{
        f"mesh.{axis}": (lambda x: x == -1 or x > 0, "a number of devices, or -1 for all left")
        for axis in ("data", "fsdp", "tensor")
    },
    "collect.temperature": (lambda x: x > 0, "above 0"),
    **{path: (lambda x: x >= 1, "at least 1") for path in _AT_LEAST_ONE},
    **{path: (lambda x: 0 <= x < float("inf"), "at least 0 and finite") for path in _AT_LEAST_ZERO},
}


def _check_numbers(config: configs.Config):
    flat = configs.leaves(config)
    for path, (fits, words) in _RANGES.items():
        if path in flat and not fits(flat[path]):
            yield f"{path} must be {words}, but got {flat[path]}"
    batch, parts = config.train.batch_size, config.train.accumulation
    if parts >= 1 and batch % parts:
        yield (
            f"train.batch_size must be a multiple of train.accumulation, but got {batch} and "
            f"{parts}: change either"
        )
    if config.timesteps.low >= config.timesteps.high:
        yield (
            "timesteps.low must be below timesteps.high, but got "
            f"{config.timesteps.low} and {config.timesteps.high}"
        )
    if config.optimizer.schedule != "constant":
        warmup, steps = config.optimizer.warmup_steps, config.train.steps
        if steps <= warmup:
            yield (
                f"the {config.optimizer.schedule} schedule needs train.steps above "
                f"optimizer.warmup_steps, but got {steps} and {warmup}"
            )


def _check_jobs(config: configs.Config):
    jobs = config.jobs
    unknown = [job for job in jobs if job not in configs.JOBS]
    if unknown or not jobs:
        yield f"jobs must be some of {', '.join(configs.JOBS)}, but got {jobs!r}"
    elif [configs.JOBS.index(job) for job in jobs] != sorted(
        {configs.JOBS.index(job) for job in jobs}
    ):
        yield f"jobs must come once each, in the order {', '.join(configs.JOBS)}, but got {jobs!r}"
    if not config.lora.targets or not all(isinstance(t, str) for t in config.lora.targets):
        yield f"lora.targets must be ends of layers' paths, but got {config.lora.targets!r}"
    if not all(isinstance(judge, str) for judge in config.evaluate.judges or ()):
        yield f"evaluate.judges must be names of scorers, but got {config.evaluate.judges!r}"
    if not config.model.folder and not config.debug.family:
        yield "model.folder must be a diffusers pipeline folder or hub id, but got '': set it"
    if "collect" in jobs and not config.collect.scorer and not config.debug.family:
        yield "the collect job needs collect.scorer, but got '': set it, or drop collect from jobs"
    if config.debug.family not in ("", *configs.FAMILIES):
        yield (
            f"debug.family must be one of {', '.join(configs.FAMILIES)}, or '', but got "
            f"{config.debug.family!r}"
        )
    yield from _check_mix(config)
    yield from _check_profile(config)
    source = config.data.source
    if source and not all(source.partition(":")):
        yield f"data.source must be KIND:PATH, but got {source!r}"


def _check_mix(config: configs.Config):
    if not config.data.mix:
        return
    try:
        parse_mix(config.data.mix)
    except ValueError as error:
        yield str(error)
    if config.data.encoded:
        yield (
            f"data.mix takes the place of data.encoded, but got {config.data.mix!r} and "
            f"{config.data.encoded!r}: set one of them"
        )
    if "encode" in config.jobs:
        yield (
            "data.mix names folders that are encoded already, but jobs has encode: drop it from "
            "jobs, or data.mix"
        )


def parse_mix(entries: Sequence[str]) -> list[tuple[str, float]]:
    """[(folder, weight)] of `data.mix`; ValueError at what is not FOLDER=WEIGHT."""
    found = []
    for entry in entries:
        folder, _, weight = str(entry).rpartition("=")
        try:
            found.append((folder, float(weight)))
        except ValueError:
            folder = ""
        if not folder or not 0 < found[-1][1] < float("inf"):
            raise ValueError(
                f"data.mix must be of FOLDER=WEIGHT, weights above 0, but got {entry!r}"
            )
    return found


def _check_profile(config: configs.Config):
    try:
        steps = parse_profile(config.profile)
    except ValueError as error:
        yield str(error)
        return
    if steps and steps[1] > config.train.steps:
        yield f"profile must end by train.steps, {config.train.steps}, but got {config.profile!r}"


def parse_profile(text: str) -> tuple[int, int] | None:
    """(first, last) update of `profile`, None where it is ''; ValueError at what is neither."""
    if not text:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 2 <= int(first) <= int(last)):
        raise ValueError(
            f"profile must be START:STOP, updates from 2 on (the first compiles), but got {text!r}"
        )
    return int(first), int(last)
