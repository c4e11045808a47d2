"""Progress of a long job: a bar on a terminal, plain lines elsewhere."""

import math
import time
from typing import Any

import jax
import rich.console
import rich.progress


class Progress:
    """Shows a job's progress and its remaining time. A context manager.

    A terminal gets a bar. Elsewhere (a log file, a cluster) it prints plain lines, one every
    `LINE_SECONDS` or tenth of the total, whichever comes first. Only process 0 shows anything.

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
        self._console = console or rich.console.Console(stderr=True)
        self._shows = jax.process_index() == 0
        self._began = self._last_line = time.monotonic()
        self._last_tenth = _tenths(start, total)
        self._bar: rich.progress.Progress | None = None
        if self._shows and self._console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[shown]}"),
                rich.progress.TimeElapsedColumn(),
                "ETA",
                rich.progress.TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.add_task(description, total=total, completed=start, shown="")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
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
            self._bar.update(self._bar.task_ids[0], completed=self._done, shown=self._shown())
            return
        now, tenth = time.monotonic(), _tenths(self._done, self._total)
        due = now - self._last_line >= self.LINE_SECONDS
        if due or tenth > self._last_tenth or self._done == self._total:
            self._last_line, self._last_tenth = now, tenth
            self._print_line(now)

    def close(self) -> None:
        """Stops the bar in its present state."""
        if self._bar is not None:
            self._bar.stop()

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
