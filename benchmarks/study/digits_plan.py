"""Plan of the digits comparison: the budget, every objective's grid, every trial."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

BASELINE = "diffusion_dpo"  # all others are also compared with it
SHARES = (0.1, 0.2, 0.3)  # of the decided pairs' labels, flipped by --noise
# Training seeds; final runs count from 0. The full grid is trained with the first seed, its
# FINALISTS with the others too: the best of many on one seed may fail on the next.
TUNING_SEEDS, FINALISTS = (100, 101, 102), 2
# Blocks of image seeds, `seeds.EVALUATED + block * 2**20` on: nothing is trained on either.
TUNING_IMAGES, HELD_OUT_IMAGES = 1, 2
# More rows, with their objective's setting, not tuned themselves: the winner-preserving safeguard
# with its mu as published for SD1.5, and the judge's probabilities instead of labels drawn by them.
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "dmpo": ({"safeguard": 0.9}, {"probabilities": True}),
    "diffusion_dpo": ({"probabilities": True},),
}


@dataclasses.dataclass(frozen=True)
class Grid:
    """Nine settings of an objective: hyperparameters kept, betas tried, learning rates tried."""

    betas: tuple[float, ...] = ()
    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    kept: dict[str, float] = dataclasses.field(default_factory=dict)

    def settings(self) -> list["Setting"]:
        """Returns all settings, those of one compiled step together."""
        tried: list[dict[str, float]] = [{"beta": beta} for beta in self.betas] or [{}]
        return [Setting({**one, **self.kept}, rate) for one in tried for rate in self.rates]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Hyperparameters of an objective, and the peak learning rate."""

    hyperparameters: dict[str, float]
    rate: float

    def __str__(self) -> str:
        values = {**self.hyperparameters, "rate": self.rate}
        return " ".join(f"{name}={value:g}" for name, value in values.items())


# The logit u = beta/2 * margin has the same meaning in dmpo, diffusion_dpo, the alpha family
# and jensen_shannon: the same betas. diffusion_kto's has no half. ipo asks for a margin of
# 1/(2 beta), hinge for 1/beta: here of 0.3, 0.1 and 0.03, about what dmpo's betas ask for
# (2 * 4.6 / beta). dspo and mapo: from their published value up, and on both sides of it.
_LOGIT = (30.0, 100.0, 300.0)
GRIDS: dict[str, Grid] = {
    "dmpo": Grid(_LOGIT, kept={"alpha": 0.01}),
    "diffusion_dpo": Grid(_LOGIT, kept={"label_smoothing": 0.0}),
    "sft": Grid(rates=(1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 2e-4, 3e-4, 1e-3, 2e-3)),
    "ipo": Grid((1.5, 5.0, 15.0)),
    "hinge": Grid((3.0, 10.0, 30.0)),
    "dspo": Grid((0.001, 0.1, 1.0)),
    "diffusion_kto": Grid((15.0, 50.0, 150.0), kept={"chosen_weight": 1.0, "rejected_weight": 1.0}),
    "mapo": Grid((0.01, 0.1, 1.0)),
    "alpha_divergence": Grid(_LOGIT, kept={"alpha": 0.01, "order": 0.5}),
    "jensen_shannon": Grid(_LOGIT, kept={"alpha": 0.01}),
}


@dataclasses.dataclass(frozen=True)
class Budget:
    """Training and judging of every run. Runs of two budgets are not comparable.

    steps, batch_size: of training. pairs: made and labelled, a tenth of them for validation.
    tuning_images, images: judged per run, in tuning and at the end.
    """

    steps: int = 150
    batch_size: int = 32
    pairs: int = 1000
    tuning_images: int = 400
    images: int = 400


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training run and its judging.

    seed: of the data's order, noise and timesteps, and of the choice of flipped labels.
    flipped: share of flipped labels. safeguard: its mu; 0 is none. probabilities: train on them
    instead of drawn labels. tuning: judge on the tuning images, whose scores are kept as means
    only.
    """

    objective: str
    setting: Setting
    seed: int
    flipped: float = 0.0
    safeguard: float = 0.0
    probabilities: bool = False
    tuning: bool = False

    @property
    def row(self) -> str:
        """The name of its row in the table."""
        marks = {"safeguard": self.safeguard, "probabilities": self.probabilities}
        return " + ".join([self.objective, *(name for name, mark in marks.items() if mark)])

    @property
    def name(self) -> str:
        """Unique in a file of results."""
        parts = [self.row, str(self.setting), f"seed={self.seed}"]
        parts += [f"flipped={self.flipped:g}"] if self.flipped else []
        return " ".join(parts)

    @property
    def program(self) -> str:
        """Key that trials with one compiled step share."""
        return f"{self.row} {self.setting.hyperparameters}"


def tuning_trials(objective: str) -> list[Trial]:
    """Returns an objective's grid, the first round of tuning."""
    settings = GRIDS[objective].settings()
    return [Trial(objective, setting, TUNING_SEEDS[0], tuning=True) for setting in settings]


def second_round(objective: str, runs: dict[str, Any], judge: str) -> list[Trial] | None:
    """Returns the FINALISTS of the grid with the other seeds; None if the grid is not done."""
    trials = tuning_trials(objective)
    if any(trial.name not in runs for trial in trials):
        return None
    best = sorted(trials, key=lambda trial: -runs[trial.name]["scores"][judge])[:FINALISTS]
    return [dataclasses.replace(t, seed=seed) for t in best for seed in TUNING_SEEDS[1:]]


def final_trials(
    objective: str, setting: Setting, seeds: int, *, flipped: float = 0.0, **variant: Any
) -> list[Trial]:
    """Returns the runs of a chosen setting. variant: one of VARIANTS' dicts."""
    return [Trial(objective, setting, s, flipped=flipped, **variant) for s in range(seeds)]


def rows_of(objective: str, setting: Setting, seeds: int) -> list[list[Trial]]:
    """Returns the runs of each of an objective's rows in the table, its own first."""
    every = ({}, *VARIANTS.get(objective, ()))
    return [final_trials(objective, setting, seeds, **variant) for variant in every]


def chosen(objective: str, runs: dict[str, Any], judge: str) -> Setting | None:
    """Returns the finalist whose tuning images the judge scores highest, over all TUNING_SEEDS.

    runs: name -> result, as saved. None if tuning is not yet done.
    """
    second = second_round(objective, runs, judge)
    if second is None or any(trial.name not in runs for trial in second):
        return None

    finalists = {str(trial.setting): trial.setting for trial in second}
    return max(finalists.values(), key=lambda s: sum(tuning_scores(objective, s, runs, judge)))


def tuning_scores(
    objective: str, setting: Setting, runs: dict[str, Any], judge: str
) -> list[float]:
    """Returns scores of a setting's tuning seeds: all of TUNING_SEEDS, or the first alone."""
    names = [Trial(objective, setting, seed, tuning=True).name for seed in TUNING_SEEDS]
    return [runs[name]["scores"][judge] for name in names if name in runs]


def groups(trials: Sequence[Trial], done: Iterable[str]) -> list[list[Trial]]:
    """Groups the trials that are not done by compiled step, in the order given."""
    done, found = set(done), {}
    for trial in trials:
        if trial.name not in done:
            found.setdefault(trial.program, []).append(trial)
    return list(found.values())
