"""Comparison of all objectives on the digits job: same pairs, same budget, same tuning effort.

    python benchmarks/study/digits.py            # about an hour on 2 cores
    python benchmarks/study/digits.py --noise    # another: labels flipped
    python benchmarks/study/digits.py --table    # redraws table and plot, trains nothing

The project's own jobs make the pairs once, in --work. Every objective is trained with nine
settings (`digits_plan.GRIDS`). The judge that labelled the pairs selects two of them on
validation seeds, and one of these after two more training seeds each. That setting is trained
with other seeds, and two judges score these runs on held-out seeds. --noise takes those
settings and runs, and trains again with 10, 20 and 30 % of the decided labels flipped.

Writes OUT/digits.json (every run, as soon as it is done), digits.md and digits.png; with
--noise digits_noise.*. Resumable: after a kill, run the same command again.
"""

import argparse
import dataclasses
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # imports by the same names as in tests

import rich.console  # noqa: E402
from etils import epath  # noqa: E402

from benchmarks.study import digits_noise, digits_plan, digits_plots, digits_report  # noqa: E402
from benchmarks.study.digits_plan import GRIDS, Budget, Trial  # noqa: E402
from benchmarks.study.digits_runs import base_config, flip_labels, make_pairs  # noqa: E402
from benchmarks.study.digits_scores import Results, make_rows  # noqa: E402
from benchmarks.study.digits_workers import Group, Workers  # noqa: E402
from dmpo_jax.progress import Progress  # noqa: E402


def main() -> None:
    # For the workers, which start after this: saves a fifth of a core per step.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    args = parse()
    objectives = args.objectives
    budget = Budget(args.steps, args.batch_size, args.pairs, args.images, args.images)
    work = epath.Path(args.work) / f"pairs_{budget.pairs}"
    judges = list(base_config(budget).evaluate.judges or ())
    about = {**dataclasses.asdict(budget), "judges": judges}
    clean = Results(args.out / "digits.json", about)
    if args.noise:
        noisy = Results(args.out / "digits_noise.json", about)
        trials = digits_noise.noise_trials(clean, objectives, args.seeds, judges[0])
        if not args.table:
            train_noisy(args, budget, work, clean, noisy, trials)
        write_noise(args, clean, noisy, trials, judges)
    else:
        if not args.table:
            train_clean(args, budget, work, clean, objectives, judges[0])
        write_clean(args, clean, objectives, judges)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, budget = parser.add_argument, Budget()
    add("--noise", action="store_true", help="the same under label noise")
    add("--table", action="store_true", help="only write table and plot again")
    add("--objectives", nargs="+", choices=GRIDS, default=list(GRIDS), metavar="NAME")
    add("--seeds", type=int, default=3, help="training seeds of a chosen setting (3)")
    add("--steps", type=int, default=budget.steps, help=f"updates a run ({budget.steps})")
    add("--batch_size", type=int, default=budget.batch_size, help=f"({budget.batch_size})")
    add("--pairs", type=int, default=budget.pairs, help=f"to make ({budget.pairs})")
    add("--images", type=int, default=budget.images, help=f"that are judged ({budget.images})")
    add("--workers", type=int, default=2, help="processes that share the cores (2)")
    add("--work", default=str(ROOT / "runs" / "digits_benchmark"), help="folder for the pairs")
    add("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    if min(args.seeds, args.workers, args.steps, args.images // 2) < 1:
        parser.error("--seeds, --workers and --steps must be at least 1, --images at least 2")
    return args


def train_clean(
    args: argparse.Namespace,
    budget: Budget,
    work: epath.Path,
    results: Results,
    objectives: Sequence[str],
    judge: str,
) -> None:
    """Trains the grids, then the chosen settings."""
    make_pairs(budget, work)
    make_pairs(budget, work, probabilities=True)
    results.notes = notes(args)
    with Workers(args.workers, budget, work) as workers:
        trials = [trial for name in objectives for trial in digits_plan.tuning_trials(name)]
        run_all(workers, results, trials, "grids", with_base=True)
        trials = []
        for name in objectives:
            trials += digits_plan.second_round(name, results.runs, judge) or []
        run_all(workers, results, trials, "second round")
        trials = []
        for name in objectives:
            setting = digits_plan.chosen(name, results.runs, judge)
            if setting is None:
                raise RuntimeError(f"the tuning of {name} is not done, though all of it was run")
            for row in digits_plan.rows_of(name, setting, args.seeds):
                trials += row
        run_all(workers, results, trials, "final runs")


def run_all(
    workers: Workers,
    results: Results,
    trials: Sequence[Trial],
    stage: str,
    *,
    with_base: bool = False,
) -> None:
    """Runs the trials that have no result yet; saves each as soon as it is done."""
    todo: list[Group] = list(digits_plan.groups(trials, results.runs))
    if with_base and results.base is None:
        todo.insert(0, None)
    left = sum(1 if group is None else len(group) for group in todo)
    start = len(trials) + with_base - left
    # A separate console: sampling's output is suppressed by redirecting sys.stderr.
    console = rich.console.Console(file=sys.stderr)
    with Progress(len(trials) + with_base, start, stage, console=console) as bar:
        for name, result in workers.run(todo):
            results.add(name, result)
            bar.advance(1, last=name)


def train_noisy(
    args: argparse.Namespace,
    budget: Budget,
    work: epath.Path,
    clean: Results,
    noisy: Results,
    trials: dict[str, dict[float, list[Trial]]],
) -> None:
    make_pairs(budget, work)
    for share in digits_plan.SHARES:
        for seed in range(args.seeds):
            flip_labels(work, share, seed)
    noisy.notes, noisy.base = notes(args), clean.base
    every = [t for of in trials.values() for s, each in of.items() if s for t in each]
    with Workers(args.workers, budget, work) as workers:
        run_all(workers, noisy, every, "label noise")


def notes(args: argparse.Namespace) -> dict[str, Any]:
    """Describes the machine and the workers, of the last call if there were several."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax"))
    lines = pathlib.Path("/proc/cpuinfo")
    text = lines.read_text().splitlines() if lines.exists() else []
    cpu = next((line.split(":")[1].strip() for line in text if "model name" in line), "CPU")
    one = "one process with two devices"
    many = f"{args.workers} processes with one device each"
    return {
        "environment": f"{cpu}, {cores} cores; {packages}",
        "workers": one if args.workers == 1 else many,
    }


def command() -> str:
    """Returns the command that trains the runs of the tables."""
    given = [word for word in sys.argv[1:] if word != "--table"]
    return shlex.join(["python", "benchmarks/study/digits.py", *given])


def write_clean(
    args: argparse.Namespace,
    results: Results,
    objectives: Sequence[str],
    judges: Sequence[str],
) -> None:
    rows = make_rows(results, objectives, args.seeds, judges[0])
    if not rows:
        raise SystemExit(
            f"{results.path} has no objective whose runs are all done: nothing to show"
        )
    text = digits_report.report(results, rows, judges, command())
    results.path.with_suffix(".md").write_text(text)
    digits_plots.plot(results.path.with_suffix(".png"), results, rows, judges)
    print(text)


def write_noise(
    args: argparse.Namespace,
    clean: Results,
    noisy: Results,
    trials: dict[str, dict[float, list[Trial]]],
    judges: list[str],
) -> None:
    curves = digits_noise.make_curves(clean, noisy, trials, judges)
    if not curves:
        raise SystemExit(f"{noisy.path} has no objective whose runs are all done: nothing to show")
    text = digits_report.noise_report(noisy, curves, judges, command())
    noisy.path.with_suffix(".md").write_text(text)
    digits_plots.plot_noise(noisy.path.with_suffix(".png"), noisy, curves, judges)
    print(text)


if __name__ == "__main__":
    main()
