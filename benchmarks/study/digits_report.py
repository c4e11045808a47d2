"""Markdown tables of the digits comparison, from its numbers alone."""

from collections.abc import Sequence

from benchmarks.study.digits_noise import Curve
from benchmarks.study.digits_plan import (
    BASELINE,
    FINALISTS,
    GRIDS,
    TUNING_SEEDS,
    Setting,
    chosen,
    tuning_scores,
    tuning_trials,
)
from benchmarks.study.digits_scores import Interval, Results, Row


def percent(x: Interval | None) -> str:
    if x is None:
        return "-"
    mean, low, high = (100 * value for value in x)
    return f"{mean:.1f} % [{low:.1f}, {high:.1f}]"


def number(x: Interval, sign: str = "") -> str:
    return f"{x.mean:{sign}.3f} [{x.low:{sign}.3f}, {x.high:{sign}.3f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Formats a Markdown table as lines."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)] + [""]


def how(results: Results, command: str) -> list[str]:
    """Describes in words how the runs were made."""
    about, notes = results.about, results.notes
    seen = about["steps"] * about["batch_size"]
    return [
        f"Written by `{command}`; raw numbers in `{results.path.name}`, every run a line.",
        "",
        f"The digits job of `configs/digits_dmpo.py`, every run on the same {about['pairs']} pairs "
        f"(labelled by {about['judges'][0]}, a tenth of them for validation), {about['steps']} "
        f"updates of {about['batch_size']} pairs ({seen} pairs in all) from the same base. "
        f"{notes['environment']}; {notes['workers']}.",
        "",
    ]


def report(results: Results, rows: Sequence[Row], judges: Sequence[str], command: str) -> str:
    """Formats the comparison as Markdown."""
    first, second = judges
    seeds = max(len(row.scores[first]) for row in rows)
    about, base = results.about, results.base or {}
    means = {j: sum(s) / len(s) for j, s in base["held_out"]["scores"].items()}
    lines = ["# Every objective on the digits job", "", *how(results, command)]
    lines += [
        f"Each objective's setting is chosen by the mean score that {first} gives to "
        f"{about['tuning_images']} validation seeds: the best {FINALISTS} of "
        f"{len(tuning_trials('dmpo'))} (below) after a training run, and of these the better one "
        f"by {len(TUNING_SEEDS)} runs. With it, {seeds} other training seeds, judged on "
        f"{about['images']} held-out seeds; neither chose anything. Brackets: 95 % bootstrap "
        "intervals over training seeds and held-out seeds, paired where two models are compared; "
        f"{seeds} training seeds tell of the spread between runs only roughly. Score: mean "
        "probability, by the judge, of what the caption says. Wins: how often an image scores "
        "higher than the other model's from the same seed (equal counts half), and against "
        f"{BASELINE} of the same training seed too.",
        "",
        f"The base scores {means[first]:.3f} by {first} and {means[second]:.3f} by {second}, and "
        f"its diversity is {base['held_out']['diversity']:.3f}.",
        "",
    ]
    head = ["objective"] + [f"score, {j}" for j in judges]
    head += [f"wins against base, {j}" for j in judges]
    head += [f"wins against {BASELINE}, {j}" for j in judges]
    cells = []
    for row in rows:
        cells.append([row.name, *(number(row.score[j]) for j in judges)])
        cells[-1] += [percent(row.against_base[j]) for j in judges]
        cells[-1] += [percent(row.against_baseline.get(j)) for j in judges]
    lines += [*table(head, cells), *_details(rows), *_grids(results, rows, first)]
    return "\n".join(lines)


def _details(rows: Sequence[Row]) -> list[str]:
    lines = [
        "Diversity: mean root-mean-square pixel distance between two held-out images of a caption. "
        "Seconds of training, without compiling. From the validation split, against the base, "
        "after the last update, at timesteps and noises that are the same for all: implicit "
        "accuracy (ties count half), margin, and how much larger the error became on the chosen "
        "and on the rejected images (below 0: the policy predicts them better than the base). "
        "Means over training seeds.",
        "",
    ]
    head = ["objective", "setting", "diversity", "seconds", "accuracy", "margin"]
    head += ["chosen gain", "rejected gain", "updates skipped"]
    cells = []
    for row in rows:
        gains = [f"{row.health[f'{side}_gain']:+.5f}" for side in ("chosen", "rejected")]
        health = [f"{row.health['implicit_accuracy']:.3f}", f"{row.health['margin']:+.5f}"]
        cells.append([row.name, str(row.setting), f"{row.diversity:.3f}", f"{row.seconds:.0f}"])
        cells[-1] += [*health, *gains, str(row.skipped)]
    return [*lines, *table(head, cells)]


def _grids(results: Results, rows: Sequence[Row], judge: str) -> list[str]:
    """Formats every point of every grid, the chosen one in bold."""
    lines = [
        f"The grids, and the mean score by {judge} on the validation seeds, of each tuning run:",
        "",
    ]
    cells, names = [], [row.name for row in rows if row.name in GRIDS]
    for name in names:
        best = chosen(name, results.runs, judge)
        cells.append([name])
        for trial in tuning_trials(name):
            scores = tuning_scores(name, trial.setting, results.runs, judge)
            betas = [f"β {v:g}, " for k, v in trial.setting.hyperparameters.items() if k == "beta"]
            text = (
                f"{''.join(betas)}{trial.setting.rate:g}: {', '.join(f'{x:.3f}' for x in scores)}"
            )
            cells[-1].append(f"**{text}**" if trial.setting == best else text)
    count = max((len(row) for row in cells), default=1) - 1
    lines += table(["objective", *[""] * count], cells)
    if ends := [name for name in names if at_an_end(name, chosen(name, results.runs, judge))]:
        lines += [f"At an end of its betas or rates: {', '.join(ends)}.", ""]
    if any(row.name not in GRIDS for row in rows):
        said = "Rows with a + have their objective's setting, and were not tuned themselves. "
        said += (
            "probabilities: trained on the judge's probabilities instead of labels drawn by them."
        )
        lines += [said, ""]
    return lines


def at_an_end(objective: str, setting: Setting | None) -> bool:
    """True if a setting has the smallest or largest beta or rate of its grid."""
    grid = GRIDS[objective]
    if setting is None:
        return False
    ends = [(setting.rate, grid.rates)]
    if grid.betas:
        ends.append((setting.hyperparameters["beta"], grid.betas))
    return any(value in (min(tried), max(tried)) for value, tried in ends)


def noise_report(
    results: Results, curves: Sequence[Curve], judges: Sequence[str], command: str
) -> str:
    """Formats the comparison under label noise as Markdown."""
    seeds = max(len(curve.scores[judges[0]][0.0]) for curve in curves)
    lines = ["# Label noise on the digits job", "", *how(results, command)]
    lines += [
        "A share of the decided training pairs has its label flipped: other pairs for each "
        f"training seed, those of a smaller share among those of a larger. {seeds} training seeds, "
        "each objective at the setting that was chosen without flips. The labels are noisy before "
        "that: the judge names them by Bradley-Terry. Mean score on held-out seeds with 95 % "
        "bootstrap intervals, and what the largest share changes, paired by training seed and "
        "held-out seed. Best first at that share.",
        "",
    ]
    for judge in judges:
        shares = sorted(curves[0].scores[judge])
        head = [f"objective, score by {judge}", *(f"{100 * s:g} %" for s in shares)]
        cells = []
        for curve in curves:
            cells.append([curve.name, *(number(curve.score[judge][s]) for s in shares)])
            cells[-1].append(number(curve.change[judge], sign="+"))
        lines += table([*head, "change"], cells)
    return "\n".join(lines)
