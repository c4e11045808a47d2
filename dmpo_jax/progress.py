"""Progress of a long job and log lines beside it: a bar on a terminal, plain lines elsewhere."""

import contextlib
import functools
import logging
import math
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import rich.console
import rich.progress
import rich.text

LOG = logging.getLogger(__name__)
EVERY = 30.0  # seconds between two lines about one activity
_bars: list["_Bar"] = []  # the one on the terminal, if any
_activities: list[threading.Event] = []  # their ends, the innermost last


@functools.cache
def standard_error() -> rich.console.Console:
    """Returns the console of bars and log lines."""
    return rich.console.Console(stderr=True)


class ConsoleHandler(logging.Handler):
    """Prints log records as lines on the console: above its bar, never beside it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # soft_wrap: a path or a command that is cut in two lines cannot be copied.
            plain: dict[str, Any] = dict.fromkeys(("markup", "highlight", "emoji"), False)
            standard_error().print(self.format(record), soft_wrap=True, **plain)
        except Exception:
            self.handleError(record)


class _Bar(rich.progress.Progress):
    """A bar a task, and under each its values: beside it they leave no room at 80 columns."""

    def get_renderables(self) -> Iterable[rich.console.RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if shown := "  ".join(filter(None, (task.fields["doing"], task.fields["shown"]))):
                yield rich.text.Text(f"  {shown}", no_wrap=True, overflow="ellipsis")


class Progress:
    """Shows a job's progress and its remaining time. A context manager.

    A terminal gets a bar; a job within a job has a second one, which goes with it. Elsewhere (a
    log file, a cluster) it prints plain lines, one every `LINE_SECONDS` or tenth of the total,
    whichever comes first. Only process 0 shows anything.

    Args:
        total: number of units (steps, images, ...).
        start: units done already, as after a resume; excluded from the speed.
        description: the job, in a word or two.
        console: the output; by default standard error.
    """

    LINE_SECONDS = 10.0

    def __init__(
        self,
        total: int,
        start: int = 0,
        description: str = "",
        *,
        console: rich.console.Console | None = None,
    ):
        self._total, self._start, self._done = total, start, start
        self._description = description
        self._fields: dict[str, Any] = {}
        self._console = console or standard_error()
        self._shows = jax.process_index() == 0
        self._began = self._last_line = time.monotonic()
        self._last_tenth = _tenths(start, total)
        self._bar: _Bar | None = None
        self._task = rich.progress.TaskID(0)

    def __enter__(self) -> "Progress":
        drawn = self._console.is_terminal and not self._console.is_dumb_terminal
        if not (self._shows and drawn and self._total > self._start):
            return self
        self._bar = next((bar for bar in _bars if bar.console is self._console), None)
        inner = self._bar is not None
        if self._bar is None:
            self._bar = _Bar(
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TimeElapsedColumn(),
                "ETA",
                rich.progress.TimeRemainingColumn(),
                console=self._console,
            )
        self._task = self._bar.add_task(
            self._description, total=self._total, completed=self._start, shown="", doing=""
        )
        if not inner:
            _bars.append(self._bar)
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def advance(self, n: int = 1, **fields: Any) -> None:
        """Counts `n` more units as done.

        Args:
            n: number of units.
            **fields: values to show, such as loss, implicit_accuracy or pairs_per_second; the
                last value of each stays visible.
        """
        self._done += n
        self._fields |= fields
        if not self._shows:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, shown=self._shown())
            return
        now, tenth = time.monotonic(), _tenths(self._done, self._total)
        due = now - self._last_line >= self.LINE_SECONDS
        if due or tenth > self._last_tenth or self._done == self._total:
            self._last_line, self._last_tenth = now, tenth
            self._print_line(now)

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Shows an activity that counts no unit, such as a validation, while the block runs."""
        if self._bar is None:
            with reported(what, at_start=False):
                yield
            return
        self._bar.update(self._task, doing=f"{what} ...")
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.update(self._task, doing="")

    def close(self) -> None:
        """Ends the bar in its present state; that of a job within a job disappears."""
        bar, self._bar = self._bar, None
        if bar is None:
            return
        if bar.tasks[0].id == self._task:
            stop_bars()
        else:
            bar.remove_task(self._task)

    def _print_line(self, now: float) -> None:
        speed = (self._done - self._start) / max(now - self._began, 1e-9)
        left = (self._total - self._done) / speed if speed else math.inf
        percent = 100 * self._done // max(self._total, 1)
        parts = [f"{self._description} {self._done}/{self._total} ({percent} %)".strip()]
        parts += [self._shown()] if self._fields else []
        parts += [f"ETA {_duration(left)}" if self._done < self._total else "done"]
        # Not console.print: it wraps lines at the console's width, and a log has none.
        print("  ".join(parts), file=self._console.file, flush=True)

    def _shown(self) -> str:
        return "  ".join(f"{_LABELS.get(k, k)} {_number(v)}" for k, v in self._fields.items())


def stop_bars() -> None:
    """Ends the bar on the terminal, if any: what is printed next stands below it."""
    while _bars:
        _bars.pop().stop()


@contextlib.contextmanager
def reported(what: str, *, at_start: bool = True) -> Iterator[None]:
    """Logs an activity, at its start and every `EVERY` seconds: compiling takes minutes.

    Of activities within each other the innermost alone is logged.
    """
    done, began = threading.Event(), time.monotonic()

    def watch() -> None:
        while not done.wait(EVERY):
            if _activities[-1:] == [done]:
                LOG.info("%s, %.0f s", what, time.monotonic() - began)

    thread = threading.Thread(target=watch, daemon=True)
    if at_start:
        LOG.info("%s ...", what)
    _activities.append(done)
    thread.start()
    try:
        yield
    finally:
        done.set()
        _activities.remove(done)
        thread.join()


_LABELS = {"implicit_accuracy": "accuracy", "pairs_per_second": "pairs/s"}


def _number(value: Any) -> str:
    return value if isinstance(value, str) else f"{float(value):.4g}"


def _tenths(done: int, total: int) -> int:
    return 10 * done // max(total, 1)


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "unknown"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
