"""Numbers of the digits comparison: results on disk, intervals, one row per objective."""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from benchmarks.study.digits_plan import BASELINE, Setting, Trial, chosen, rows_of

Scores = Float[np.ndarray, "T N"]  # of T training runs on the same N images


class Results:
    """A file of results, rewritten after every run; reading it resumes the comparison.

    about: settings that must match to compare two runs; a file with others is refused.

    Raises:
        ValueError: naming what differs, and what to do about it.
    """

    def __init__(self, path: pathlib.Path, about: dict[str, Any]):
        self.path, self.about = path, about
        self.notes: dict[str, Any] = {}
        self.base: dict[str, Any] | None = None
        self.runs: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        held = json.loads(path.read_text())
        wanted = json.loads(json.dumps(about))
        if differ := [k for k in wanted if held["about"].get(k) != wanted[k]]:
            said = "; ".join(
                f"{k} {held['about'].get(k)} where {wanted[k]} was asked" for k in differ
            )
            raise ValueError(
                f"{path} holds runs of another comparison: {said}. Ask for the same, give another "
                "--out, or delete the file"
            )
        self.notes, self.base, self.runs = held["notes"], held["base"], held["runs"]

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Adds a run, or the base, and saves."""
        if name == "base":
            self.base = result
        else:
            self.runs[name] = result
        self.save()

    def save(self) -> None:
        """Writes the file atomically, one run per line."""
        heads = {"about": self.about, "notes": self.notes, "base": self.base}
        lines = [f" {json.dumps(k)}: {json.dumps(v)}," for k, v in heads.items()]
        runs = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in self.runs.items()]
        text = "\n".join(["{", *lines, ' "runs": {', ",\n".join(runs), " }", "}", ""])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(text)
        os.replace(part, self.path)


class Interval(NamedTuple):
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def interval(values: Scores, *, resamples: int = 2000) -> Interval:
    """Bootstraps the mean of `[T, N]` values; resamples training runs and images independently.

    Paired: a difference or a win of two models on the same image is one value here.
    """
    rng = np.random.default_rng(0)
    runs, images = values.shape
    # Counts of draws, not indices: a resample's mean is then a product.
    drawn = rng.multinomial(runs, np.full(runs, 1 / runs), resamples)
    seen = rng.multinomial(images, np.full(images, 1 / images), resamples)
    means = ((drawn @ values) * seen).sum(1) / (runs * images)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def wins(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns 1 where a score is above the other's, 1/2 where equal, else 0; shapes broadcast."""
    return np.where(scores > others, 1.0, np.where(scores == others, 0.5, 0.0))


class Row(NamedTuple):
    """The table's row of one objective; dicts are by judge."""

    name: str
    setting: Setting
    scores: dict[str, Scores]
    score: dict[str, Interval]
    against_base: dict[str, Interval]
    against_baseline: dict[str, Interval]  # empty for the baseline itself, and without it
    diversity: float
    seconds: float
    health: dict[str, float]
    skipped: int


def scores_of(trials: Sequence[Trial], runs: dict[str, Any], judge: str) -> Scores:
    """Returns the trials' scores, `[T, N]`."""
    return np.array([runs[trial.name]["scores"][judge] for trial in trials])


def done(trials: Sequence[Trial], runs: dict[str, Any]) -> bool:
    return all(trial.name in runs for trial in trials)


def make_row(
    trials: Sequence[Trial],
    runs: dict[str, Any],
    base: dict[str, Any],
    baseline: Sequence[Trial],
) -> Row:
    """Makes the row of an objective's final trials, all of them done.

    base: as `Bench.judge_base` made it. baseline: the baseline's trials, of the same seeds, or
    none.
    """
    mine = [runs[trial.name] for trial in trials]
    judges = list(base["held_out"]["scores"])
    scores = {judge: scores_of(trials, runs, judge) for judge in judges}
    against_baseline = {}
    if baseline and trials[0].row != BASELINE:
        for judge in judges:
            theirs = scores_of(baseline, runs, judge)
            against_baseline[judge] = interval(wins(scores[judge], theirs))
    healths = [one["health"] for one in mine]
    return Row(
        name=trials[0].row,
        setting=trials[0].setting,
        scores=scores,
        score={judge: interval(x) for judge, x in scores.items()},
        against_base={
            judge: interval(wins(x, np.array([base["held_out"]["scores"][judge]])))
            for judge, x in scores.items()
        },
        against_baseline=against_baseline,
        diversity=float(np.mean([one["diversity"] for one in mine])),
        seconds=float(np.mean([one["seconds_training"] for one in mine])),
        health={name: float(np.mean([h[name] for h in healths])) for name in healths[0]},
        skipped=sum(one["skipped"] for one in mine),
    )


def make_rows(results: Results, objectives: Sequence[str], seeds: int, judge: str) -> list[Row]:
    """Makes a row for each finished objective and its variants; best first by `judge`."""
    runs, base = results.runs, results.base
    if base is None:
        return []
    finals: list[list[Trial]] = []
    for objective in objectives:
        setting = chosen(objective, runs, judge)
        if setting is not None:
            finals += rows_of(objective, setting, seeds)
    finals = [trials for trials in finals if done(trials, runs)]
    baseline = next((trials for trials in finals if trials[0].row == BASELINE), [])
    rows = [make_row(trials, runs, base, baseline) for trials in finals]
    return sorted(rows, key=lambda row: -row.score[judge].mean)
