"""Training curves of a healthy run and of four faulty ones, with their win rates.

    python benchmarks/study/health_curves.py           # about a quarter of an hour on 2 cores
    python benchmarks/study/health_curves.py --table   # redraws, trains nothing

Runs the digits job by `launch/train.py`, once with its own config and once for each fault in
RUNS, on the same pairs. Each run is judged on held-out seeds. Writes OUT/health_curves.json
(curves and win rates), health_curves.md and health_curves.png. Existing runs are kept.
"""

import argparse
import contextlib
import json
import pathlib
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
from etils import epath  # noqa: E402
from matplotlib import pyplot  # noqa: E402

from dmpo_jax.config.files import load_config  # noqa: E402
from dmpo_jax.data.encoded import records  # noqa: E402
from dmpo_jax.jobs.run import run as run_jobs  # noqa: E402
from tests.support.encoded import write_pairs  # noqa: E402

matplotlib.use("Agg")

# Name -> (settings, the share of labels flipped).
RUNS: dict[str, tuple[dict[str, float], float]] = {
    "healthy": ({}, 0.0),
    "rate 10 times too high": ({"optimizer.learning_rate": 1e-3}, 0.0),
    "β 100 times too low": ({"objectives.dmpo.beta": 3.0}, 0.0),
    "β 30 times too high": ({"objectives.dmpo.beta": 9000.0}, 0.0),
    "labels drawn by lot": ({}, 0.5),
}
# Title of a panel -> the curves in it.
PANELS = {
    "loss": ("loss", "validation_loss"),
    "implicit accuracy": ("implicit_accuracy", "validation_implicit_accuracy"),
    "margin, 5 to 95 %": ("margin", "margin_p05", "margin_p95"),
    "error against the reference's": ("chosen_gain", "rejected_gain"),
    "shares": ("past_optimum", "saturation"),
}
# Not plotted: what alarms judge beside (tests/training/test_alarms.py).
JUDGED = ("chosen_error", "rejected_error", "grad_norm", "margin_abs_max", "learning_rate", "ties")
SMOOTHED = 15  # updates per mean in the plots
COLOURS = ("#0072B2", "#D55E00", "#888888")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="only draw again")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "runs" / "health_curves")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--steps", type=int, default=150, help="updates a run (150)")
    args = parser.parse_args()
    file = args.out / "health_curves.json"
    if not args.table:
        found = {name: run(name, args.work, args.steps) for name in RUNS}
        args.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found) + "\n")
    found = json.loads(file.read_text())
    plot(found, file.with_suffix(".png"))
    text = table(found)
    file.with_suffix(".md").write_text(text + "\n")
    print(text)


def run(name: str, work: pathlib.Path, steps: int) -> dict[str, Any]:
    """Trains a run, unless it exists; returns its curves by update and the judges' result."""
    settings, flipped = RUNS[name]
    encoded = make_pairs(epath.Path(work))
    if flipped:
        encoded = flip_labels(encoded, flipped, 0)
    workdir = work / f"{name.replace(' ', '_')}_{steps}"
    if not (workdir / "result.json").exists():
        leaves = {
            "jobs": "('train','evaluate')",
            "data.encoded": encoded,
            "train.steps": steps,
            "log.every": 1,
            "log.validate_every": 10,
            "log.sample_every": 0,
            **settings,
        }
        command = [sys.executable, "launch/train.py", "--config=configs/digits_dmpo.py"]
        command += [f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in leaves.items())]
        subprocess.run(command, cwd=ROOT, check=True)
    curves: dict[str, list[tuple[int, float]]] = {}
    wanted = {curve for panel in PANELS.values() for curve in panel} | set(JUDGED)
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for key in wanted & set(row):
            curves.setdefault(key, []).append((row["step"], float(f"{row[key]:.5g}")))
    result = json.loads((workdir / "result.json").read_text())
    return {"settings": settings, "flipped": flipped, "curves": curves, "result": result}


def make_pairs(work: epath.Path) -> epath.Path:
    """Collects and encodes the job's pairs, unless they exist; returns the encoded folder."""
    config = load_config(str(ROOT / "configs" / "digits_dmpo.py"))
    config.jobs = ("collect", "encode")
    run_jobs(config, work / "pairs")
    return work / "pairs" / "encoded"


def flip_labels(encoded: epath.Path, share: float, seed: int) -> epath.Path:
    """Copies encoded pairs with `share` of the training labels flipped; returns the new folder.

    Only decided pairs are flipped; ties, the validation split and the order stay.
    """
    out = encoded.parent / f"flipped_{share:g}_seed{seed}"
    with contextlib.suppress(FileNotFoundError, records.IncompleteError):
        records.load_meta(out)
        return out
    pairs = records.open_pairs(encoded)
    splits = {}
    for split in records.SPLITS:
        source = pairs.split(split)
        splits[split] = [source[i] for i in range(len(source))]
    wrong = flipped_rows(np.array([p.preference for p in splits["train"]]), share, seed)
    for i in wrong:  # write_pairs puts the preferred image first
        splits["train"][i] = splits["train"][i]._replace(
            preference=1 - splits["train"][i].preference
        )
    prompts = [pairs.prompts[i] for i in range(pairs.meta.counts["prompts"])]
    meta = {k: v for k, v in pairs.meta.to_json().items() if k not in records.WRITTEN_META}
    write_pairs(out, splits, prompts, {**meta, "flipped_share": share})
    return out


def flipped_rows(preference: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Returns rows of `preference` `[N]` to flip: `share` of those that are not 0.5, rounded."""
    decided = np.flatnonzero(preference != 0.5)
    return np.random.default_rng(seed).permutation(decided)[: round(share * len(decided))]


def smooth(points: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns means of up to SMOOTHED points, fewer at the start, at the last point's update."""
    steps, values = np.array(points).T
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - SMOOTHED, 0)
    return steps, (sums[ends] - sums[starts]) / (ends - starts)


def plot(found: dict[str, Any], path: pathlib.Path) -> None:
    """Plots a row per run and a column per panel; accuracy and shares have fixed scales."""
    size = (2.9 * len(PANELS), 1.75 * len(found) + 0.6)
    figure, axes = pyplot.subplots(
        len(found), len(PANELS), figsize=size, sharex=True, squeeze=False, layout="constrained"
    )
    for row, (name, one) in zip(axes, found.items(), strict=True):
        for axis, (title, names) in zip(row, PANELS.items(), strict=True):
            for colour, curve in zip(COLOURS, names, strict=False):
                _curve(axis, one["curves"][curve], curve, colour)
            level = {"implicit accuracy": 0.5, "shares": None, "loss": None}.get(title, 0.0)
            if level is not None:
                axis.axhline(level, color="black", linewidth=0.6, linestyle=":")
            if title in ("implicit accuracy", "shares"):
                axis.set_ylim((0.3, 0.9) if title == "implicit accuracy" else (-0.03, 1.03))
            axis.grid(color="#dddddd", linewidth=0.5)
            axis.tick_params(labelsize=7)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(name, fontsize=9)
    for axis, title in zip(axes[0], PANELS, strict=True):
        axis.set_title(title, fontsize=9)
    for axis, title in zip(axes[0], PANELS, strict=True):
        if title not in ("implicit accuracy", "shares"):
            axis.margins(y=0.3)  # room for the legend
        axis.legend(fontsize=6.5, frameon=False)
    for axis in axes[-1]:
        axis.set_xlabel("update", fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _curve(axis: Any, points: list[tuple[int, float]], name: str, colour: str) -> None:
    if name.startswith("validation"):
        axis.plot(*np.array(points).T, "o", color=colour, markersize=2.5, label="validation")
        return
    style = "--" if name.endswith(("p05", "p95")) else "-"
    axis.plot(*smooth(points), style, color=colour, linewidth=1.2, label=name)


def table(found: dict[str, Any]) -> str:
    """Formats the end of each run as Markdown.

    Means of the last SMOOTHED updates, and win rates against the base.
    """
    judges = list(next(iter(found.values()))["result"]["judges"])
    heads = ["run", "loss", "accuracy", "validation", "margin", "chosen_gain", "rejected_gain"]
    heads += ["past_optimum", "saturation", *(f"win rate, {judge}" for judge in judges)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, one in found.items():
        last = {k: smooth(v)[1][-1] for k, v in one["curves"].items()}
        cells = [name, f"{last['loss']:.4f}", f"{last['implicit_accuracy']:.3f}"]
        cells += [f"{last['validation_implicit_accuracy']:.3f}"]
        cells += [f"{last[k]:+.5f}" for k in ("margin", "chosen_gain", "rejected_gain")]
        cells += [f"{last[k]:.2f}" for k in ("past_optimum", "saturation")]
        rates = one["result"]["judges"]
        cells += [f"{100 * rates[judge]['win_rate']:.1f} %" for judge in judges]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
