"""Plan of the comparison: tasks, budget, every objective's search, every trial.

All of it is a function of the results so far: `missing` names the trials that a job still needs.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
BASELINE = "diffusion_dpo"  # all others are also compared with it
# Final runs have the seeds 0 to SEEDS - 1: of labels, order, noise and timesteps. Searches and the
# choice between the FINALISTS have other ones: the best of many on one seed may fail on the next.
SEEDS, SEARCH_SEED, SECOND_SEED, FINALISTS = 5, 100, 101, 2
# Blocks of image seeds, `seeds.EVALUATED + block * 2**20` on: nothing is trained on either.
TUNING_IMAGES, HELD_OUT_IMAGES = 1, 2
RELABELLED = ("dmpo", "diffusion_dpo")  # trained with other labels too
GUARDED = ("dmpo",)
BETAS = (0.3, 1.0, 3.0, 10.0)  # in units of the task's: RELABELLED are compared at each of them
LABELS: tuple[dict[str, Any], ...] = (
    {"labels": "probability"},
    {"labels": "votes5"},
    *({"flipped": share} for share in (0.1, 0.2, 0.3)),
)
# Anchors' weights are shares of beta, whose half a pair's pull on an error is at most.
GUARDS: tuple[dict[str, Any], ...] = (
    *({"mu": mu} for mu in (0.1, 0.5, 0.9)),
    *({"anchor": (kind, 0.1)} for kind in ("sft", "hinge")),
    *({"moving": moving} for moving in ((0.95, 1), (0.0, 30))),
)

Runs = Mapping[str, Mapping[str, Any]]  # results by the trial's name


@dataclasses.dataclass(frozen=True)
class Task:
    """A model and its pairs. config: the job that makes them, `configs/NAME.py`.

    steps: updates of every run. points: of a search, at most, for each value that is searched.
    beta, rate: where searches begin, of a loss of the implied logit.
    """

    name: str
    title: str
    steps: int
    points: int
    beta: float
    rate: float

    @property
    def config(self) -> pathlib.Path:
        return ROOT / "configs" / f"{self.name}.py"


TASKS = {
    task.name: task
    for task in (
        Task("digits_dmpo", "digits, UNet, noise prediction", 120, 4, 30.0, 1e-4),
        Task("digits_flow_dmpo", "digits, transformer, flow matching", 60, 3, 100.0, 1e-4),
    )
}


@dataclasses.dataclass(frozen=True)
class Budget:
    """Training and judging of every run. Runs of two budgets are not comparable.

    steps: updates by task. pairs: made and labelled, a tenth of them for validation.
    tuning_images, path_images, images: judged in a search, along a final run and at its end.
    path: shares of a final run's updates at which it is judged beside.
    """

    steps: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {name: task.steps for name, task in TASKS.items()}
    )
    batch_size: int = 16
    pairs: int = 1000
    tuning_images: int = 200
    path_images: int = 200
    images: int = 400
    path: tuple[float, ...] = (0.5,)


RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
ALPHAS = (0.003, 0.01, 0.03, 0.1, 0.3)


@dataclasses.dataclass(frozen=True)
class Space:
    """The space of a search: ladders of values by hyperparameter, and the first value of each.

    beta: of the implied logit's, in units of the task's: 0.5 is half of it. None: no beta.
    """

    beta: float | None = 1.0
    ladders: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    first: Mapping[str, float] = dataclasses.field(default_factory=dict)
    kept: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rate: float = 1.0  # in units of the task's

    def axes(self, task: Task) -> dict[str, tuple[float, ...]]:
        """Returns each axis's values in order."""
        beta: dict[str, tuple[float, ...]] = {}
        if self.beta is not None:
            middle = self.beta * task.beta
            beta = {"beta": tuple(short(middle * f) for f in _LADDER)}
        return {**beta, **self.ladders, "rate": RATES}

    def start(self, task: Task) -> dict[str, float]:
        beta = {} if self.beta is None else {"beta": short(self.beta * task.beta)}
        return {**beta, **self.first, "rate": short(self.rate * task.rate)}


def short(value: Any) -> float:
    return float(f"{float(value):.6g}")


_LADDER = (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
# The logit u = beta/2 * margin has the same meaning in dmpo, diffusion_dpo, poly_dpo, the alpha
# family and jensen_shannon. diffusion_kto's has no half. ipo asks for a margin of 1/(2 beta), hinge
# for 1/beta: of about what dmpo's beta asks for, 2 * 4.6 / beta. linear_dpo's weight is at its
# bound where 0.2 beta Delta is 0.45. dspo and mapo start at their published values.
_MIXED = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_ALPHA = {"ladders": {"alpha": ALPHAS}, "first": {"alpha": 0.01}}
SPACES: dict[str, Space] = {
    "dmpo": Space(**_ALPHA),
    "diffusion_dpo": Space(
        ladders={"label_smoothing": (0.0, 0.03, 0.1, 0.3)}, first={"label_smoothing": 0.0}
    ),
    "diffusion_kto": Space(0.5, kept={"chosen_weight": 1.0, "rejected_weight": 1.0}),
    "ipo": Space(0.05),
    "nft": Space(None, ladders={"b": _MIXED}, first={"b": 0.1}),
    "sft": Space(None, rate=0.1),
    "poly_dpo": Space(ladders={"a": (-0.5, 2.0, 8.0, 30.0)}, first={"a": 8.0}),
    "jensen_shannon": Space(kept={"alpha": 0.01}),
    "linear_dpo": Space(3.0, kept={"eta": 0.05}),
    "hinge": Space(0.1),
    "alpha_divergence": Space(kept={"alpha": 0.01, "order": 0.5}),
    "dspo_sdxl": Space(),
    "nft_adaptive": Space(None, ladders={"b": _MIXED}, first={"b": 0.1}),
    # Both fine-tune on the chosen image too, and begin at sft's rate.
    "mapo": Space(0.001, rate=0.1),
    "dspo": Space(3e-5, rate=0.1),
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training run and its judging.

    setting: hyperparameters and the peak rate. seed: of labels, order, noise and timesteps.
    labels: "drawn", "votesK" or "probability". flipped: share of labels turned round.
    mu: the safeguard's; 0 is none. anchor: (kind, weight as a share of beta).
    moving: (decay, every) of a moving reference. tuning: judged on the tuning images.
    """

    task: str
    objective: str
    setting: tuple[tuple[str, float], ...]
    seed: int
    labels: str = "drawn"
    flipped: float = 0.0
    mu: float = 0.0
    anchor: tuple[str, float] | None = None
    moving: tuple[float, int] | None = None
    tuning: bool = False
    along: bool = True  # judged along the way too

    @property
    def hyperparameters(self) -> dict[str, float]:
        return {name: value for name, value in self.setting if name != "rate"}

    @property
    def rate(self) -> float:
        return dict(self.setting)["rate"]

    @property
    def variant(self) -> str:
        """The differences from the objective's own run, in words; empty for that."""
        marks = {"labels": self.labels if self.labels != "drawn" else "", "flipped": self.flipped}
        marks |= {"mu": self.mu, "anchor": self.anchor, "moving": self.moving}
        return " ".join(f"{name}={_words(mark)}" for name, mark in marks.items() if mark)

    @property
    def name(self) -> str:
        """Unique in a file of results."""
        parts = [self.task, self.objective, words(self.setting), self.variant, f"seed={self.seed}"]
        return " ".join(part for part in parts if part)

    @property
    def program(self) -> str:
        """Key that trials with one compiled update share."""
        return f"{self.task} {self.mu} {self.moving is not None}"


def words(setting: Iterable[tuple[str, float]]) -> str:
    return " ".join(f"{name}={value:g}" for name, value in setting)


def _words(mark: Any) -> str:
    if isinstance(mark, tuple):
        return ",".join(f"{x:g}" if isinstance(x, float) else str(x) for x in mark)
    return f"{mark:g}" if isinstance(mark, float) else str(mark)


@dataclasses.dataclass(frozen=True)
class Job:
    """The work that a worker takes at a time.

    stage: "objective" is search, choice and final runs; "labels" and "guards" are the variants of
    the chosen setting; "betas" are the runs of `same_betas`.
    """

    task: str
    objective: str
    stage: str = "objective"


def branches(objective: str) -> list[tuple[str, tuple[tuple[str, float], ...]]]:
    """Returns an objective with every choice of its hyperparameters but beta."""
    space = SPACES[objective]
    found: list[dict[str, float]] = [dict(space.kept)]
    for name, ladder in space.ladders.items():
        found = [{**one, name: value} for one in found for value in ladder]
    return [(objective, tuple(sorted(one.items()))) for one in found]


def jobs() -> list[Job]:
    """Returns all jobs, the most wanted first."""
    first, second = TASKS
    main = [Job(first, name) for name in SPACES]
    labels = [Job(first, name, "labels") for name in RELABELLED]
    guards = [Job(first, name, "guards") for name in GUARDED]
    betas = [Job(first, name, "betas") for name in RELABELLED]
    others = [Job(second, name) for name in SPACES]
    others[2:2] = [Job(second, name, "betas") for name in RELABELLED]
    return [*main[:8], *betas, *labels, *main[8:10], *guards, *main[10:13], *others, *main[13:]]


def missing(job: Job, runs: Runs, judge: str) -> list[Trial] | None:
    """Returns the trials to run next, none if the job is done; None if another must end first."""
    if job.stage == "betas":
        return _left([t for each in same_betas(job.task, job.objective) for t in each], runs)
    setting = chosen(job.task, job.objective, runs, judge)
    if job.stage == "objective":
        if setting is None:
            return _search(job.task, job.objective, runs, judge)
        return _left(finals(job.task, job.objective, setting), runs)
    if setting is None or _left(finals(job.task, job.objective, setting), runs):
        return None
    kinds = LABELS if job.stage == "labels" else GUARDS
    return _left([t for k in kinds for t in finals(job.task, job.objective, setting, **k)], runs)


def finals(
    task: str, objective: str, setting: tuple[tuple[str, float], ...], **variant: Any
) -> list[Trial]:
    """Returns the final runs of a setting, or of a variant of it."""
    return [Trial(task, objective, setting, seed, **variant) for seed in range(SEEDS)]


def same_betas(task: str, objective: str) -> list[list[Trial]]:
    """Returns the final runs at each of BETAS, otherwise at the search's first values."""
    middle, start = TASKS[task].beta, SPACES[objective].start(TASKS[task])
    settings = [_trial(task, objective, {**start, "beta": short(f * middle)}) for f in BETAS]
    return [finals(task, objective, trial.setting, along=False) for trial in settings]


def searched(task: str, objective: str, runs: Runs) -> list[Trial]:
    """Returns the points of a search that were run."""
    return [trial for name, trial in _points(task, objective).items() if name in runs]


def chosen(
    task: str, objective: str, runs: Runs, judge: str
) -> tuple[tuple[str, float], ...] | None:
    """Returns the setting that search and second seed choose; None if they are not done."""
    if _search(task, objective, runs, judge):
        return None
    return _pick(_best(task, objective, runs, judge), runs, judge).setting


def at_an_edge(
    task: str, objective: str, setting: tuple[tuple[str, float], ...], runs: Runs
) -> list[str]:
    """Returns the axes along which nothing was tried on one side of a setting.

    A label smoothing of 0 is no edge: there is nothing below.
    """
    tried = [dict(t.setting) for t in searched(task, objective, runs)]
    edges = []
    for name in SPACES[objective].axes(TASKS[task]):
        value, values = dict(setting)[name], {point[name] for point in tried}
        if value == max(values) or (value == min(values) and value > 0):
            edges.append(name)
    return edges


def score(trial: Trial, runs: Runs, judge: str) -> float:
    return runs[trial.name]["scores"][judge]


def _left(trials: Sequence[Trial], runs: Runs) -> list[Trial]:
    return [trial for trial in trials if trial.name not in runs]


def _search(task: str, objective: str, runs: Runs, judge: str) -> list[Trial]:
    """Returns the trials that the search still wants; none if it is done.

    First the neighbours of the best point, each a step along one ladder, until none is better; then
    the FINALISTS with the second seed; then the neighbours of the better of these. So what is
    chosen has been passed on either side, unless the search ends after `most` points.
    """
    done = searched(task, objective, runs)
    if not done:
        return [_trial(task, objective, SPACES[objective].start(TASKS[task]))]
    best = _best(task, objective, runs, judge)
    room = most(task, objective) - len(done)
    if left := _left(_neighbours(task, objective, best[0]), runs)[:room]:
        return left
    if again := _left([_again(trial) for trial in best[:FINALISTS]], runs):
        return again
    return _left(_neighbours(task, objective, _pick(best, runs, judge)), runs)[:room]


def most(task: str, objective: str) -> int:
    """Returns the number of points after which a search ends."""
    return 1 + TASKS[task].points * len(SPACES[objective].axes(TASKS[task]))


def _again(trial: Trial) -> Trial:
    return dataclasses.replace(trial, seed=SECOND_SEED)


def _pick(best: Sequence[Trial], runs: Runs, judge: str) -> Trial:
    """Returns the better of the FINALISTS by the mean over both seeds."""

    def both(trial: Trial) -> float:
        return score(trial, runs, judge) + score(_again(trial), runs, judge)

    return max(best[:FINALISTS], key=both)


def _best(task: str, objective: str, runs: Runs, judge: str) -> list[Trial]:
    done = searched(task, objective, runs)
    return sorted(done, key=lambda trial: -score(trial, runs, judge))


def _neighbours(task: str, objective: str, trial: Trial) -> list[Trial]:
    found, at = [], dict(trial.setting)
    for name, ladder in SPACES[objective].axes(TASKS[task]).items():
        i = ladder.index(at[name])
        for j in (i - 1, i + 1):
            if 0 <= j < len(ladder):
                found.append(_trial(task, objective, {**at, name: ladder[j]}))
    return found


@functools.cache
def _points(task: str, objective: str) -> dict[str, Trial]:
    """Returns every point of a search's space by its trial's name."""
    axes = SPACES[objective].axes(TASKS[task])
    points: list[dict[str, float]] = [{}]
    for name, ladder in axes.items():
        points = [{**point, name: value} for point in points for value in ladder]
    return {trial.name: trial for trial in (_trial(task, objective, p) for p in points)}


def _trial(task: str, objective: str, point: Mapping[str, float]) -> Trial:
    setting = {**SPACES[objective].kept, **point}
    order = [*OWN_ORDER, *sorted(set(setting) - set(OWN_ORDER) - {"rate"}), "rate"]
    pairs = tuple((name, setting[name]) for name in order if name in setting)
    return Trial(task, objective, pairs, SEARCH_SEED, tuning=True)


OWN_ORDER = ("beta", "alpha")
