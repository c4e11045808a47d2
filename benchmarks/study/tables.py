"""Numbers and Markdown tables of the comparison, from its results alone."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.study.results import Interval, Results, interval
from benchmarks.study.trials import (
    BASELINE,
    FINALISTS,
    GUARDS,
    LABELS,
    RELABELLED,
    SEEDS,
    SPACES,
    TASKS,
    Trial,
    at_an_edge,
    chosen,
    finals,
    same_betas,
    searched,
    words,
)

Runs = dict[str, dict[str, Any]]
EQUAL = 0.1  # distance from the base at which objectives are compared too


class Row(NamedTuple):
    """An objective's final runs, in order of their seeds; judges by name in the runs."""

    objective: str
    setting: tuple[tuple[str, float], ...]
    runs: list[dict[str, Any]]

    def score(self, judge: str) -> Interval:
        return interval([run["scores"][judge] for run in self.runs])

    def wins(self, judge: str) -> Interval:
        return interval([run["wins"][judge] for run in self.runs])

    def health(self, name: str) -> float:
        return float(np.mean([run["health"][name] for run in self.runs]))

    def mean(self, name: str) -> float:
        return float(np.mean([run[name] for run in self.runs]))

    def last(self, name: str) -> float:
        return float(np.mean([run["last"].get(name, math.nan) for run in self.runs]))


def rows_of(runs: Runs, task: str, judge: str) -> list[Row]:
    """Returns the rows of the objectives whose final runs are all done."""
    found = []
    for objective in SPACES:
        setting = chosen(task, objective, runs, judge)
        if setting is None:
            continue
        trials = finals(task, objective, setting)
        if all(trial.name in runs for trial in trials):
            found.append(Row(objective, setting, [runs[trial.name] for trial in trials]))
    return found


def difference(row: Row, other: Row, judge: str) -> Interval:
    """Returns how far a row's scores are above another's, paired by training seed.

    Runs of one seed share labels, order, noise and timesteps.
    """
    return interval(
        [a["scores"][judge] - b["scores"][judge] for a, b in zip(row.runs, other.runs, strict=True)]
    )


def at_distance(run: dict[str, Any], base: dict[str, Any], judge: str, distance: float) -> float:
    """Returns a run's score where its path passes a distance from the base; NaN if it never does.

    Interpolated between the points that were judged, in the root of the distance; the base is the
    first, at 0.
    """
    points = [(0.0, base["scores"][judge])]
    points += [(p["health"]["distance"], p["scores"][judge]) for p in run.get("path", ())]
    points += [(run["health"]["distance"], run["scores"][judge])]
    for (near, low), (far, high) in itertools.pairwise(points):
        if near <= distance <= far:
            share = (math.sqrt(distance) - math.sqrt(near)) / (math.sqrt(far) - math.sqrt(near))
            return low + share * (high - low)
    return math.nan


def report(results: Results, judge: str) -> str:
    """Formats all that is done as Markdown; `judge` labelled the pairs."""
    about, notes = results.about, results.notes
    lines = [
        "# Every objective, compared",
        "",
        "Written by `python benchmarks/study/compare.py`; every run is a line of "
        f"`{results.path.name}`. {notes.get('environment', '')}; {notes.get('workers', '')}; "
        f"{sum(r.get('seconds', 0) for r in results.runs.values()) / 3600:.1f} hours of runs.",
        "",
        f"Each task has {about['pairs']} pairs of its own base's images, a tenth of them for "
        f"validation; {judge} gives each the probability that one is preferred, and each training "
        f"seed draws labels from it. Runs have {about['batch_size']} pairs an update. A setting is "
        f"chosen by {judge} on {about['tuning_images']} validation seeds: a search by one training "
        f"run each, then the best {FINALISTS} with a second seed. The numbers are of {SEEDS} other "
        f"training seeds, judged on {about['images']} held-out seeds. Brackets: 95 % t intervals "
        f"over the {SEEDS} training runs, with the same held-out seeds. Each of them errs once in "
        "twenty.",
        "",
    ]
    for task in TASKS:
        rows = rows_of(results.runs, task, judge)
        if rows:
            lines += _task(results.runs, task, rows, judge)
        lines += _same_betas(results.runs, task, judge)
    lines += _variants(results.runs, judge)
    return "\n".join(lines).rstrip() + "\n"


def _task(runs: Runs, task: str, rows: list[Row], judge: str) -> list[str]:
    base = runs[f"base {task}"]
    other = next(name for name in base["scores"] if name != judge)
    rows = sorted(rows, key=lambda row: -row.score(other).mean)
    baseline = next((row for row in rows if row.objective == BASELINE), None)
    lines = [
        f"## {TASKS[task].title}",
        "",
        f"`configs/{task}.py`, {TASKS[task].steps} updates. The base scores "
        f"{base['scores'][judge]:.3f} by {judge} and {base['scores'][other]:.3f} by {other}, which "
        f"never labelled; its diversity is {base['diversity']:.3f}. Sorted by {other}.",
        "",
    ]
    head = ["objective", f"score, {other}", f"score, {judge}", f"wins over the base, {other}, %"]
    head += [f"less {BASELINE}'s, {other}", f"less {BASELINE}'s, {judge}"]
    cells = []
    for row in rows:
        cells.append([f"`{row.objective}`", *(number(row.score(j)) for j in (other, judge))])
        cells[-1].append(number(row.wins(other), scale=100, digits=1))
        for j in (other, judge):
            less = baseline and row is not baseline and marked(difference(row, baseline, j))
            cells[-1].append(less or "")
    lines += table(head, cells)
    lines += ["Bold: an interval that excludes 0. The others are not told apart.", ""]
    return [*lines, *_details(runs, task, rows), *_equal(runs, task, rows, judge, other)]


def _details(runs: Runs, task: str, rows: Sequence[Row]) -> list[str]:
    lines = [
        "Distance: mean square of what policy and base predict differently on the validation "
        "split, over the base's error. Gains: how much larger an image's error is than the base's. "
        "Diversity: mean root-mean-square pixel distance of two images of a caption. Saturation "
        "and the 95 % quantile of u: over the last updates. Alarms: of the runs. Searched: points, "
        "and where nothing further was tried on one side of the chosen value.",
        "",
    ]
    head = ["objective", "setting", "distance", "chosen gain", "rejected gain", "diversity"]
    head += ["saturation", "u, 95 %", "alarms", "searched"]
    cells = []
    for row in rows:
        edges = at_an_edge(task, row.objective, row.setting, runs)
        edge = f", edge: {', '.join(edges)}" if edges else ""
        points = len(searched(task, row.objective, runs))
        cells.append([f"`{row.objective}`", words(row.setting), f"{row.health('distance'):.3f}"])
        cells[-1] += [f"{row.health(f'{x}_gain'):+.4f}" for x in ("chosen", "rejected")]
        cells[-1] += [f"{row.mean('diversity'):.3f}", known(row.last("saturation"), 2)]
        cells[-1] += [known(row.last("logit_p95"), 1), alarms(row.runs), f"{points}{edge}"]
    return [*lines, *table(head, cells)]


def _equal(runs: Runs, task: str, rows: Sequence[Row], judge: str, other: str) -> list[str]:
    """Formats scores at one distance from the base, from the runs' paths."""
    base, found = runs[f"base {task}"], {}
    for row in rows:
        at = {j: [at_distance(run, base, j, EQUAL) for run in row.runs] for j in (other, judge)}
        if not np.isnan(at[other]).any():
            found[row.objective] = at
    if len(found) < 2:
        return []
    lines = [
        f"On the way, at a distance of {EQUAL:g} from the base (objectives all of whose runs get "
        "there):",
        "",
    ]
    head = ["objective", *(f"score, {j}" for j in (other, judge)), f"less {BASELINE}'s, {other}"]
    cells = []
    for name, at in sorted(found.items(), key=lambda item: -float(np.mean(item[1][other]))):
        cells.append([f"`{name}`", *(number(interval(at[j])) for j in (other, judge)), ""])
        if name != BASELINE and BASELINE in found:
            less = np.subtract(at[other], found[BASELINE][other])
            cells[-1][-1] = marked(interval(less))
    return [*lines, *table(head, cells)]


def at_betas(runs: Runs, task: str) -> list[dict[str, Row]]:
    """Returns the rows of RELABELLED at each beta that all of them were trained with."""
    found = []
    for each in zip(*(same_betas(task, name) for name in RELABELLED), strict=True):
        if all(trial.name in runs for trials in each for trial in trials):
            rows = [Row(t[0].objective, t[0].setting, [runs[x.name] for x in t]) for t in each]
            found.append({row.objective: row for row in rows})
    return found


def _same_betas(runs: Runs, task: str, judge: str) -> list[str]:
    found = at_betas(runs, task)
    if not found:
        return []
    other = next(name for name in found[0][BASELINE].runs[0]["scores"] if name != judge)
    rest = [f"`{name}` with {words(row.setting)}" for name, row in found[0].items()]
    lines = ["### At the same beta", "", f"{TASKS[task].title}: {'; '.join(rest)} and so on.", ""]
    head = [
        "beta",
        "objective",
        f"score, {other}",
        f"score, {judge}",
        f"less {BASELINE}'s, {other}",
    ]
    head += [f"less {BASELINE}'s, {judge}", "distance", "alarms"]
    cells = []
    for rows in found:
        for name, row in rows.items():
            less = [""] * 2
            if name != BASELINE:
                less = [marked(difference(row, rows[BASELINE], j)) for j in (other, judge)]
            beta = f"{dict(row.setting)['beta']:g}"
            scores = [number(row.score(j)) for j in (other, judge)]
            shown = [f"{row.health('distance'):.3f}", alarms(row.runs)]
            cells.append([beta, f"`{name}`", *scores, *less, *shown])
    return [*lines, *table(head, cells)]


class Variant(NamedTuple):
    """Final runs of a variant of an objective's setting, and the runs without it."""

    objective: str
    name: str
    runs: list[dict[str, Any]]
    plain: list[dict[str, Any]]

    def change(self, judge: str) -> Interval:
        pairs = zip(self.runs, self.plain, strict=True)
        return interval([a["scores"][judge] - b["scores"][judge] for a, b in pairs])


def variants_of(
    runs: Runs, task: str, judge: str, kinds: Iterable[dict[str, Any]]
) -> list[Variant]:
    """Returns the variants whose runs are all done, by objective."""
    found = []
    for objective in SPACES:
        setting = chosen(task, objective, runs, judge)
        if setting is None:
            continue
        plain = finals(task, objective, setting)
        for kind in kinds:
            trials: list[Trial] = finals(task, objective, setting, **kind)
            if all(trial.name in runs for trial in [*trials, *plain]):
                each = [[runs[t.name] for t in group] for group in (trials, plain)]
                found.append(Variant(objective, trials[0].variant, *each))
    return found


def _variants(runs: Runs, judge: str) -> list[str]:
    task = next(iter(TASKS))
    titles = {
        "Other labels": (
            LABELS,
            "The chosen settings, not tuned anew. probability: the judge's own; votes5: the share "
            "of five draws; flipped: that share of the drawn labels turned round.",
        ),
        "Guards": (
            GUARDS,
            "The chosen settings, not tuned anew. mu: the winner-preserving safeguard's. anchor: "
            "its kind and its weight as a share of beta. moving: decay and updates between.",
        ),
    }
    lines = []
    for title, (kinds, about) in titles.items():
        found = variants_of(runs, task, judge, kinds)
        if not found:
            continue
        other = next(name for name in found[0].runs[0]["scores"] if name != judge)
        lines += [f"## {title}", "", f"{TASKS[task].title}. {about}", ""]
        head = ["objective", "", f"score, {other}", f"change, {other}", f"change, {judge}"]
        head += ["distance", "chosen gain", "alarms"]
        cells = []
        for variant in found:
            score = interval([run["scores"][other] for run in variant.runs])
            health = [np.mean([r["health"][x] for r in variant.runs]) for x in _SHOWN]
            cells.append([f"`{variant.objective}`", variant.name, number(score)])
            cells[-1] += [marked(variant.change(j)) for j in (other, judge)]
            cells[-1] += [f"{health[0]:.3f}", f"{health[1]:+.4f}", alarms(variant.runs)]
        lines += table(head, cells)
    return lines


_SHOWN = ("distance", "chosen_gain")


def alarms(runs: Sequence[dict[str, Any]]) -> str:
    """Returns each alarm with the number of runs that raised it."""
    names = [name for run in runs for name in run["alarms"]]
    return ", ".join(f"{name} {names.count(name)}" for name in dict.fromkeys(names)) or "none"


def number(x: Interval, *, sign: str = "", scale: float = 1, digits: int = 3) -> str:
    mean, low, high = (scale * value for value in x)
    return f"{mean:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def marked(x: Interval) -> str:
    """Formats a difference, bold if its interval excludes 0."""
    text = number(x, sign="+")
    return f"**{text}**" if x.apart(0) else text


def known(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Formats a Markdown table as lines."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)] + [""]
