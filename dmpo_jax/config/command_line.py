"""Console output of the commands: log lines, and errors with or without a traceback."""

import functools
import logging
import traceback
from collections.abc import Callable
from typing import Any

from absl import flags

from dmpo_jax import errors, progress
from dmpo_jax.parallel import processes

DEBUG = flags.DEFINE_bool("debug", False, "show the traceback of errors that are for the user")


def in_words(main: Callable[[Any], object], stopped: str = errors.STOPPED) -> Callable[[Any], None]:
    """Wraps `main` for absl's app.run: an exception ends the process with an exit status.

    A UserError, or an OSError that needs a person (`errors.message_of`), prints its message. Any
    other exception is a bug and prints its traceback. Both end this process and the other
    processes of the job with status 1. Ctrl-C prints `stopped` and ends with 130; the loss of a
    process ends with `processes.RESTART`.
    """

    @functools.wraps(main)
    def call(argument: Any) -> None:
        try:
            main(argument)
        except KeyboardInterrupt:
            progress.stop_bars()
            processes.end(errors.INTERRUPTED, f"\n{stopped}")
        except Exception as error:
            progress.stop_bars()
            message = errors.message_of(error)
            if not message and processes.is_lost_peer(error):
                processes.end_for_lost_peer(error)
            if not message or _debugging():
                traceback.print_exc()
            processes.end(1, message or f"{type(error).__name__}: {error}")

    return call


def log_to_console() -> None:
    """Prints this package's messages as plain lines, and other libraries' from warnings up."""
    handler = progress.ConsoleHandler()
    handler.setFormatter((logging.Formatter if _debugging() else _OneLine)("%(message)s"))
    if not _debugging():
        handler.addFilter(_is_news)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("dmpo_jax").setLevel(logging.INFO)


def _is_news(record: logging.LogRecord) -> bool:
    """False for errors of Orbax: it logs one in each thread that it passes, and then raises it."""
    return record.levelno != logging.ERROR or "/orbax/" not in record.pathname


class _OneLine(logging.Formatter):
    """Drops tracebacks that libraries log, since `in_words` also receives the error."""

    def format(self, record: logging.LogRecord) -> str:
        return errors.printable(record.getMessage())


def _debugging() -> bool:
    return bool(DEBUG.present and DEBUG.value)
