"""Config files: the package's own by name, any other by path."""

import pathlib
import runpy
from typing import Any

from ml_collections import ConfigDict

from dmpo_jax.config.configs import Config, nearest
from dmpo_jax.errors import UserError

_PACKAGE = pathlib.Path(__file__).parents[1]


def shipped() -> dict[str, pathlib.Path]:
    """Returns {name: file} of the shipped configs: inside the package, or beside it in a clone."""
    folders = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
    folder = next((folder for folder in folders if folder.is_dir()), None)
    return {file.stem: file for file in sorted(folder.glob("*.py"))} if folder else {}


def load_config(name: str) -> Config:
    """Loads the config `NAME`, `PATH.py`, `NAME:ARGUMENT` or `PATH.py:ARGUMENT`, locked.

    The file defines `get_config()`, or `get_config(argument)`.

    Raises:
        ValueError: there is no such config, it has no get_config, or it sets a leaf that
            does not exist or a leaf to another type.
    """
    start, _, argument = name.partition(":")
    file = _find(start)
    try:
        module = runpy.run_path(file)
    except OSError as error:
        raise UserError(f"--config={name}: cannot read {file} ({error.strerror})") from None
    if "get_config" not in module:
        raise UserError(f"--config={name}: {file} must define get_config()")
    try:
        config: Any = module["get_config"](*([argument] if argument else []))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # Locked configs raise these for a misspelt leaf; the message names it.
        said: Any = error
        while isinstance(said, BaseException) and said.args:
            said = said.args[0]  # ml_collections wraps a KeyError in an AttributeError
        raise UserError(f"--config={name}: {file}{_line_in(error, file)}: {said}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={name}: get_config() must return a ConfigDict, got {config!r}")
    config.lock()
    return config  # pyright: ignore[reportReturnType]


def _find(start: str) -> str:
    """Returns the file of a name or path."""
    known = shipped()
    if start in known:
        return str(known[start])
    if pathlib.Path(start).exists():
        return start
    near = nearest(pathlib.Path(start).stem, known) if known else ""
    near = f"did you mean --config={near}? " if near else ""
    what = "no such file" if start.endswith(".py") else "no config of this name"
    raise UserError(
        f"--config={start}: there is {what}; {near}There are {', '.join(known)}; "
        "a file of your own is named by its path, PATH.py"
    )


def _line_in(error: BaseException, file: str) -> str:
    """Returns ':LINE' of `file` that raised, or ''."""
    trace, line = error.__traceback__, ""
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            line = f":{trace.tb_lineno}"
        trace = trace.tb_next
    return line
