"""How a command speaks: errors in words, messages as plain lines."""

import errno
import functools
import linecache
import logging
import pathlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

from absl import flags

from dmpo_jax.parallel import processes

DEBUG = flags.DEFINE_bool("debug", False, "show where an error in words was raised")
_PACKAGE = str(pathlib.Path(__file__).parent)
_NEEDS_A_PERSON = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def in_words(main: Callable[[Any], object]) -> Callable[[Any], None]:
    """`main`, for absl's app.run, of which an error that we raise in words shows nothing else.

    Other errors are bugs, or another library's, and show their traceback too. Either ends
    the process with status 1, and with it the others of its job; the loss of one of those,
    with `processes.RESTART`.
    """

    @functools.wraps(main)
    def call(argument: Any) -> None:
        try:
            main(argument)
        except Exception as error:
            if processes.is_lost_peer(error):
                processes.end_for_lost_peer(error)
            words = words_of(error)
            if not words or (DEBUG.present and DEBUG.value):
                traceback.print_exc()
            processes.end(1, words or f"{type(error).__name__}: {error}")

    return call


def words_of(error: BaseException) -> str:
    """What an error says, where that is meant for a person; '' where it is not."""
    if isinstance(error, OSError) and error.errno in _NEEDS_A_PERSON:
        return f"{error.filename or 'a file'}: {error.strerror}"
    frames = traceback.extract_tb(error.__traceback__)
    # Our own statement, and not what a library raised when we called it.
    if not frames or not frames[-1].filename.startswith(_PACKAGE):
        return ""
    line = linecache.getline(frames[-1].filename, frames[-1].lineno or 0)
    return str(error) if line.lstrip().startswith("raise ") else ""


def log_to_console() -> None:
    """Our own messages as plain lines, other libraries' from warnings up.

    Tracebacks that libraries log or print, as Orbax does of every thread that one error
    passes through, are left out but with --debug: the error itself comes too.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    if not (DEBUG.present and DEBUG.value):
        for handler in logging.getLogger().handlers:
            handler.addFilter(_without_traceback)
        sys.excepthook = _print_exception
        sys.unraisablehook = _print_unraisable
    logging.getLogger("dmpo_jax").setLevel(logging.INFO)


def _without_traceback(record: logging.LogRecord) -> bool:
    record.exc_info = record.exc_text = None
    return True


def _print_exception(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    # What tensorstore's threads come back to after a write that failed, once for each array.
    if str(error) != "Event loop is closed":
        sys.__excepthook__(kind, error, trace)


def _print_unraisable(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
