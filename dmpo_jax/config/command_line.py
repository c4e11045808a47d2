"""A launch script's flags: a config file, overrides of its leaves, and absl's own.

    flags.run(main, check=...)   # main(config: ConfigDict) -> None

`--config=PATH[:ARGUMENT]` names a file whose `get_config(ARGUMENT)` returns the config, and
`--config.section.key=value` overrides a leaf, as ml_collections' config_flags has it. That
library ends an unknown key in a traceback, reads `--config.jobs=encode,train` as one job,
and wants --config first; hence our own reading.
"""

import ast
import runpy
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict

from dmpo_jax.config.console import in_words, log_to_console
from dmpo_jax.config.leaves import describe, leaves, nearest

__all__ = ["apply_overrides", "in_words", "load", "log_to_console", "run", "split"]

_HELP = {"--help", "-help", "-h", "--helpshort", "--helpfull", "-?"}


def run(
    main: Callable[[ConfigDict], object],
    *,
    default: str = "",
    check: Callable[[ConfigDict], object] | None = None,
) -> None:
    """Reads the command line and calls `main` with the config; does not return.

    Whatever is wrong with the command line, the config file's values or the config ends
    the process with status 1 and a short message, before `main`, and so before anything
    is compiled. `main` raising ends it as `in_words` has it.

    Args:
        main: the script's work.
        default: the --config where the command line has none; '' requires one.
        check: raises ValueError for a config that cannot be run, as `config_checks.validate`.
    """
    flags.DEFINE_string("config", default, "config file, PATH.py or PATH.py:ARGUMENT")
    config = ConfigDict()

    def parse(argv: list[str]) -> list[str]:
        nonlocal config
        if _HELP & set(argv):
            print(sys.modules["__main__"].__doc__ or "", flags.FLAGS.main_module_help(), sep="\n")
            print("\nEvery leaf of a config, as --config.LEAF=VALUE, with its default:\n")
            print(describe())
            sys.exit(0)
        try:
            argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=True)
            rest, overrides = split(argv)
            positional = flags.FLAGS(rest)
            config = load(flags.FLAGS["config"].value or "")
            apply_overrides(config, overrides)
            if check is not None:
                check(config)
        except (flags.Error, ValueError) as error:
            print(f"{argv[0]}: {error}", file=sys.stderr)
            sys.exit(1)
        return positional

    def with_config(argv: list[str]) -> None:
        if argv[1:]:
            print(f"{argv[0]}: takes flags only, but got {argv[1:]}", file=sys.stderr)
            sys.exit(1)
        in_words(main)(config)

    app.run(with_config, flags_parser=parse)


def load(path: str) -> ConfigDict:
    """The config of `PATH.py` or `PATH.py:ARGUMENT`, locked.

    Raises:
        ValueError: if there is no such file, it has no get_config, or it sets a leaf that
            is not there or to another type.
    """
    file, _, argument = path.partition(":")
    if not file:
        raise ValueError("--config must name a config file: --config=configs/NAME.py")
    try:
        module = runpy.run_path(file)
    except OSError as error:
        raise ValueError(f"--config={path}: cannot read {file} ({error.strerror})") from None
    if "get_config" not in module:
        raise ValueError(f"--config={path}: {file} must define get_config()")
    try:
        config = module["get_config"](*([argument] if argument else []))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # Locked configs answer a misspelt leaf with these; the message says which.
        said: Any = error
        while isinstance(said, BaseException) and said.args:
            said = said.args[0]  # ml_collections raises an AttributeError of a KeyError
        raise ValueError(f"--config={path}: {file}{_line_in(error, file)}: {said}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"--config={path}: get_config() must return a ConfigDict, got {config!r}")
    return config.lock()


def split(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Command line -> (what is left for absl, {dotted path: text} of `--config.PATH` flags).

    `--config.PATH=TEXT` and `--config.PATH TEXT`; `--config.PATH` alone is true and
    `--noconfig.PATH` false. A later one replaces an earlier; `--` ends the flags.
    """
    rest, overrides, i = [], {}, 0
    while i < len(argv) and argv[i] != "--":
        name, equals, text = argv[i].partition("=")
        flag = name.removeprefix("-").removeprefix("-") if name.startswith("-") else ""
        i += 1
        if flag.startswith("noconfig.") and not equals:
            overrides[flag.removeprefix("noconfig.")] = "false"
        elif flag.startswith("config."):
            if not equals:
                takes_next = i < len(argv) and not _is_flag(argv[i])
                text = argv[i] if takes_next else "true"
                i += takes_next
            overrides[flag.removeprefix("config.")] = text
        else:
            rest.append(argv[i - 1])
    return rest + argv[i:], overrides


def apply_overrides(config: ConfigDict, overrides: dict[str, str]) -> None:
    """Sets leaves of `config`, in place, from text.

    Raises:
        ValueError: for a path that is no leaf, naming the nearest that is, or a text
            that does not say a value of the leaf's type.
    """
    known = list(leaves(config))
    for path, text in overrides.items():
        flag = f"--config.{path}={text}"
        if path not in known:
            inside = [k for k in known if k.startswith(path + ".")]
            if inside:
                raise ValueError(f"{flag}: {path} is a section; its leaves are {', '.join(inside)}")
            raise ValueError(
                f"{flag}: there is no {path}; did you mean --config.{nearest(path, known)}?"
            )
        *sections, name = path.split(".")
        section: Any = config
        for part in sections:
            section = section[part]
        kind = section.get_type(name)
        try:
            section[name] = _read(text, kind)
        except ValueError:
            raise ValueError(f"{flag}: {path} must be {_WORDS[kind]}, but got {text!r}") from None


_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    tuple: "names with commas between them",
}


def _read(text: str, kind: type) -> Any:
    """The value of type `kind` that `text` says; ValueError if it says none."""
    if kind is bool:
        truths = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in truths:
            raise ValueError(text)
        return truths[text.lower()]
    if kind is tuple:
        if text.startswith(("(", "[")):
            try:
                return tuple(ast.literal_eval(text))
            except (SyntaxError, TypeError) as error:
                raise ValueError(text) from error
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return kind(text)


def _is_flag(text: str) -> bool:
    """Whether a word starts a flag; '-1' and '-.5' are values."""
    return text.startswith("-") and not text[1:2].isdigit() and text[1:2] != "."


def _line_in(error: BaseException, file: str) -> str:
    """':LINE' of `file` that raised, or ''."""
    trace, line = error.__traceback__, ""
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            line = f":{trace.tb_lineno}"
        trace = trace.tb_next
    return line
