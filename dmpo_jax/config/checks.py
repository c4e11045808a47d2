"""Checks of a config that need no device, and parsers of data.mix and profile."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

from dmpo_jax.config.configs import Config, couples_pairs, declared, flatten, works_by_microbatch
from dmpo_jax.config.recipes import PAIRS, RECIPES
from dmpo_jax.config.sections import JOBS
from dmpo_jax.errors import UserError
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.objectives.anchor import HINGE
from dmpo_jax.training.build import COMPUTE

FAR = 16  # times the published learning rate a pair, or 1 / 16 of it
LARGE = 10**8  # parameters; the published recipes are for 0.86 and 2.6 billion


def validate(config: Config) -> None:
    """Checks a training config, as far as no device is needed.

    Raises:
        ValueError: one line per fault.
    """
    _raise(itertools.chain(_check_objective(config), _check_leaves(config), _check_jobs(config)))


def check_leaves(config: Config) -> None:
    """Checks each leaf by itself: the part of `validate` that every command needs.

    Raises:
        ValueError: one line for each leaf that is out of range or not one of its choices.
    """
    _raise(_check_leaves(config))


def check_calibration(config: Config) -> None:
    """Raises ValueError unless margins of a config's run begin at 0 and grow."""
    held = config.model.frozen_dtype
    if held != COMPUTE and not config.lora.rank:
        raise UserError(
            f"model.frozen_dtype={held} rounds the reference: margins, whose growth is measured, "
            "do not begin at 0. Calibrate with --config.model.frozen_dtype=compute"
        )
    if not config.optimizer.learning_rate > 0:
        raise UserError("optimizer.learning_rate is 0, so no margin grows: set one above 0")


def _raise(faults: Iterable[str]) -> None:
    if found := list(faults):
        raise UserError("\n".join(found))


def _check_leaves(config: Config) -> Iterator[str]:
    flat = flatten(config)
    for path, leaf in declared().items():
        if path.startswith("objectives."):  # the chosen objective checks its own leaves
            continue
        if not leaf.fits(flat[path]):
            yield f"{path} {leaf.wrong(flat[path])}"


def _check_objective(config: Config) -> Iterator[str]:
    name = config.objective
    if name not in OBJECTIVES:
        return  # reported by the leaf's own check
    try:
        OBJECTIVES[name].check(**config.objectives[name])
    except ValueError as error:
        yield f"objectives.{name}: {error}"
    compares = OBJECTIVES[name].needs_reference or config.anchor.kind == HINGE
    if config.reference.decay is not None and not compares:
        yield f"reference.decay moves the reference, which {name!r} does not use: unset it"
    if config.reference.decay is not None and config.model.reference:
        yield (
            "reference.decay has the reference follow the policy from its start, and "
            "model.reference names another: unset either"
        )
    if config.model.reference and not compares:
        yield f"model.reference is measured against, which {name!r} does not do: unset it"
    if config.model.frozen_dtype != COMPUTE and not config.lora.rank:
        held = f"model.frozen_dtype={config.model.frozen_dtype} is of what is frozen: without"
        if not compares:
            yield f"{held} lora.rank that is a reference, which {name!r} does not use: unset it"
        elif config.reference.decay is not None:
            yield (
                f"{held} lora.rank that is the reference, which reference.decay moves by less than "
                "a step of int8: unset either, or set lora.rank"
            )
    if config.safeguard.mu is not None and not OBJECTIVES[name].needs_rejected:
        yield f"safeguard.mu holds back rejected images, which {name!r} does not use: unset it"


def _check_train(config: Config) -> Iterator[str]:
    batch, parts, group = config.train.batch_size, config.train.accumulation, config.train.group
    if parts >= 1 and batch % parts:
        yield (
            f"train.batch_size must be a multiple of train.accumulation, but got {batch} and "
            f"{parts}: change either"
        )
    elif parts >= 1 and group and batch % (parts * group):
        yield (
            f"train.batch_size must be a multiple of train.accumulation x train.group, but got "
            f"{batch}, {parts} and {group}: change one of them, or unset train.group"
        )
    if not parts and works_by_microbatch(config):
        way = "a number, or unset lora.dropout"
        if couples_pairs(config) and not group:
            way = "a number, or set train.group"
        yield (
            "train.accumulation=auto (0) chooses by memory how an update is cut, and this run's "
            f"result depends on that: give {way}"
        )
    if group and not couples_pairs(config):
        yield (
            f"train.group is what means over the batch are of, and objective={config.objective} "
            "without safeguard.mu has none: unset it"
        )
    if config.data.flip_each and not config.data.flip:
        yield "data.flip_each says how data.flip flips, which is not set: set it, or unset this"
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


def _check_jobs(config: Config) -> Iterator[str]:
    jobs = config.jobs
    unknown = [job for job in jobs if job not in JOBS]
    if unknown or not jobs:
        yield f"jobs must be some of {', '.join(JOBS)}, but got {jobs!r}"
    elif [JOBS.index(job) for job in jobs] != sorted({JOBS.index(job) for job in jobs}):
        yield f"jobs must come once each, in the order {', '.join(JOBS)}, but got {jobs!r}"
    if not config.model.folder and not config.debug.family:
        yield "model.folder must be a diffusers pipeline folder or hub id, but got '': set it"
    if "collect" in jobs and not config.collect.scorer and not config.debug.family:
        yield "the collect job needs collect.scorer, but got '': set it, or drop collect from jobs"
    prompts = config.collect.prompts or config.sample.prompts
    for job in ("collect", "evaluate"):
        if job in jobs and not prompts and not config.debug.family:
            yield (
                f"the {job} job needs prompts, but collect.prompts and sample.prompts are '': set "
                f"one, or drop {job} from jobs"
            )
    judges = config.evaluate.judges or config.collect.scorer
    if "evaluate" in jobs and not judges and not config.debug.family:
        yield (
            "the evaluate job needs evaluate.judges or collect.scorer, but neither is set: set "
            "one, or drop evaluate from jobs"
        )
    yield from _check_train(config)
    yield from _check_mix(config)
    yield from _check_profile(config)
    source = config.data.source
    if source and not all(source.partition(":")):
        yield f"data.source must be KIND:PATH, but got {source!r}"


def _check_mix(config: Config) -> Iterator[str]:
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


def advice(config: Config, pairs: int, parameters: int) -> list[str]:
    """Returns warnings about settings that run, and are likely to be a mistake.

    Args:
        pairs: distinct ones to train on. parameters: of the model.
    """
    found, optimizer, batch = [], config.optimizer, config.train.batch_size
    if optimizer.warmup_steps > config.train.steps:
        share = config.train.steps / optimizer.warmup_steps
        found.append(
            f"optimizer.warmup_steps={optimizer.warmup_steps} is longer than the run of "
            f"train.steps={config.train.steps}: the learning rate ends at {share:.0%} of its peak"
        )
    if pairs < batch:
        found.append(
            f"train.batch_size={batch} is more than the {pairs} pairs there are: every update "
            "takes some of them twice or more. Lower it"
        )
    low, high = published_rates(config.objective)
    rate = optimizer.learning_rate / batch
    far = not low / FAR <= rate <= high * FAR
    # Nothing is published for adapters, nor for small models, which take higher rates.
    if far and rate and parameters > LARGE and not config.lora.rank:
        found.append(
            f"optimizer.learning_rate={optimizer.learning_rate:.4g} is {rate:.3g} a pair with "
            f"train.batch_size={batch}, {describe_rate(config)}: a rate is published for its "
            f"batch, and for {batch} pairs would be {low * batch:.3g} to {high * batch:.3g}"
        )
    return found


def published_rates(objective: str) -> tuple[float, float]:
    """Returns the lowest and the highest learning rate a pair of the recipes with an objective.

    Of all recipes, if none has it. Recipes of other batches do not scale their rate by the batch.
    """
    rates = {
        name: r.leaves["optimizer.learning_rate"] / r.leaves["train.batch_size"]
        for name, r in RECIPES.items()
        if r.leaves["train.batch_size"] == PAIRS
    }
    own = [x for name, x in rates.items() if RECIPES[name].leaves["objective"] == objective]
    return min(own or rates.values()), max(own or rates.values())


def describe_rate(config: Config) -> str:
    """Returns "N times the published rate a pair", of the nearest recipe."""
    low, high = published_rates(config.objective)
    rate = config.optimizer.learning_rate / config.train.batch_size
    nearest_one = min(max(rate, low), high)
    return f"{rate / nearest_one:.3g} times the published {nearest_one:.3g}"


def parse_mix(entries: Sequence[str]) -> list[tuple[str, float]]:
    """Parses `data.mix` to [(folder, weight)]; ValueError for an entry not FOLDER=WEIGHT."""
    found = []
    for entry in entries:
        folder, _, weight = str(entry).rpartition("=")
        try:
            found.append((folder, float(weight)))
        except ValueError:
            folder = ""
        if not folder or not 0 < found[-1][1] < float("inf"):
            raise UserError(
                f"data.mix must be of FOLDER=WEIGHT, weights above 0, but got {entry!r}"
            )
    return found


def _check_profile(config: Config) -> Iterator[str]:
    try:
        steps = parse_profile(config.profile)
    except ValueError as error:
        yield str(error)
        return
    if steps and steps[1] > config.train.steps:
        yield f"profile must end by train.steps, {config.train.steps}, but got {config.profile!r}"


def parse_profile(text: str) -> tuple[int, int] | None:
    """Parses `profile` to (first, last) update, '' to None; ValueError for any other text."""
    if not text:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 2 <= int(first) <= int(last)):
        raise UserError(
            f"profile must be START:STOP, updates from 2 on (the first compiles), but got {text!r}"
        )
    return int(first), int(last)
