"""Parses a command line, or Python keywords, to a config and the command's other options.

Each leaf is one absl flag, `--config.train.steps`; a command's short name is the same flag.
`ml_collections.config_flags` does less (tried with 1.1.0): it reads `--config.jobs=encode,train`
as one job, rejects an override before --config, and prints a traceback for an unknown key.
"""

import ast
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from absl import flags

from dmpo_jax import storage
from dmpo_jax.config import checks
from dmpo_jax.config.configs import Config, declared, defaults, flatten, nearest, set_leaf
from dmpo_jax.config.declare import Leaf
from dmpo_jax.config.files import load_config
from dmpo_jax.errors import UserError

HELP = {"--help", "-help", "-h", "--helpshort", "--helpfull", "-?"}


@dataclasses.dataclass(frozen=True)
class Interface:
    """Arguments of a command, by flag and by Python keyword.

    Attributes:
        short: the command's own name of a leaf -> the leaf's path.
        options: arguments that are not leaves of a config, declared likewise.
        required: names in either that must be given, or set by the config.
        config: default of --config; None makes it required.
        first: an option that a first word without its flag sets.
    """

    short: Mapping[str, str]
    options: Mapping[str, Leaf]
    required: tuple[str, ...] = ()
    config: str | None = ""
    first: str = ""


def parse(argv: list[str], interface: Interface) -> tuple[Config, dict[str, Any]]:
    """Parses a command line to (config, options).

    Raises:
        ValueError: the message names the faulty flag and its fault, or the nearest known flag.
    """
    if interface.first and argv[1:] and not argv[1].startswith("-"):
        argv = [argv[0], f"--{interface.first}={argv[1]}", *argv[2:]]
    config = _open(named_config(argv), interface)
    known = _flags_of(config, interface)
    try:
        stray = known(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        raise UserError(_unknown(error.flagname, error.flagvalue, config, interface)) from None
    except flags.Error as error:
        raise UserError(str(error)) from None
    if stray:
        raise UserError(f"takes flags only, but got {stray}")
    flags.FLAGS.mark_as_parsed()  # `known` includes absl's own and --debug
    for path in flatten(config):
        if known[f"config.{path}"].present:
            set_leaf(config, path, known[f"config.{path}"].value)
    options = {name: known[name].value for name in interface.options}
    _check(config, options, interface, "--")
    return config, options


def from_keywords(
    command: str, config: Config | str | None, keywords: Mapping[str, Any], interface: Interface
) -> tuple[Config, dict[str, Any]]:
    """Converts a call from Python to (config, options); `config` itself is not changed.

    Args:
        command: its name, for messages.
        config: a config, or a value of --config.
        keywords: named like the command's flags.

    Raises:
        TypeError: unknown keyword. ValueError: as `parse`.
    """
    if config is None or isinstance(config, str):
        config = _open(config, interface)
    found: Config = config.copy_and_resolve_references()
    options = {name: option.default for name, option in interface.options.items()}
    for name, value in keywords.items():
        if name in options:
            options[name] = value
        elif name in interface.short:
            set_leaf(found, interface.short[name], value)
        else:
            near = nearest(name, [*interface.short, *options])
            raise TypeError(f"{command}() takes no {name!r}; did you mean {near!r}?")
    _check(found, options, interface, "")
    return found, options


def describe(interface: Interface) -> str:
    """Returns one line of help for each of the command's own flags."""
    known, lines = declared(), []
    for name, option in interface.options.items():
        lines.append(_line(name, option, "", name in interface.required))
    for name, path in interface.short.items():
        lines.append(_line(name, known[path], f" ({path})", name in interface.required))
    return "\n".join(lines)


def _line(name: str, leaf: Leaf, of: str, required: bool) -> str:
    default = ",".join(leaf.default) if isinstance(leaf.default, tuple) else leaf.default
    shown = "" if leaf.default in (None, "") else f"={default}"
    text = "; ".join(filter(None, (leaf.meaning, leaf.words, "required" if required else "")))
    return f"  {'--' + name + shown:<32}{text}{of}"


def _open(named: str | None, interface: Interface) -> Config:
    named = named or interface.config
    if named is None:
        raise UserError("--config must name a config: --config=NAME, or --config=PATH.py")
    return load_config(named) if named else defaults()


def named_config(argv: list[str]) -> str | None:
    """Returns the last --config. Its file may define leaves, so it is read before other flags."""
    probe = flags.FlagValues()
    probe.set_gnu_getopt(True)
    flags.DEFINE_string("config", None, "", flag_values=probe)
    try:
        probe(argv, known_only=True)
    except flags.Error as error:
        raise UserError(str(error)) from None
    return probe["config"].value


def _flags_of(config: Config, interface: Interface) -> flags.FlagValues:
    """Returns the flags of every leaf and option, with absl's own."""
    known, found = declared(), flags.FlagValues()
    found.set_gnu_getopt(True)
    flags.DEFINE_string("config", None, "", flag_values=found)
    for path in flatten(config):
        # Leaves of an objective that only a saved config knows are not declared.
        leaf = known.get(path) or Leaf(flatten(config)[path], "")
        found[f"config.{path}"] = _flag(f"config.{path}", path, leaf)
    for name, path in interface.short.items():
        found[name] = found[f"config.{path}"]
    for name, option in interface.options.items():
        found[name] = _flag(name, f"--{name}", option)
    for name in flags.FLAGS:
        # A flag with a short name, such as -v, registers both names itself.
        if name not in found and name == flags.FLAGS[name].name:
            found[name] = flags.FLAGS[name]
    return found


def _flag(name: str, called: str, leaf: Leaf) -> flags.Flag:
    flag = flags.Flag(_Parser(called, leaf), None, name, None, leaf.meaning)
    flag.boolean = leaf.kind is bool  # --name and --noname
    flag.value = leaf.default
    return flag


class _Parser(flags.ArgumentParser):
    """Parses a leaf's value from text; raises ValueError with a message for the user."""

    def __init__(self, called: str, leaf: Leaf):
        self._called, self._leaf = called, leaf

    def parse(self, text: str) -> Any:
        kind, named = self._leaf.kind, self._leaf.named
        try:
            value = named[text] if text in named else _read(text, kind)
        except ValueError:
            words = " or ".join([_WORDS[kind], *named])
            raise UserError(f"{self._called} must be {words}, but got {text!r}") from None
        if not self._leaf.fits(value):
            raise UserError(f"{self._called} {self._leaf.wrong(text)}")
        return value


_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    tuple: "names with commas between them",
}


def _read(text: str, kind: type) -> Any:
    """Parses text as a value of type `kind`; raises ValueError if it is not one."""
    if kind is bool:
        truths = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in truths:
            raise UserError(text)
        return truths[text.lower()]
    if kind is tuple:
        if text.startswith(("(", "[")):
            try:
                return tuple(ast.literal_eval(text))
            except (SyntaxError, TypeError) as error:
                raise UserError(text) from error
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return kind(text)


def _unknown(name: str, argument: str, config: Config, interface: Interface) -> str:
    if name.startswith(("config.", "noconfig.")):
        path, leaves = name.partition(".")[2], list(flatten(config))
        inside = [leaf for leaf in leaves if leaf.startswith(f"{path}.")]
        if inside:
            return f"{argument}: {path} is a section; its leaves are {', '.join(inside)}"
        near = nearest(path, leaves)
        return f"{argument}: there is no {path}; did you mean --config.{near}?"
    if leaves := [leaf for leaf in declared() if leaf.rpartition(".")[2] == name]:
        near = " or ".join(f"--config.{leaf}" for leaf in leaves)
        return f"{argument}: there is no flag --{name}; did you mean {near}?"
    near = nearest(name, ["config", *interface.short, *interface.options])
    return f"{argument}: there is no flag --{name}; did you mean --{near}?"


def _check(config: Config, options: Mapping[str, Any], interface: Interface, dashes: str) -> None:
    """Raises ValueError if a required argument is missing or a value is out of range."""
    given = {name: flatten(config)[path] for name, path in interface.short.items()} | dict(options)
    for name in interface.required:
        if given[name] in (None, "", ()):
            path = interface.short.get(name)
            leaf = declared()[path] if path else interface.options[name]
            raise UserError(f"{dashes}{name} is required: {leaf.meaning}")
    for name, option in interface.options.items():
        if not option.fits(options[name]):
            raise UserError(f"{dashes}{name} {option.wrong(options[name])}")
    checks.check_leaves(config)
    for name, value in (given | flatten(config)).items():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, str) and (found := re.search(r"(?:^|[:=])([a-z0-9]+://.*)", part)):
                leaf = "" if name in given or not dashes else "config."
                try:
                    storage.check_filesystem(found[1])
                except UserError as error:
                    raise UserError(f"{dashes}{leaf}{name}: {error}") from error
