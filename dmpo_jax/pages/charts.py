"""Line charts as data for `charts.html.j2`: small SVGs in the colours and font of their page.

They are drawn in the thread of a training run. Hence no plotting library: matplotlib keeps its
settings in one place for the whole process, and takes a second for a page of charts.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

WIDTH, HEIGHT = 380, 210  # of the drawing's own units; a page scales it
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 26
POINTS = 150  # of a line, at most; of more values, the extremes of each bin
SMOOTHED = 24  # values from which on a running mean is drawn
WINDOW = 12  # a running mean is over a share of 1/WINDOW of the values
LOGARITHMIC = 30.0  # largest over smallest value from which on a logarithmic axis is taken

Values = Float[np.ndarray, " n"]
Kept = Float[np.ndarray, " m"]


class Line(NamedTuple):
    """Values over updates, and what they are.

    between: two further arrays, drawn as a band. dots: few values, each of which counts.
    """

    name: str
    steps: Values
    values: Values
    between: tuple[Values, Values] | None = None
    dots: bool = False


class Tick(NamedTuple):
    """A mark of an axis: its place in the drawing's units, and its text."""

    at: float
    text: str


class Drawn(NamedTuple):
    """A line as the template draws it: attributes `points` of SVG elements, "" for none.

    colour: 0 or 1. last: the newest value, as text.
    """

    name: str
    colour: int
    faint: str
    band: str
    line: str
    dots: Sequence[tuple[float, float]]
    last: str


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart as the template draws it. said: what it shows, for those who cannot see it."""

    title: str
    note: str
    lines: Sequence[Drawn]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    level: float | None
    said: str


def make_chart(
    title: str,
    lines: Sequence[Line],
    *,
    note: str = "",
    level: float | None = None,
    logarithmic: bool = False,
    exact: bool = False,
) -> Chart | None:
    """Returns a chart of lines over updates; None if no line has a finite value.

    note: what it means, in a few words. level: a value to compare with, drawn as a dashed line.
    logarithmic: positive values that differ much take a logarithmic axis, and geometric means.
    exact: no running means.
    """
    found = [line for given in lines if len((line := finite(given)).steps)]
    if not found:
        return None
    every = np.concatenate([line.values for line in found])
    every = every if level is None else np.append(every, level)
    logs = bool(logarithmic and every.min() > 0 and every.max() / every.min() >= LOGARITHMIC)
    smooth = {line.name: line if exact else smoothed(line, logs) for line in found}
    every = np.concatenate(
        [every, *(ends for line in smooth.values() for ends in line.between or ())]
    )
    low, high = float(every.min()), float(every.max())
    low, high, marks = (log_axis if logs else linear_axis)(low, high)
    first = min(line.steps[0] for line in found)
    last = max(max(line.steps[-1] for line in found), first + 1)

    def x(steps: Values) -> Values:
        return LEFT + (WIDTH - LEFT - RIGHT) * (steps - first) / (last - first)

    def y(values: Values) -> Values:
        values = np.log10(values) if logs else values
        bottom, top = (math.log10(low), math.log10(high)) if logs else (low, high)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (values - bottom) / (top - bottom)

    def points(steps: Values, values: Values) -> str:
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x(steps), y(values), strict=True))

    drawn = []
    for i, line in enumerate(found):
        mean, band = thin(smooth[line.name]), ""
        if mean.between is not None:
            there, back = mean.between
            band = f"{points(mean.steps, there)} {points(mean.steps[::-1], back[::-1])}"
        rough = smooth[line.name] is not line and line.between is None
        drawn.append(
            Drawn(
                line.name,
                i % 2,
                points(*extremes(line.steps, line.values)) if rough else "",
                band,
                points(mean.steps, mean.values),
                [
                    (round(float(a), 1), round(float(b), 1))
                    for a, b in zip(x(line.steps), y(line.values), strict=True)
                ]
                if line.dots or len(line.steps) == 1
                else [],
                number(line.values[-1]),
            )
        )
    return Chart(
        title,
        note,
        drawn,
        [Tick(float(x(np.array([s]))[0]), f"{s:,.0f}") for s in x_marks(first, last)],
        [Tick(float(y(np.array([v]))[0]), text) for v, text in marks],
        None if level is None else float(y(np.array([level]))[0]),
        "; ".join(describe(line) for line in found),
    )


def finite(line: Line) -> Line:
    """Returns the line without values that are not finite."""
    columns = [line.values, *(line.between or ())]
    kept = np.all([np.isfinite(column) for column in columns], 0)
    values, *between = (column[kept] for column in columns)
    return line._replace(
        steps=line.steps[kept],
        values=values,
        between=(between[0], between[1]) if between else None,
    )


def window_of(line: Line) -> int:
    """Values in a running mean; 1 if there are too few for one."""
    count = len(line.steps)
    return 1 if line.dots or count < SMOOTHED else max(count // WINDOW, 3)


def smoothed(line: Line, logs: bool = False) -> Line:
    """Returns running means of a line, geometric ones with `logs`, and of its band."""
    width = window_of(line)
    if width == 1:
        return line
    if logs:
        return line._replace(values=10 ** running_mean(np.log10(line.values), width), between=None)
    between = line.between
    return line._replace(
        values=running_mean(line.values, width),
        between=between and (running_mean(between[0], width), running_mean(between[1], width)),
    )


def running_mean(values: Values, width: int) -> Values:
    """Returns means over `width` neighbours of each value; over fewer at the ends."""
    half = width // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, after = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[after] - sums[first]) / (after - first)


def thin(line: Line) -> Line:
    """Returns at most `POINTS` of a smooth line's points, the first and the last among them."""
    if len(line.steps) <= POINTS or line.dots:
        return line
    kept = np.unique(np.linspace(0, len(line.steps) - 1, POINTS).round().astype(int))
    between = line.between and (line.between[0][kept], line.between[1][kept])
    return line._replace(steps=line.steps[kept], values=line.values[kept], between=between)


def extremes(steps: Values, values: Values) -> tuple[Kept, Kept]:
    """Returns a rough line's points or, of many, the lowest and the highest in each bin."""
    if len(steps) <= 2 * POINTS:
        return steps, values
    kept: list[int] = []
    for part in np.array_split(np.arange(len(steps)), POINTS):
        kept += sorted({part[values[part].argmin()], part[values[part].argmax()]})
    return steps[kept], values[kept]


def linear_axis(low: float, high: float) -> tuple[float, float, list[tuple[float, str]]]:
    """Returns the ends of an axis that holds both values, and its marks with their texts."""
    if high <= low:
        low, high = low - (abs(low) / 2 or 1.0), high + (abs(high) / 2 or 1.0)
    step = round_step(high - low, 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    values = [i * step for i in range(first, last + 1)]
    return first * step, last * step, [(value, mark(value, step)) for value in values]


def log_axis(low: float, high: float) -> tuple[float, float, list[tuple[float, str]]]:
    """Returns the same of positive values: powers of ten, at most six of them marked."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    every = -(-(last - first) // 5)
    powers = range(first, last + 1, every)
    return 10.0**first, 10.0**last, [(10.0**i, f"{10.0**i:g}") for i in powers]


def x_marks(first: float, last: float) -> list[float]:
    """Returns round updates between the first and the last."""
    step = max(round_step(last - first, 5), 1.0)
    return [i * step for i in range(math.ceil(first / step), math.floor(last / step) + 1)]


def round_step(length: float, most: int) -> float:
    """Returns 1, 2 or 5 times a power of ten that fits at most `most` times into a length."""
    power = 10.0 ** math.floor(math.log10(length / most))
    return next(power * i for i in (1, 2, 5, 10) if power * i * most >= length * (1 - 1e-9))


def mark(value: float, step: float) -> str:
    """Returns a mark's text: as many decimals as the step has, in powers where that is long."""
    if not value:
        return "0"
    if not 1e-4 <= abs(step) < 1e5:
        return f"{value:.3g}"
    return f"{value + 0.0:,.{max(-math.floor(math.log10(step) + 1e-9), 0)}f}"


def number(value: float) -> str:
    """Returns a value in four digits."""
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def describe(line: Line) -> str:
    """Returns first, lowest, highest and last value in words."""
    low, high = line.values.argmin(), line.values.argmax()
    if len(line.steps) == 1:
        return f"{line.name} {number(line.values[0])} at update {line.steps[0]:,.0f}"
    return (
        f"{line.name} from {number(line.values[0])} at update {line.steps[0]:,.0f} to "
        f"{number(line.values[-1])} at update {line.steps[-1]:,.0f}, lowest "
        f"{number(line.values[low])} at {line.steps[low]:,.0f}, highest "
        f"{number(line.values[high])} at {line.steps[high]:,.0f}"
    )
