"""The commands as Python functions, for `import dmpo_jax as dj`."""

import inspect
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from dmpo_jax.commands import COMMANDS
from dmpo_jax.config import parsing
from dmpo_jax.config.command_line import log_to_console
from dmpo_jax.config.configs import Config, declared


def python_function(name: str) -> Callable[..., Any]:
    """Returns the command as a function of `config` and of keywords named like its flags.

    The function returns the job's result. It raises ValueError where the command would end with
    a message.
    """
    command = COMMANDS[name]

    def call(config: Config | str | None = None, **keywords: Any) -> Any:
        found, options = parsing.from_keywords(name, config, keywords, command.interface)
        command.check(found, options)
        _show_log()
        return command.call(found, options)

    known, interface = declared(), command.interface
    defaults = {key: known[path].default for key, path in interface.short.items()}
    defaults |= {key: option.default for key, option in interface.options.items()}
    first = inspect.Parameter("config", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
    parameters = [first]
    for key, default in defaults.items():
        empty = inspect.Parameter.empty if key in interface.required else default
        parameters.append(inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=empty))
    call.__name__ = call.__qualname__ = name
    call.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    about = command.about.partition("\n")[0]
    own = parsing.describe(interface).replace("--", "")
    call.__doc__ = f"{about}\n\nconfig: a config, or what --config takes.\n\n{own}\n"
    return call


def train(config: Config | str, workdir: str | pathlib.Path, hooks: Sequence[Any] = ()) -> Any:
    """Runs the jobs of a config, usually training, in `workdir`; returns the workdir.

    Args:
        config: a config, or a value of --config. `config.jobs` lists the jobs.
        workdir: the run's folder; a second run in it resumes.
        hooks: further hooks (`training.hooks.HookLike`), called after the run's own.
    """
    command, keywords = COMMANDS["train"], {"workdir": str(workdir)}
    found, options = parsing.from_keywords("train", config, keywords, command.interface)
    command.check(found, options)
    _show_log()
    return command.call(found, options | ({"hooks": tuple(hooks)} if hooks else {}))


def _show_log() -> None:
    """Prints log lines as the commands do, unless the program has set up its own logging."""
    if not logging.getLogger().handlers:
        log_to_console()
