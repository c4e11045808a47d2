"""Stops training on a signal, and ends the process if training hangs."""

import faulthandler
import logging
import os
import signal
import threading
import time
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

from dmpo_jax.errors import INTERRUPTED
from dmpo_jax.parallel import processes

LOG = logging.getLogger(__name__)


class Stopping:
    """Makes SIGTERM and Ctrl-C stop every process after the same update, once it has saved.

    A single process uses its own handlers; a second Ctrl-C does not wait. With several, a signal
    to any one of them is enough: JAX, which catches SIGTERM once the processes have joined,
    agrees with the others on an update that none has begun. A context manager, entered and left
    by the main thread.
    """

    def __init__(self):
        self._many = jax.process_count() > 1
        self._signal: signal.Signals | None = None
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stopping":
        for number in (signal.SIGINT,) if self._many else (signal.SIGTERM, signal.SIGINT):
            try:
                self._old[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not the main thread: the embedding program decides
                LOG.warning("%s is not handled outside the main thread", number.name)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def asked(self, number: int) -> bool:
        """True if the run must end after saving update `number`; asked once an update, by all."""
        if self._many:
            return multihost_utils.reached_preemption_sync_point(number)
        return self._signal is not None

    def leave(self, number: int, *, alarm: bool = False) -> NoReturn:
        """Ends the process with the exit status of shells for a signal.

        alarm: an alarm ends it, unless a signal has. The status is then Ctrl-C's, as the decision
            is a person's: launchers run the same command again after SIGTERM's.
        """
        if jax.process_index() == 0:
            why = " by an alarm (train.stop_on_alarm)" if alarm else ""
            words = f"stopped{why} at step {number}, saved; the same command resumes"
            print(words, flush=True)
        if alarm and self._signal is None:
            raise SystemExit(INTERRUPTED)
        raise SystemExit(128 + int(self._signal or signal.SIGTERM))

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._many:
            os.kill(os.getpid(), signal.SIGTERM)  # the signal that JAX handles
            return
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number)
        print(f"\n{self._signal.name}: saving after this step ...", flush=True)


class Watchdog:
    """Ends the process with processes.RESTART if no update begins for `limit` seconds.

    Catches hangs that raise no error: a collective that a dead or stuck process never joins, or
    a disk that does not answer. Prints the stack of every thread. A context manager.

    Args:
        limit: seconds; 0 never ends anything.
    """

    SLOW = 3  # limits for work that may compile first, or writes much

    def __init__(self, limit: float | int):
        self._limit = limit
        self._done = threading.Event()
        self.alive("the first update", slow=True)

    def __enter__(self) -> "Watchdog":
        if self._limit > 0:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()

    def alive(self, doing: str, *, slow: bool = False) -> None:
        """Restarts the clock. doing: what begins now, for the message."""
        allowed = self._limit * (self.SLOW if slow else 1)
        self._now = doing, allowed, time.monotonic() + allowed  # one assignment: read by a thread

    def _watch(self) -> None:
        while True:
            doing, allowed, until = self._now
            left = until - time.monotonic()
            if self._done.wait(max(left, 0)):
                return
            if left <= 0:
                break
        faulthandler.dump_traceback()
        processes.abort(
            processes.RESTART,
            f"{doing} has not come to an end within {allowed:g} s (train.hang_limit): a process "
            "or a disk hangs, see the stacks above. Run the same command again to resume from "
            "the newest checkpoint",
        )
