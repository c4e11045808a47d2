"""Numbers of the comparison under label noise: one curve per objective."""

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.study.digits_plan import SHARES, Trial, chosen, final_trials
from benchmarks.study.digits_scores import Interval, Results, Scores, done, interval, scores_of


class Curve(NamedTuple):
    """An objective's scores by judge and by share of flipped labels, 0 included."""

    name: str
    scores: dict[str, dict[float, Scores]]
    score: dict[str, dict[float, Interval]]
    change: dict[str, Interval]  # from share 0 to the largest, paired


def noise_trials(
    clean: Results, objectives: Sequence[str], seeds: int, judge: str
) -> dict[str, dict[float, list[Trial]]]:
    """Returns every objective's trials by share, 0 included, whose runs are in `clean`.

    Raises:
        ValueError: the comparison without noise is not done for one of them.
    """
    found = {}
    for objective in objectives:
        setting = chosen(objective, clean.runs, judge)
        trials = final_trials(objective, setting, seeds) if setting else []
        if setting is None or not done(trials, clean.runs):
            raise ValueError(
                f"{clean.path} lacks runs of {objective}: run benchmarks/study/digits.py without "
                f"--noise first, with --seeds={seeds} at least"
            )
        noisy = {s: final_trials(objective, setting, seeds, flipped=s) for s in SHARES}
        found[objective] = {0.0: trials, **noisy}
    return found


def make_curves(
    clean: Results, noisy: Results, trials: dict[str, dict[float, list[Trial]]], judges: list[str]
) -> list[Curve]:
    """Makes a curve for each finished objective; best first at the largest share, by judges[0]."""
    runs = {**clean.runs, **noisy.runs}
    curves = []
    for name, by_share in trials.items():
        if not all(done(each, runs) for each in by_share.values()):
            continue
        scores = {
            judge: {share: scores_of(each, runs, judge) for share, each in by_share.items()}
            for judge in judges
        }
        most = max(by_share)
        curves.append(
            Curve(
                name,
                scores,
                {j: {s: interval(x) for s, x in of.items()} for j, of in scores.items()},
                {j: interval(of[most] - of[0.0]) for j, of in scores.items()},
            )
        )
    most = max(SHARES)
    return sorted(curves, key=lambda curve: -curve.score[judges[0]][most].mean)
