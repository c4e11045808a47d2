"""The commands as Python functions: what `import dmpo_jax as dj` offers."""

import inspect
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from dmpo_jax.commands import COMMANDS
from dmpo_jax.config import parsing
from dmpo_jax.config.leaves import Config, declared


def python_function(name: str) -> Callable[..., Any]:
    """The command as a function: `config` and, by keyword, what its flags are called.

    It returns what the job does, and raises ValueError where the command would end with a
    message.
    """
    command = COMMANDS[name]

    def call(config: Config | str | None = None, **keywords: Any) -> Any:
        found, options = parsing.from_keywords(name, config, keywords, command.interface)
        command.check(found, options)
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
    """Runs the jobs that a config names, for most training, in `workdir`; returns the workdir.

    Args:
        config: a config, or what --config takes. `config.jobs` says what is done.
        workdir: the run's folder; a second run in it resumes.
        hooks: objects with `every` (updates) that training calls beside its own.
    """
    command, keywords = COMMANDS["train"], {"workdir": str(workdir)}
    found, options = parsing.from_keywords("train", config, keywords, command.interface)
    command.check(found, options)
    return command.call(found, options | ({"hooks": tuple(hooks)} if hooks else {}))
