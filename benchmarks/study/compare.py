"""All objectives compared on two tasks: same pairs, same budget, same tuning effort.

    python benchmarks/study/compare.py            # hours on two cores
    python benchmarks/study/compare.py --report   # writes tables and plots again, trains nothing

Tasks are the packaged digits models, a UNet that predicts noise and a flow transformer. The
project's own jobs make each task's pairs once, in --work, labelled with a judge's probabilities;
every training seed draws its own labels from these. For every objective a search walks over beta,
learning rate and what else it has, from one setting to a better neighbour, until none is better
or `trials.most` were tried. The judge that labelled selects on validation seeds, after one training
run; the best two are trained with a second seed. The better one is then trained with five other
seeds, and two judges score these runs on held-out seeds, along the way too. dmpo and diffusion_dpo
are also trained at the same betas, and on probabilities, votes and wrong labels; dmpo with the
safeguard, anchors and moving references.

Writes OUT/compare.json (every run, as soon as it is done), compare.md and plots. Resumable: after
a kill, run the same command again.
"""

import argparse
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # imports by the same names as in tests

import rich.console  # noqa: E402
from etils import epath  # noqa: E402

from benchmarks.study import plots, tables  # noqa: E402
from benchmarks.study.results import Results, environment  # noqa: E402
from benchmarks.study.trials import TASKS, Budget, jobs, missing  # noqa: E402
from dmpo_jax.progress import Progress  # noqa: E402

JUDGE = "digits_svm"  # it labelled the pairs


def main() -> None:
    # For the workers, which start after this: saves a fifth of a core per step.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--report", action="store_true", help="only write tables and plots again")
    add("--workers", type=int, default=2, help="processes that share the cores (2)")
    add("--work", default=str(ROOT / "runs" / "compare"), help="folder for the pairs")
    add("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    budget = Budget()
    results = Results(args.out / "compare.json", budget)
    if not args.report:
        train(args, budget, results)
    text = tables.report(results, JUDGE)
    results.path.with_suffix(".md").write_text(text)
    plots.plot(args.out, results, JUDGE)
    print(text)


def train(args: argparse.Namespace, budget: Budget, results: Results) -> None:
    """Runs all that is missing; saves each result as soon as it is there."""
    from benchmarks.study.bench import make_pairs
    from benchmarks.study.workers import Workers

    work = epath.Path(args.work)
    for task in TASKS.values():
        make_pairs(task, budget, work)
    results.notes = environment(args.workers)
    # A separate console: sampling's output is suppressed by redirecting sys.stderr.
    console = rich.console.Console(file=sys.stderr)
    every = jobs()
    with (
        Workers(args.workers, budget, work, JUDGE) as workers,
        Progress(len(every), 0, "jobs", console=console) as bar,
    ):
        done = 0
        for name, _ in workers.run(every, results.runs):
            results.save()
            now = sum(missing(job, results.runs, JUDGE) == [] for job in every)
            bar.advance(now - done, last=name)
            done = now


if __name__ == "__main__":
    main()
