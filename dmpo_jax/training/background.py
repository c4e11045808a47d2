"""Work that only records a run. It is done in a thread, so it can neither block nor end the run."""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

LOG = logging.getLogger(__name__)
CLOSE_SECONDS = 30.0  # for all that is left at the end of a run


class Background:
    """Calls functions one after the other in a daemon thread.

    One that raises is logged as a warning. One that hangs holds back those behind it: at most
    `size` of them wait, and the rest are dropped, with one warning.

    Args:
        what: is written, for messages.
        size: calls that may wait.
        once: after the first failure nothing more is called.
    """

    def __init__(self, what: str, *, size: int = 1000, once: bool = False):
        self._what, self._once, self._failed, self._full = what, once, False, False
        self._queue: queue.Queue[tuple[Callable[..., object], tuple] | None] = queue.Queue(size)
        self._thread = threading.Thread(target=self._work, daemon=True, name=what)
        self._thread.start()

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Has `function(*arguments)` called later; returns at once."""
        try:
            self._queue.put_nowait((function, arguments))
        except queue.Full:
            if not self._full:
                LOG.warning("%s hangs: the run goes on, but some of it is not written", self._what)
            self._full = True

    def close(self, deadline: float) -> None:
        """Waits for the calls until `deadline`, of time.monotonic(); then leaves them behind."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=max(deadline - time.monotonic(), 0))
        self._thread.join(max(deadline - time.monotonic(), 0))
        if self._thread.is_alive():
            LOG.warning("%s hangs: the last of it is not written", self._what)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            function, arguments = item
            if self._failed and self._once:
                continue
            try:
                function(*arguments)
            except Exception as error:  # every library and file system has its own
                self._failed = True
                rest = " and is off for the rest of the run" if self._once else ""
                LOG.warning("%s failed%s: %s: %s", self._what, rest, type(error).__name__, error)
