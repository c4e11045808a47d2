"""The page of a run, `WORKDIR/report/training.html`: curves, alarms, grids, settings, speed.

It is rewritten as training goes, in a thread of its own (`metrics.MetricsWriter`), and needs no
server, no script and no network.
"""

import dataclasses
import datetime
import functools
import io
import json
import logging
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np
from etils import epath
from PIL import Image

from dmpo_jax import storage
from dmpo_jax.pages import templates
from dmpo_jax.pages.charts import Chart, Line, make_chart, number
from dmpo_jax.training.alarms import Alarm, Row
from dmpo_jax.training.metrics import Sink, small_copy

LOG = logging.getLogger(__name__)
PAGE = "report/training.html"  # report/index.html is the page of an evaluation
GRIDS = "samples"
SIDE = 1024  # pixels of the longer side of a grid's copy on the page
SHARE = 0.01  # of the time, at most, is spent on rewriting the page
SHARE_OF_RARE = 0.1  # the same where a validation, a grid or an alarm is new
LEAST = 0.02  # seconds that the page is taken to need at least
NEWEST = 5  # grids shown; those between them and the first are folded away


class Setting(NamedTuple):
    """An option that differs from its default. The default is "" where there is none."""

    path: str
    value: str
    default: str


class Next(NamedTuple):
    """A command that may follow the run, and what it is for."""

    purpose: str
    command: str


@dataclasses.dataclass(frozen=True)
class About:
    """Facts of a run that its rows do not have.

    title: the run's name. subtitle: its objective and model. prompts: of the image grids, in
        order. compared: the command that trains also evaluates.
    """

    title: str
    subtitle: str = ""
    settings: Sequence[Setting] = ()
    prompts: Sequence[str] = ()
    following: Sequence[Next] = ()
    compared: bool = False


class Plot(NamedTuple):
    """A chart of named curves: {curve: name on the chart}.

    band: {curve: (curve of the lower end, of the upper end)}.
    """

    title: str
    curves: Mapping[str, str]
    note: str = ""
    level: float | None = None
    logarithmic: bool = False
    exact: bool = False
    band: Mapping[str, tuple[str, str]] = {}


PLOTS = (
    Plot(
        "loss",
        {"loss": "training", "validation_loss": "validation"},
        "Validation loss may rise in a healthy run.",
        logarithmic=True,
    ),
    Plot(
        "accuracy",
        {"implicit_accuracy": "training", "validation_implicit_accuracy": "validation"},
        "Share of pairs with a positive margin, a tie 1/2. Dashed: chance.",
        0.5,
    ),
    Plot(
        "margin",
        {"margin_p50": "median", "margin": "mean"},
        "By how much the chosen image gained more than the rejected one. Band: 5 to 95 % of pairs.",
        0.0,
        band={"margin_p50": ("margin_p05", "margin_p95")},
    ),
    Plot(
        "implied logit u",
        {"logit_p50": "median", "logit": "mean"},
        "β/2 times the margin. Band: 5 to 95 % of pairs.",
        0.0,
        band={"logit_p50": ("logit_p05", "logit_p95")},
    ),
    Plot(
        "change of the error",
        {"chosen_gain": "chosen", "rejected_gain": "rejected"},
        "Against the reference. Below 0 the policy predicts that image better.",
        0.0,
    ),
    Plot(
        "error",
        {"chosen_error": "chosen", "rejected_error": "rejected"},
        "Mean squared error of the policy.",
    ),
    Plot(
        "pairs that hardly pull",
        {"saturation": "saturated", "past_optimum": "past optimum"},
        "Share of pairs with p(1-p) below 0.01, and with u past logit(label).",
    ),
    Plot(
        "gradient norm",
        {"grad_norm": "before clipping"},
        logarithmic=True,
    ),
    Plot(
        "update norm",
        {"update_norm": "update"},
        "How far the parameters moved in an update.",
        logarithmic=True,
    ),
    Plot("learning rate", {"learning_rate": "rate"}, exact=True),
    Plot(
        "throughput",
        {"pairs_per_second": "pairs a second"},
        "Without checkpoints, validation and sampling.",
    ),
)
SHOWN = {curve for plot in PLOTS for curve in plot.curves} | {
    end for plot in PLOTS for ends in plot.band.values() for end in ends
}
# Of the clock, in the table of time; constant or counted elsewhere on the page.
NOT_CURVES = ("alarm_", "seconds_", "compiled_", "validation_pairs", "pairs_per_second_", "step")


class Grid(NamedTuple):
    """An image grid: addresses relative to the page, and the copy's size in pixels.

    fault: why it cannot be shown, or "".
    """

    step: int
    full: str
    copy: str = ""
    width: int = 0
    height: int = 0
    fault: str = ""


class History:
    """The rows of a run, by curve."""

    def __init__(self):
        self._steps: dict[str, list[int]] = {}
        self._values: dict[str, list[float]] = {}
        self.last_step = 0

    def add(self, step: int, row: Row) -> None:
        """Adds a row; a value of None was not finite."""
        self.last_step = max(self.last_step, step)
        for name, value in row.items():
            if name != "step" and "/" not in name:
                self._steps.setdefault(name, []).append(step)
                self._values.setdefault(name, []).append(
                    math.nan if value is None else float(value)
                )

    def names(self) -> list[str]:
        return list(self._values)

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns updates and values, `[n]` each; n is 0 for an unknown name."""
        steps, values = self._steps.get(name, []), self._values.get(name, [])
        return np.array(steps, np.float64), np.array(values, np.float64)

    def last(self, name: str) -> float | None:
        """Returns the newest finite value."""
        values = self.curve(name)[1]
        values = values[np.isfinite(values)]
        return float(values[-1]) if len(values) else None

    def total(self, name: str) -> float:
        """Returns the sum of the finite values."""
        return float(np.nansum(self.curve(name)[1]))


class RunPage(Sink):
    """Writes the page of a run. Nothing that it meets can end the run.

    Args:
        workdir: of the run. about: what its rows do not have. total: the last update.
        resume_step: the update that the run resumes from; earlier rows are read back.
        alarms: returns those raised up to now.
        clock: seconds, for tests.
    """

    name = "the run's page"

    def __init__(
        self,
        workdir: epath.PathLike,
        about: About,
        *,
        total: int,
        resume_step: int = 0,
        alarms: Callable[[], Sequence[Alarm]] = tuple,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._workdir, self._about, self._total = storage.absolute(workdir), about, total
        self._start, self._alarms, self._clock = resume_step, alarms, clock
        self.path = self._workdir / PAGE
        self._history, self._grids = History(), dict[int, Grid]()
        self._paced: list[tuple[int, float]] = []  # first and newest (update, seconds), of updates
        self._ended, self._finished = "", False
        self._wrote, self._took, self._raised, self._warned = -math.inf, 0.0, 0, False

    def open(self) -> None:
        """Takes up rows and grids of before a resume, and writes the page."""
        self._guard(self._take_up)
        self._guard(self._write)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds a row, and rewrites the page if that is due."""
        self._history.add(step, scalars)
        if "learning_rate" in scalars:
            self._paced = [*self._paced[:1], (step, self._clock())]
        raised = len(self._alarms())
        rare = raised > self._raised or "learning_rate" not in scalars
        self._raised = raised
        self._rewrite(SHARE_OF_RARE if rare else SHARE)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Adds a copy of an image grid, and rewrites the page if that is due."""
        if name == GRIDS:
            self._guard(lambda: self._add_grid(step, lambda: image))
            self._rewrite(SHARE_OF_RARE)

    def close(self) -> None:
        """Writes the page a last time."""
        self._finished = True
        self._guard(self._write)

    def ended(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        """Notes how training ended, as `contextlib.ExitStack.push` has it."""
        if kind is SystemExit:
            self._ended = "stopped, its state is saved: the same command resumes"
        elif kind is KeyboardInterrupt:
            self._ended = "interrupted: the same command resumes from the newest checkpoint"
        elif error is not None:
            self._ended = f"ended by {kind.__name__ if kind else 'an error'}: {error}"

    def _guard(self, work: Callable[[], None]) -> None:
        """Does some work; warns once if it fails: it is tried again when the page is next due."""
        try:
            work()
        except Exception as error:  # of the disk, of an image, or a bug here
            if not self._warned:
                LOG.warning("the run's page is not complete: %s: %s", type(error).__name__, error)
            self._warned = True

    def _rewrite(self, share: float) -> None:
        if self._clock() - self._wrote >= self._took / share:
            self._guard(self._write)

    def _take_up(self) -> None:
        if not self._start:
            return
        for path in sorted(self._workdir.glob("metrics*.jsonl")):
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # of a later update, being written
                    continue
                if row["step"] <= self._start:
                    self._history.add(row["step"], row)
        if (self._workdir / GRIDS).exists():
            for path in (self._workdir / GRIDS).glob("*.png"):
                if path.stem.isdigit() and int(path.stem) <= self._start:
                    self._add_grid(int(path.stem), lambda path=path: read_png(path))

    def _add_grid(self, step: int, open_image: Callable[[], Image.Image]) -> None:
        full, copy = f"../{GRIDS}/{step}.png", f"{GRIDS}/{step}.webp"
        try:
            small, content = small_copy(open_image(), SIDE), io.BytesIO()
            small.save(content, "WEBP", quality=80)
        except Exception as error:  # PIL has many
            self._grids[step] = Grid(step, full, fault=f"{type(error).__name__}: {error}")
            return
        (self.path.parent / GRIDS).mkdir(parents=True, exist_ok=True)
        storage.write_bytes(self.path.parent / copy, content.getvalue())
        self._grids[step] = Grid(step, full, copy, *small.size)

    def _write(self) -> None:
        began = self._clock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            storage.write_bytes(self.path, self.render().encode())
        finally:
            self._wrote = self._clock()
            self._took = max(self._wrote - began, LEAST)

    def render(self) -> str:
        """Returns the page of what is known by now. All texts are escaped."""
        history, grids = self._history, [self._grids[step] for step in sorted(self._grids)]
        others = [name for name in history.names() if name not in SHOWN]
        others = [name for name in others if not name.startswith(NOT_CURVES)]
        more = [Plot(name.replace("_", " "), {name: "value"}) for name in sorted(others)]
        return _template().render(
            about=self._about,
            workdir=str(self._workdir),
            written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            state=self._state(),
            tiles=self._tiles(),
            alarms=self._alarms(),
            charts=_charts(history, PLOTS),
            more=_charts(history, more),
            grids=grids if len(grids) <= NEWEST + 1 else [grids[0], *grids[-NEWEST:]],
            folded=grids[1:-NEWEST] if len(grids) > NEWEST + 1 else [],
            seconds=_seconds(history),
            speed=_speed(history),
            figures=_figures(history),
        )

    def _state(self) -> str:
        if self._ended:
            return self._ended
        if self._finished and self._history.last_step >= self._total:
            return "complete"
        if self._finished:
            return "ended"
        return "training" if self._history.last_step else "compiling, or before its first update"

    def _tiles(self) -> list[tuple[str, str, str]]:
        """Returns (name, value, further words) of the page's head."""
        history, step = self._history, self._history.last_step
        found = [("update", f"{step:,}", f"of {self._total:,}")]
        if left := self._left():
            found.append(("time left", left, ""))
        for name, title in (("loss", "loss"), ("implicit_accuracy", "accuracy")):
            if (value := history.last(name)) is not None:
                checked = history.last(f"validation_{name}")
                words = "" if checked is None else f"validation {number(checked)}"
                found.append((title, number(value), words))
        if (speed := history.last("pairs_per_second")) is not None:
            found.append(("pairs a second", number(speed), ""))
        found.append(("alarms", str(len(self._alarms())), ""))
        if skipped := history.last("skipped"):
            found.append(("skipped updates", f"{skipped:.0f}", "not finite"))
        return found

    def _left(self) -> str:
        """Returns the time left at the pace of this process; "" if unknown or ended."""
        if self._ended or self._finished or len(self._paced) < 2:
            return ""
        (first, began), (last, now) = self._paced
        if last <= first:
            return ""
        return duration((now - began) / (last - first) * (self._total - last))


def read_png(path: epath.Path) -> Image.Image:
    """Opens an image file; PIL's errors if it is damaged."""
    image = Image.open(io.BytesIO(path.read_bytes()))
    image.load()
    return image


def duration(seconds: float) -> str:
    """Returns a time in words: "3 h 20 min"."""
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes:.0f} min"
    hours, minutes = divmod(round(minutes), 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours / 24:.1f} days"


@functools.cache
def _template() -> jinja2.Template:
    return templates(pathlib.Path(__file__).parent).get_template("run_page.html.j2")


def _charts(history: History, plots: Sequence[Plot]) -> list[Chart]:
    return [found for plot in plots if (found := _chart(history, plot))]


def _chart(history: History, plot: Plot) -> Chart | None:
    lines = []
    for curve, name in plot.curves.items():
        steps, values = history.curve(curve)
        between = None
        if ends := plot.band.get(curve):
            low, high = (history.curve(end)[1] for end in ends)
            between = (low, high) if len(low) == len(high) == len(steps) else None
        lines.append(Line(name, steps, values, between, dots=curve.startswith("validation_")))
    given = {name: getattr(plot, name) for name in ("note", "level", "logarithmic", "exact")}
    return make_chart(plot.title, lines, **given)


def _seconds(history: History) -> list[tuple[str, str, str]]:
    """Returns (activity, its time, further words), of all processes that trained the run."""
    found = []
    for name in ("input", "step"):
        _, values = history.curve(f"seconds_{name}")
        if len(values):
            what = "waiting for data" if name == "input" else "the rest of an update"
            found.append((what, f"{number(float(np.nanmean(values)))} s", "an update"))
    for name in history.names():
        what = name.removeprefix("seconds_")
        if what in (name, "input", "step", "to_first_step"):
            continue
        times = len(history.curve(name)[0])
        found.append((what, duration(history.total(name)), f"{times} times" if times > 1 else ""))
    return found


def _speed(history: History) -> list[tuple[str, str]]:
    """Returns the newest of what machine and clock say."""
    words = {
        "pairs_per_second": "pairs a second",
        "pairs_per_second_per_chip": "pairs a second and chip",
        "tflops_per_second_per_chip": "TFLOP/s a chip",
        "mfu": "share of the chip's rate (MFU)",
        "device_memory_peak_gb": "memory of the fullest device at its peak, GB",
        "host_memory_peak_gb": "memory of the process at its peak, GB",
    }
    return [(w, number(x)) for name, w in words.items() if (x := history.last(name)) is not None]


def _figures(history: History) -> list[tuple[str, str, str, str, str]]:
    """Returns (curve, first, lowest, highest, last) of every curve with finite values."""
    found = []
    for name in history.names():
        _, values = history.curve(name)
        values = values[np.isfinite(values)]
        if len(values) and not name.startswith(("alarm_", "compiled_")):
            shown = (values[0], values.min(), values.max(), values[-1])
            first, low, high, last = (number(float(x)) for x in shown)
            found.append((name, first, low, high, last))
    return found
