"""Configs: their defaults, what is in them, and what of them a run's checkpoints depend on.

Only `jobs` and `config` read a config; all else takes plain arguments. A file in configs/ starts
from `defaults()`, changes a few leaves and returns it:

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

# Leaves of earlier versions that changed nothing of what a run is: their values are not read.
RETIRED = frozenset({"train.compiled"})
# {dotted path: leaf}, less the objectives' hyperparameters.
LEAVES: dict[str, Leaf] = read_leaves(Settings)


def declared() -> dict[str, Leaf]:
    """{dotted path: leaf} of all there are, those of every objective known by now included."""
    top = {path: declaration for path, declaration in LEAVES.items() if "." not in path}
    hyperparameters = {
        f"objectives.{name}.{argument}": Leaf(found.default, found.meaning, found.within, BOTH)
        for name, objective in OBJECTIVES.items()
        for argument, found in objective.declared.items()
    }
    return {**top, **hyperparameters, **LEAVES}


def defaults() -> Config:
    """A new config with every leaf at its default; locked, so that a misspelt one raises."""
    config: Any = ConfigDict({"objectives": {name: {} for name in OBJECTIVES}})
    for path, found in declared().items():
        unset = config_dict.placeholder(found.kind)
        set_leaf(config, path, unset if found.default is None else copy.copy(found.default))
    return config.lock()


def debug(config: Config, family: str) -> Config:
    """The same run at tiny width: random weights, synthetic pairs, three steps, no files."""
    config.debug.family = family
    config.train.steps, config.train.batch_size = 3, 16
    config.data.validation_fraction, config.data.num_threads = 0.25, 2
    config.log.every = config.log.validate_every = 1
    config.log.sample_every = config.log.checkpoint_every = 3
    config.sample.steps, config.sample.count = 4, 2
    return config


def flatten(config: Config) -> dict[str, Any]:
    """{dotted path: value} of every leaf; empty sections have none, unset leaves are None."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            section: Any = value
            flat |= {f"{name}.{path}": leaf for path, leaf in flatten(section).items()}
        else:
            flat[name] = value
    return flat


def from_flat(values: dict[str, Any]) -> Config:
    """The inverse of `flatten`, also after a round trip through JSON.

    The hyperparameters of an objective that is not known here, since a config file defined it,
    are taken as they are.

    Raises:
        ValueError: naming a leaf that this version does not have.
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
    """Sets a leaf; makes the sections that it needs where the config is not locked."""
    *sections, name = path.split(".")
    for part in sections:
        if part not in config:
            config[part] = ConfigDict()
        config = config[part]
    config[name] = value


def nearest(path: str, known: Iterable[str]) -> str:
    """The known dotted path that `path` most likely meant."""

    def ratio(a, b):
        return difflib.SequenceMatcher(None, a, b).ratio()

    def last(p):
        return p.rpartition(".")[2]

    # The last part counts by itself: people forget sections more often than names.
    return max(known, key=lambda k: ratio(path, k) + ratio(last(path), last(k)))


def identity(config: Config) -> dict[str, Any]:
    """Settings that must match to resume a run, JSON-serialisable.

    Left out is all that changes rounding at most (mesh, accumulation, threads), how long
    or how chattily the run goes on (train.steps, log, sample), and the other jobs. Where
    the learning rate decays towards train.steps, that is part of it.
    """
    nested: dict[str, Any] = {"objectives": {config.objective: {}}}
    for path, value in _affected(config, RUN).items():
        *sections, name = path.split(".")
        section = nested
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return nested


def _affected(config: Config, what: str) -> dict[str, Any]:
    """The leaves that count: of the chosen objective, and where `counts_with` says so."""
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
