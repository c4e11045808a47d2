"""Rows of raw data: what they yield, their limits, and `guard`, which turns a fault into a skip.

A fault of a row skips that row and never ends a job. All code that reads or interprets the data of
a row runs inside `guard`.
"""

import concurrent.futures
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from dmpo_jax.errors import UserError, printable

LOG = logging.getLogger(__name__)
T = TypeVar("T")

# Limits of one row. What exceeds them is no training data.
MAX_PIXELS = 8192 * 8192  # of an image
MAX_RATIO = 32  # of the longer side of an image to the shorter
MAX_BYTES = 256 * 2**20  # of the encoded images of a row
MAX_TEXT = 2**15  # characters of a prompt or an id
MAX_SECONDS = 120  # to decode and resize the images of a pair

MAX_SHOWN = 300  # characters of an id or a reason's detail in messages
_SLICES = 10  # of MAX_SECONDS


class RawPair(NamedTuple):
    """Two encoded images (JPEG, PNG, ...) of one prompt, in the order of the source.

    preference: the probability, in [0, 1], that image 0 is preferred; 0.5 is a tie.
    source: the encoded image that both images edit or repaint. mask: an encoded image of the
    source's shape, white where the source is repainted.
    """

    id: str
    prompt: str
    images: tuple[bytes, bytes]
    preference: float
    source: bytes | None = None
    mask: bytes | None = None


class Skipped(NamedTuple):
    """A row, or one pair of a row, that yields no pair.

    reason: a few words, the same for every such row. bad: True for a bad record, False for a
    record skipped by rule (no label, a tie where ties are dropped).
    """

    id: str
    reason: str
    detail: str = ""
    bad: bool = True


class SkipError(Exception):
    """Signals, inside `guard`, that a row must be skipped; becomes a `Skipped`."""

    def __init__(self, reason: str, detail: str = "", *, bad: bool = True):
        super().__init__(reason, detail, bad)
        self.reason, self.detail, self.bad = reason, detail, bad

    def at(self, name: str) -> Skipped:
        name, detail = shown(name), shown(self.detail)
        return Skipped(name, self.reason, detail, self.bad)


class Row(NamedTuple):
    """A row that is not read yet.

    fetch: returns the cells by column. load: a cell -> its encoded image. Both may raise any error
    and run inside `guard`.
    """

    name: str
    fetch: Callable[[], Mapping[str, Any]]
    load: Callable[[Any], bytes]


def guard(name: str, work: Callable[[], T], *, timed: bool = False) -> T | Skipped:
    """Returns the result of `work` on the data of a row, or the reason to skip the row.

    Args:
        name: of the row.
        timed: wait MAX_SECONDS at most. `work` then runs in a thread of its own, which goes on
            after that: it must not use what other rows use, such as an open file.

    Raises:
        UserError, OSError: the fault is not of the row but of its file, of the storage or of the
            settings. Code that opens what a row names raises SkipError instead.
    """
    try:
        return _within_time(work) if timed else work()
    except (UserError, OSError):
        raise
    except Exception as error:
        return to_skip(error).at(name)


def to_skip(error: Exception) -> SkipError:
    """Returns the reason to skip the row in which the error was raised."""
    if isinstance(error, SkipError):
        return error
    LOG.debug("a row is skipped", exc_info=error)
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError):
        return SkipError("out of memory", said)
    if isinstance(error, RecursionError):
        return SkipError("nested too deeply", said)
    if isinstance(error, UnicodeError):
        return SkipError("not UTF-8", said)
    return SkipError("unreadable", said)


def shown(text: str) -> str:
    """Returns an id or a detail as messages show it: on one line, not too long."""
    return printable(text, keep="")[:MAX_SHOWN]


def check_text(text: Any, what: str) -> str:
    """Returns a text that can be stored; raises SkipError for any other value.

    what: names it, as in "no prompt".
    """
    if text is None:
        raise SkipError(f"no {what}")
    if not isinstance(text, str):
        raise SkipError(f"no {what}", f"should be a text, but is {text!r:.80}")
    if len(text) > MAX_TEXT:
        raise SkipError(f"absurd {what}", f"{len(text)} characters, above {MAX_TEXT}")
    text.encode()  # a lone surrogate cannot be: JSON may hold one, written as an escape
    return text


def _within_time(work: Callable[[], T]) -> T:
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    # A daemon: Python would wait for any other thread before it exits.
    threading.Thread(target=_settle, args=(future, work), daemon=True).start()
    for _ in range(_SLICES):  # a process that was suspended loses one slice, not all of them
        concurrent.futures.wait([future], MAX_SECONDS / _SLICES)
        if future.done():
            return future.result()
    raise SkipError("too slow", f"not done within {MAX_SECONDS} s")


def _settle(future: concurrent.futures.Future, work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)
