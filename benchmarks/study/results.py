"""Results of the comparison on disk, and its intervals."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from benchmarks.study.trials import Budget


class Results:
    """A file of results, rewritten after every run; reading it resumes the comparison.

    Raises:
        ValueError: it holds runs of another budget; names what differs, and what to do.
    """

    def __init__(self, path: pathlib.Path, budget: Budget):
        self.path, self.about = path, json.loads(json.dumps(dataclasses.asdict(budget)))
        self.notes: dict[str, Any] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        held = json.loads(path.read_text())
        theirs = held["about"]
        if differ := [k for k in self.about if theirs.get(k) != self.about[k]]:
            said = "; ".join(f"{k} {theirs.get(k)}, not {self.about[k]}" for k in differ)
            raise ValueError(
                f"{path} holds runs of another budget: {said}. Give another --out, or delete it"
            )
        self.notes, self.runs = held["notes"], held["runs"]

    def save(self) -> None:
        """Writes the file atomically, one run per line."""
        heads = {"about": self.about, "notes": self.notes}
        lines = [f" {json.dumps(k)}: {json.dumps(v)}," for k, v in heads.items()]
        runs = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in self.runs.items()]
        text = "\n".join(["{", *lines, ' "runs": {', ",\n".join(runs), " }", "}", ""])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(text)
        os.replace(part, self.path)


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def apart(self, value: float) -> bool:
        return not self.low <= value <= self.high


def interval(values: Sequence[float]) -> Interval:
    """Returns the mean over training runs and its t interval; NaN bounds of fewer than two."""
    x = np.asarray(values, np.float64)
    mean = float(x.mean()) if len(x) else float("nan")
    if len(x) < 2:
        return Interval(mean, float("nan"), float("nan"))
    half = scipy.stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return Interval(mean, float(mean - half), float(mean + half))


def environment(workers: int) -> dict[str, str]:
    """Describes the machine and the workers, of the last call if there were several."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax"))
    lines = pathlib.Path("/proc/cpuinfo")
    text = lines.read_text().splitlines() if lines.exists() else []
    cpu = next((line.split(":")[1].strip() for line in text if "model name" in line), "CPU")
    return {
        "environment": f"{cpu}, {cores} cores; {packages}",
        "workers": f"{workers} processes with one device each",
    }
