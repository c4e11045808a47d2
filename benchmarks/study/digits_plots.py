"""Plots of the digits comparison, from its numbers alone."""

import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks.study.digits_noise import Curve
from benchmarks.study.digits_plan import BASELINE
from benchmarks.study.digits_scores import Interval, Results, Row

# Okabe and Ito's, distinct for every colour vision; the markers differ too.
COLOURS, MARKERS = ("#0072B2", "#D55E00"), ("o", "s")
GREY, PALE = "#888888", "#dddddd"
ROLES = ("labelled the pairs", "never labelled")  # of the judges, in their order


def plot(path: pathlib.Path, results: Results, rows: Sequence[Row], judges: Sequence[str]) -> None:
    """Plots scores and win rates with their intervals, best at the top."""
    figure, axes = _axes(1, 3, figsize=(10, 1.3 + 0.38 * len(rows)), sharey=True)
    for i, judge in enumerate(judges):
        places = [y + 0.14 * (2 * i - 1) for y in range(len(rows))]
        _points(axes[0], [row.score[judge] for row in rows], places, i, f"{judge} ({ROLES[i]})")
        _points(axes[1], [row.against_base[judge] for row in rows], places, i, scale=100)
        against = [row.against_baseline.get(judge) for row in rows]
        _points(axes[2], against, places, i, scale=100)
        for y, row in zip(places, rows, strict=True):  # each training seed by itself
            seeds = row.scores[judge].mean(1)
            axes[0].plot(seeds, [y] * len(seeds), "|", color=COLOURS[i], markersize=8)
        mean = _base(results, judge)
        axes[0].axvline(mean, color=COLOURS[i], linestyle=":", linewidth=1.2)
        place = {"xy": (mean, 1.0), "xycoords": ("data", "axes fraction"), "ha": "center"}
        axes[0].annotate("base", **place, va="bottom", color=COLOURS[i], fontsize=8)
    axes[0].set_yticks(range(len(rows)), [row.name for row in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    titles = (
        "mean score (ticks: single training seeds)",
        "wins against the base, %",
        f"wins against {BASELINE}, %",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_xlabel(title)
        axis.grid(axis="x", color=PALE, linewidth=0.6)
        axis.set_axisbelow(True)
    for axis in axes[1:]:
        axis.axvline(50, color=GREY, linewidth=1, zorder=0)
    _finish(figure, axes[0], path)


def _points(
    axis: Any,
    column: Sequence[Interval | None],
    places: Sequence[float],
    judge: int,
    label: str = "",
    scale: float = 1,
) -> None:
    """Plots means with their intervals, each at its height; None leaves a gap."""
    for y, x in zip(places, column, strict=True):
        if x is not None:
            spread = [[scale * (x.mean - x.low)], [scale * (x.high - x.mean)]]
            axis.errorbar(scale * x.mean, y, xerr=spread, label=label, **_style(judge, ""))
            label = ""  # once is enough for the legend


def plot_noise(
    path: pathlib.Path, results: Results, curves: Sequence[Curve], judges: Sequence[str]
) -> None:
    """Plots a panel per objective: both judges' scores by the share of flipped labels."""
    columns = min(5, len(curves))
    lines = -(-len(curves) // columns)
    size = (max(2.0 * columns + 0.8, 6.0), 2.1 * lines + 0.9)
    figure, axes = _axes(lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    for axis, curve in zip(axes.flat, curves, strict=False):
        for i, judge in enumerate(judges):
            for other in curves:  # for comparison by eye
                axis.plot(*_means(other, judge), color=PALE, linewidth=0.8, zorder=0)
            axis.axhline(_base(results, judge), color=COLOURS[i], linestyle=":", linewidth=1)
            points = [x for _, x in sorted(curve.score[judge].items())]
            spread = [[x.mean - x.low for x in points], [x.high - x.mean for x in points]]
            label = f"{judge} ({ROLES[i]})"
            axis.errorbar(*_means(curve, judge), yerr=spread, label=label, **_style(i, "-"))
        axis.set_title(curve.name, fontsize=9)
        axis.set_xticks([100 * share for share in sorted(curve.score[judges[0]])])
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
    figure.supxlabel("labels flipped, % (dotted: the base)", fontsize=9)
    figure.supylabel("mean score", fontsize=9)
    _finish(figure, axes.flat[0], path)


def _means(curve: Curve, judge: str) -> tuple[list[float], list[float]]:
    points = sorted(curve.score[judge].items())
    return [100 * share for share, _ in points], [x.mean for _, x in points]


def _base(results: Results, judge: str) -> float:
    scores = (results.base or {})["held_out"]["scores"][judge]
    return sum(scores) / len(scores)


def _style(judge: int, line: str) -> dict[str, Any]:
    marker = {"fmt": f"{line}{MARKERS[judge]}", "color": COLOURS[judge], "markersize": 4.5}
    return {**marker, "linewidth": 1.4}


def _axes(*shape: int, **more: Any) -> tuple[Any, Any]:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        return pyplot.subplots(*shape, layout="constrained", **more)


def _finish(figure: Any, labelled: Any, path: pathlib.Path) -> None:
    """Adds the legend above all panels and writes the file."""
    from matplotlib import pyplot

    handles, labels = labelled.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
