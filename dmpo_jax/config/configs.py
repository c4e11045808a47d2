"""Configs: defaults, conversion to flat dicts, and the identity that checkpoints depend on.

Only `commands`, `jobs` and `config` read a config; all other code takes plain arguments. A file
in configs/ starts from `defaults()`, changes a few leaves and returns it:

    def get_config(variant=""):
        config = defaults()
        config.model.folder = "stable-diffusion-v1-5/stable-diffusion-v1-5"
        return config
"""

import copy
import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict, config_dict

from dmpo_jax.config.declare import ITSELF, Leaf, read_leaves
from dmpo_jax.config.sections import BOTH, RUN, Settings
from dmpo_jax.errors import UserError
from dmpo_jax.objectives import OBJECTIVES

if TYPE_CHECKING:
    Config = Settings
else:
    Config = ConfigDict

# Leaves of earlier versions that did not affect a run; their values are ignored.
RETIRED = frozenset({"train.compiled"})
# {dotted path: leaf}, without the objectives' hyperparameters.
LEAVES: dict[str, Leaf] = read_leaves(Settings)


def declared() -> dict[str, Leaf]:
    """Returns {dotted path: leaf} of all leaves, including those of every registered objective."""
    top = {path: declaration for path, declaration in LEAVES.items() if "." not in path}
    hyperparameters = {
        f"objectives.{name}.{argument}": Leaf(found.default, found.meaning, found.within, BOTH)
        for name, objective in OBJECTIVES.items()
        for argument, found in objective.declared.items()
    }
    return {**top, **hyperparameters, **LEAVES}


def defaults() -> Config:
    """Returns a new config with every leaf at its default; locked, so a misspelt leaf raises."""
    config: Any = ConfigDict({"objectives": {name: {} for name in OBJECTIVES}})
    for path, found in declared().items():
        unset = config_dict.placeholder(found.kind)
        set_leaf(config, path, unset if found.default is None else copy.copy(found.default))
    return config.lock()


def debug(config: Config, family: str) -> Config:
    """Sets a config to a tiny debug run: random weights, synthetic pairs, three steps, no files."""
    config.debug.family = family
    config.train.steps, config.train.batch_size = 3, 16
    config.optimizer.warmup_steps = 1
    config.data.validation_fraction, config.data.num_threads = 0.25, 2
    config.log.every = config.log.validate_every = 1
    config.log.sample_every = config.log.checkpoint_every = 3
    config.sample.steps, config.sample.count = 4, 2
    return config


def flatten(config: Config) -> dict[str, Any]:
    """Returns {dotted path: value} of every leaf; unset leaves are None, empty sections absent."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            section: Any = value
            flat |= {f"{name}.{path}": leaf for path, leaf in flatten(section).items()}
        else:
            flat[name] = value
    return flat


def from_flat(values: dict[str, Any]) -> Config:
    """Inverts `flatten`, also after a round trip through JSON.

    Hyperparameters of an objective that is not registered, because a config file defined it, are
    taken unchecked.

    Raises:
        ValueError: names a leaf that this version does not have.
    """
    config, known = defaults(), declared()
    for path, value in values.items():
        value = tuple(value) if isinstance(value, list) else value
        section, _, rest = path.partition(".")
        if section == "objectives" and rest.partition(".")[0] not in OBJECTIVES:
            with config.unlocked():
                set_leaf(config, path, value)
        elif path in known:
            set_leaf(config, path, value)
        elif path not in RETIRED:
            raise UserError(f"config leaf {path!r} is unknown to this version")
    return config


def set_leaf(config: Any, path: str, value: Any) -> None:
    """Sets a leaf; creates missing sections if the config is not locked."""
    *sections, name = path.split(".")
    for part in sections:
        if part not in config:
            config[part] = ConfigDict()
        config = config[part]
    config[name] = value


def nearest(path: str, known: Iterable[str]) -> str:
    """Returns the known dotted path that is most similar to `path`."""

    def ratio(a, b):
        return difflib.SequenceMatcher(None, a, b).ratio()

    def last(p):
        return p.rpartition(".")[2]

    # The last part counts once more: people forget sections more often than names.
    return max(known, key=lambda k: ratio(path, k) + ratio(last(path), last(k)))


def identity(config: Config) -> dict[str, Any]:
    """Settings that must match to resume a run, JSON-serialisable.

    Excludes settings that change rounding at most (mesh, threads), the length and logging of the
    run (train.steps, log, sample), and the other jobs. Includes train.steps if the learning rate
    decays towards it, and train.accumulation if something is computed over a microbatch.
    """
    nested: dict[str, Any] = {"objectives": {config.objective: {}}}
    counted = _affected(config, RUN)
    if config.train.accumulation > 1 and works_by_microbatch(config):
        counted["train.accumulation"] = config.train.accumulation
    for path, value in counted.items():
        *sections, name = path.split(".")
        section = nested
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return nested


def places() -> dict[str, str]:
    """Returns {leaf: content that it names} of the leaves that are paths (`Leaf.content`)."""
    return {path: found.content for path, found in declared().items() if found.content}


def works_by_microbatch(config: Config) -> bool:
    """True if the update depends on how its pairs are cut into microbatches."""
    coupled = couples_pairs(config) and config.train.group is None
    return bool(coupled or (config.lora.rank and config.lora.dropout))


def couples_pairs(config: Config) -> bool:
    """True if a pair's gradient depends on other pairs of the batch."""
    objective = OBJECTIVES.get(config.objective)
    return bool((objective and objective.couples_pairs) or config.safeguard.mu is not None)


def _affected(config: Config, what: str) -> dict[str, Any]:
    """Returns the leaves that count for `what`: "run" or "program".

    Those of the chosen objective always count; the others as `affects` and `counts_with` say.
    """
    flat, known = flatten(config), declared()
    changed = {path for path, found in known.items() if flat.get(path) != found.default}
    counted = {}
    for path, value in flat.items():
        section, _, rest = path.partition(".")
        if section == "objectives":
            counts = rest.startswith(f"{config.objective}.")
        else:
            found = known[path]
            others = [path if p == ITSELF else p for p in found.counts_with.split()]
            counts = what in found.affects.split() and (not others or changed & set(others))
        if counts:
            counted[path] = list(value) if isinstance(value, tuple) else value
    return counted
