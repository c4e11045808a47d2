"""Plots of the comparison, from its results alone."""

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot, ticker

from benchmarks.study.results import Interval, Results
from benchmarks.study.tables import Row, at_betas, rows_of, variants_of
from benchmarks.study.trials import GUARDS, LABELS, TASKS

matplotlib.use("Agg")

# Okabe and Ito's, distinct for every colour vision; the markers differ too.
COLOURS, MARKERS = ("#0072B2", "#D55E00"), ("o", "s")
NAMED = {
    "dmpo": "#D55E00",
    "diffusion_dpo": "#0072B2",
    "diffusion_kto": "#009E73",
    "ipo": "#CC79A7",
    "nft": "#E69F00",
    "poly_dpo": "#56B4E9",
    "sft": "#000000",
}
GREY, PALE = "#888888", "#dddddd"


def plot(out: pathlib.Path, results: Results, judge: str) -> None:
    """Writes compare.png, and beside it _frontier, _betas and _variants, of what is done."""
    runs = results.runs
    rows = {task: found for task in TASKS if (found := rows_of(runs, task, judge))}
    if not rows:
        return
    other = next(j for j in next(iter(rows.values()))[0].runs[0]["scores"] if j != judge)
    _scores(out / "compare.png", runs, rows, (judge, other))
    _frontier(out / "compare_frontier.png", runs, rows, other)
    _same_betas(out / "compare_betas.png", runs, (judge, other))
    _variants(out / "compare_variants.png", runs, judge, other)


def _scores(
    path: pathlib.Path, runs: Any, rows: dict[str, list[Row]], judges: Sequence[str]
) -> None:
    """Plots each objective's mean scores with their intervals, best at the top."""
    most = max(len(each) for each in rows.values())
    figure, axes = _axes(1, len(rows), figsize=(5.2 * len(rows), 1.3 + 0.36 * most))
    roles = (f"{judges[0]} (labelled the pairs)", f"{judges[1]} (never labelled)")
    for axis, (task, each) in zip(axes, rows.items(), strict=True):
        each = sorted(each, key=lambda row: -row.score(judges[1]).mean)
        for i, judge in enumerate(judges):
            places = [y + 0.14 * (2 * i - 1) for y in range(len(each))]
            _points(axis, [row.score(judge) for row in each], places, i, roles[i])
            for y, row in zip(places, each, strict=True):  # each training seed by itself
                seeds = [run["scores"][judge] for run in row.runs]
                axis.plot(seeds, [y] * len(seeds), "|", color=COLOURS[i], markersize=7)
            base = runs[f"base {task}"]["scores"][judge]
            axis.axvline(base, color=COLOURS[i], linestyle=":", linewidth=1.2)
        axis.set_yticks(range(len(each)), [row.objective for row in each])
        axis.set_ylim(len(each) - 0.5, -0.5)
        axis.set_title(TASKS[task].title, fontsize=9, loc="left")
        axis.set_xlabel("mean score; dotted: the base; ticks: single runs")
        axis.grid(axis="x", color=PALE, linewidth=0.6)
        axis.set_axisbelow(True)
    _finish(figure, axes[0], path)


def _frontier(path: pathlib.Path, runs: Any, rows: dict[str, list[Row]], judge: str) -> None:
    """Plots score against distance from the base, and against diversity, along the runs."""
    figure, axes = _axes(len(rows), 2, figsize=(10, 3.9 * len(rows)))
    axes = np.reshape(axes, (len(rows), 2))
    for (task, each), pair in zip(rows.items(), axes, strict=True):
        base = runs[f"base {task}"]
        for row in sorted(each, key=lambda row: row.objective in NAMED):
            points = [[(p["health"]["distance"], p["diversity"], p["scores"][judge]) for p in
                       (*run["path"], run)] for run in row.runs]  # fmt: skip
            means = np.mean(points, axis=0)
            colour = NAMED.get(row.objective, GREY)
            wide = 1.8 if row.objective in NAMED else 0.8
            for axis, i in zip(pair, (0, 1), strict=True):
                at, values = (
                    (0.0, np.sqrt(means[:, 0])) if i == 0 else (base["diversity"], means[:, 1])
                )
                x, y = [at, *values], [base["scores"][judge], *means[:, 2]]
                label = row.objective if row.objective in NAMED else "others"
                axis.plot(x, y, "-o", color=colour, linewidth=wide, markersize=3, label=label)
        for axis, label in zip(
            pair, ("root of the distance from the base", "diversity"), strict=True
        ):
            axis.axhline(base["scores"][judge], color=GREY, linestyle=":", linewidth=1)
            axis.set_xlabel(label)
            axis.set_ylabel(f"score, {judge}")
            axis.set_title(TASKS[task].title, fontsize=9, loc="left")
            axis.grid(color=PALE, linewidth=0.5)
            axis.set_axisbelow(True)
        pair[1].invert_xaxis()
    named = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
    figure.legend(named.values(), named, loc="center right", fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 0.87, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _same_betas(path: pathlib.Path, runs: Any, judges: Sequence[str]) -> None:
    """Plots scores of both judges against beta, a row of panels for each task."""
    found = {task: rows for task in TASKS if (rows := at_betas(runs, task))}
    if not found:
        return
    size = (5 * len(judges), 3.6 * len(found))
    figure, axes = _axes(len(found), len(judges), figsize=size)
    axes = np.reshape(axes, (len(found), len(judges)))
    for row, (task, at) in zip(axes, found.items(), strict=True):
        for axis, judge in zip(row, judges, strict=True):
            for i, name in enumerate(at[0]):
                betas = [dict(rows[name].setting)["beta"] * (0.97 + 0.06 * i) for rows in at]
                scores = [rows[name].score(judge) for rows in at]
                axis.plot(betas, [x.mean for x in scores], "-o", color=NAMED[name], label=name)
                for beta, x in zip(betas, scores, strict=True):
                    axis.plot([beta, beta], [x.low, x.high], color=NAMED[name], linewidth=1.2)
            axis.axhline(runs[f"base {task}"]["scores"][judge], color=GREY, linestyle=":")
            axis.set_xscale("log")
            axis.set_xticks(ticks := [dict(rows["dmpo"].setting)["beta"] for rows in at], ticks)
            axis.minorticks_off()
            axis.set_xlabel("beta")
            axis.set_ylabel(f"score, {judge}")
            axis.set_title(TASKS[task].title, fontsize=9, loc="left")
            axis.grid(color=PALE, linewidth=0.5)
            axis.set_axisbelow(True)
    _finish(figure, axes[0, 0], path)


def _variants(path: pathlib.Path, runs: Any, judge: str, other: str) -> None:
    """Plots what other labels and guards change, by both judges."""
    task = next(iter(TASKS))
    panels = {"other labels": LABELS, "guards": GUARDS}
    found = {
        title: each for title, kinds in panels.items()
        if (each := variants_of(runs, task, judge, kinds))
    }  # fmt: skip
    if not found:
        return
    tall = max(len(each) for each in found.values())
    figure, axes = _axes(1, len(found), figsize=(5.4 * len(found), 1.3 + 0.3 * tall))
    for axis, (title, each) in zip(axes, found.items(), strict=True):
        for i, name in enumerate((judge, other)):
            places = [y + 0.14 * (2 * i - 1) for y in range(len(each))]
            _points(axis, [variant.change(name) for variant in each], places, i, name)
        names = [f"{variant.objective}, {variant.name}" for variant in each]
        axis.set_yticks(range(len(each)), names, fontsize=8)
        axis.set_ylim(len(each) - 0.5, -0.5)
        axis.axvline(0, color=GREY, linewidth=1, zorder=0)
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel("change of the score")
        axis.xaxis.set_major_locator(ticker.MaxNLocator(5))
        axis.grid(axis="x", color=PALE, linewidth=0.6)
        axis.set_axisbelow(True)
    _finish(figure, axes[0], path)


def _points(
    axis: Any, column: Sequence[Interval], places: Sequence[float], judge: int, label: str
) -> None:
    """Plots means with their intervals, each at its height."""
    for y, x in zip(places, column, strict=True):
        axis.plot([x.low, x.high], [y, y], color=COLOURS[judge], linewidth=1.6)
        axis.plot(x.mean, y, MARKERS[judge], color=COLOURS[judge], markersize=4.5, label=label)
        label = ""  # once in the legend


def _axes(rows: int, columns: int, **how: Any) -> tuple[Any, Any]:
    figure, axes = pyplot.subplots(rows, columns, squeeze=False, **how)
    return figure, axes.ravel()


def _finish(figure: Any, axis: Any, path: pathlib.Path) -> None:
    figure.legend(
        *axis.get_legend_handles_labels(), loc="upper right", ncols=2, fontsize=8, frameon=False
    )
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
