"""Alarms: a run watches its own curves and says in words what is wrong and what to change.

Each alarm is a function over a window of logged rows. It returns what it saw and what to change,
or None. Values that a row lacks are not judged. Thresholds and the runs that they were measured
on: docs/curves.md, tests/training/test_alarms.py.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

LOG = logging.getLogger(__name__)

Row = Mapping[str, float | int | None]  # of metrics.jsonl, where null is not finite

SPAN = 50  # updates in a window; more if that is fewer than ROWS rows
ROWS = 5
PAIRS = 100  # in a window, at least, to judge shares of pairs
# Of error to the reference's. Healthy digits runs reach 1.2, with beta 30 times too high 1.5; with
# a rate 10 times too high 9, with beta 100 times too low 5.5.
RUNAWAY = 2.0
# Healthy digits runs reach 0.2, with a rate 10 times too high 0.61, with beta 30 times too high
# 0.93.
SATURATED = 0.8
UNSATURATED = 0.05  # below it, pairs would still be pulled back by a higher beta
# Of the reference's error, in half of the rows. Rounding alone gives 1e-7 in float32; the digits
# have 0.2. In bfloat16, at a rate of 1e-9, a tiny model's median is 0 and its largest 7e-5: now and
# then a single parameter is rounded the other way. At 1e-8, where it moves, it has 1e-4.
STUCK = 1e-6
# At the optimum, noise puts about half of the pairs past it: 0.54 with beta 30 times too high.
PAST = 0.65
# Loss of pairs that are learnt, in half of the rows. A label of 1 with alpha 0.01 has its optimum
# at p(1-p) = 0.0099, which counts as saturated, and past it the loss is at most 0.0101: nothing
# pulls back. A tiny model on pairs easily told apart ends with 0.79 of them saturated and past
# their optimum, the loss at 0.005; one that begins past the optimum of soft labels has 0.22.
LEARNT = 0.02
# Clipping by a constant factor is nothing to AdamW: healthy digits runs are clipped all the time,
# by 10 to 80 times.
CLIPPED = 1000.0
CLIPPED_SHARE = 0.95  # of the rows
CHANCE = 0.52  # accuracy among decided pairs: two standard errors above what is measured are below
# Decided ones, at least: of fewer, two standard errors are above 0.05. Labels by lot are found in
# 12 % of runs at 400, 50 % at 2,500, 98 % at 10,000.
CHANCE_PAIRS = 400
CHANCE_UPDATES = 500  # after the warmup
VALIDATIONS = 3
_FIELD = "alarm_"  # of a row: alarm_NAME is 1 in the row at which NAME was raised


class Run(NamedTuple):
    """Facts of a run that its rows do not have.

    beta: path of the leaf, or "" if the objective has none. moving: (decay, every) of the
    reference, or None if it is fixed. clip_norm: 0 does not clip.
    """

    total: int
    batch_size: int
    warmup: int = 0
    beta: str = ""
    moving: tuple[float, int] | None = None
    clip_norm: float = 0.0


class Window(NamedTuple):
    """Rows of the last updates, oldest first, and the last validations."""

    rows: Sequence[Row]
    validations: Sequence[Row] = ()

    def column(self, name: str) -> np.ndarray:
        """Returns the finite values of a curve; empty if there are fewer than ROWS."""
        found = _finite(self.rows, name)
        return found if len(found) >= ROWS else found[:0]

    def mean(self, name: str) -> float:
        """Returns the mean; NaN, which is beyond no threshold, if the curve is not there."""
        found = self.column(name)
        return float(found.mean()) if len(found) else math.nan

    @property
    def first(self) -> int:
        return _step(self.rows[0])

    @property
    def last(self) -> int:
        return _step(self.rows[-1])


class Finding(NamedTuple):
    """An observation and its remedy, in words; both are parts of a sentence."""

    seen: str
    change: str


def running_away(window: Window, run: Run) -> Finding | None:
    """Both images are predicted far worse than by the reference."""
    ratios = []
    for image in ("chosen", "rejected"):
        error, gain = window.mean(f"{image}_error"), window.mean(f"{image}_gain")
        ratios.append(error / (error - gain) if error > gain else math.nan)
    if not min(ratios) >= RUNAWAY or math.isnan(sum(ratios)):
        return None
    seen = (
        f"both errors run away: the chosen images' is {ratios[0]:.1f} times the reference's, the "
        f"rejected ones' {ratios[1]:.1f} times"
    )
    saturation = window.mean("saturation")
    if run.beta and saturation < UNSATURATED:
        return Finding(
            f"{seen}, and few pairs are saturated ({saturation:.0%}), so little pulls back",
            f"raise {run.beta}, or stop earlier (train.steps)",
        )
    also = f", or raise {run.beta}" if run.beta and math.isnan(saturation) else ""
    return Finding(seen, f"lower optimizer.learning_rate{also}")


def saturation(window: Window, run: Run) -> Finding | None:
    """Most pairs are past the slope of the loss, and not because they are learnt."""
    share = window.mean("saturation")
    if not share >= SATURATED or _few(window, run) or _learnt(window):
        return None
    low, high = window.mean("logit_p05"), window.mean("logit_p95")
    quantiles = "" if math.isnan(low + high) else f" (u from {low:.1f} to {high:.1f})"
    return Finding(
        f"{share:.0%} of the pairs are saturated{quantiles}: few pull, and what moves them is "
        "noise",
        f"lower {run.beta or 'beta'}; if it is the published one, lower optimizer.learning_rate",
    )


def stuck(window: Window, run: Run) -> Finding | None:
    """Margins stay at 0 although the rate is above 0, with a fixed reference."""
    if run.moving is not None or not _margins_are_zero(window, run, np.median):
        return None
    return Finding(
        f"margins are stuck at 0 (at most {window.column('margin_abs_max').max():.1g}, in most "
        "updates less than rounding): policy and reference predict the same",
        "raise optimizer.learning_rate, or set model.compute_dtype=float32 if updates are lost "
        "in rounding",
    )


def reference(window: Window, run: Run) -> Finding | None:
    """A reference that is to move never does, or is the policy itself at every update."""
    if run.moving is None:
        return None
    decay, every = run.moving
    if decay == 1:
        return Finding(
            "the reference never moves: reference.decay is 1", "lower reference.decay, or unset it"
        )
    if every > run.total:
        return Finding(
            f"the reference never moves: reference.every is {every}, of {run.total} updates",
            "lower reference.every, or unset reference.decay",
        )
    # All of them: a reference that is the policy at every second update is no fault.
    if not _margins_are_zero(window, run, np.max):
        return None
    return Finding(
        "margins are stuck at 0: the reference is the policy",
        "raise reference.decay or reference.every; if the policy does not move, raise "
        "optimizer.learning_rate",
    )


def clipped(window: Window, run: Run) -> Finding | None:
    """Nearly all gradients are far above the norm that they are clipped to."""
    norms = window.column("grad_norm")
    if not len(norms) or run.clip_norm <= 0:
        return None
    times = norms / run.clip_norm
    if not (times > CLIPPED).mean() >= CLIPPED_SHARE:
        return None
    return Finding(
        f"nearly every gradient is clipped, by {np.median(times):.3g} times: all updates weigh the "
        "same, whatever their pairs say",
        f"raise optimizer.clip_norm towards {np.median(norms):.2g}"
        + (f", or lower {run.beta}" if run.beta else ""),
    )


def past_optimum(window: Window, run: Run) -> Finding | None:
    """Most pairs' implied logits are past the loss's minimum, and the loss shows it."""
    share = window.mean("past_optimum")
    if not share >= PAST or _few(window, run) or _learnt(window):
        return None
    return Finding(
        f"{share:.0%} of the pairs are past their optimum (median u "
        f"{window.mean('logit_p50'):.1f}): the loss pulls them back",
        "lower optimizer.learning_rate, or stop earlier (train.steps); if the run began so, with "
        "weights that were tuned before, unset model.reference",
    )


def chance(window: Window, run: Run) -> Finding | None:
    """Accuracy on held-out pairs is no better than a coin's."""
    rows = window.validations[-VALIDATIONS:]
    accuracy = _finite(rows, "validation_implicit_accuracy")
    pairs = _finite(rows, "validation_pairs")
    if min(len(accuracy), len(pairs)) < VALIDATIONS:
        return None
    steps = _finite(rows, "step")
    if steps[0] <= run.warmup or steps[-1] < run.warmup + CHANCE_UPDATES:
        return None
    ties = window.mean("ties")  # in training: the share is not measured in validation
    ties = 0.0 if math.isnan(ties) else ties
    decided = pairs[-1] * (1 - ties)
    if decided < CHANCE_PAIRS:
        return None
    # The same pairs each time: three validations are no more pairs than one.
    found = (accuracy.mean() - ties / 2) / (1 - ties)
    if not found + 1 / math.sqrt(decided) < CHANCE:  # two standard errors of a share near 1/2
        return None
    return Finding(
        f"after {steps[-1]:.0f} updates the accuracy on {decided:.0f} decided validation pairs is "
        f"at chance, {found:.3f}",
        "look at the labels and at which image is chosen; if these are right, raise "
        "optimizer.learning_rate",
    )


ALARMS: dict[str, Callable[[Window, Run], Finding | None]] = {
    f.__name__: f
    for f in (running_away, saturation, stuck, reference, clipped, past_optimum, chance)
}


class Alarm(NamedTuple):
    """An alarm that was raised, at an update."""

    name: str
    step: int
    finding: Finding


class Alarms:
    """Judges a run's rows as they are logged, and warns once for each alarm.

    Its state follows from the rows alone: `replay` of those before a resume leaves it as the
    uninterrupted run had it. It changes no number of training. If it fails it says so and is off.

    Only process 0 judges; all processes must make the same calls.
    """

    def __init__(self, run: Run):
        self._run = run
        self._rows: list[Row] = []
        self._validations: list[Row] = []
        self._raised: dict[str, Alarm] = {}
        self._active = jax.process_index() == 0
        self._stop = self._unasked = False

    @property
    def raised(self) -> tuple[Alarm, ...]:
        return tuple(self._raised.values())

    def add(self, step: int, values: Row) -> dict[str, float]:
        """Judges a row; returns the fields that name its new alarms, {"alarm_NAME": 1.0}."""
        self._unasked = True
        if not self._active:
            return {}
        try:
            new = self._judge({**values, "step": step})
        except Exception as error:  # a bug here must not end a run
            LOG.warning("alarms are off: %s: %s", type(error).__name__, error)
            self._active = False
            return {}
        for alarm in new:
            seen, change = alarm.finding
            LOG.warning("alarm %s at update %d: %s. To change: %s", alarm.name, step, seen, change)
        self._stop |= bool(new)
        return {f"{_FIELD}{alarm.name}": 1.0 for alarm in new}

    def asked(self) -> bool:
        """True if an alarm was raised since the start or the resume; all processes agree.

        Must be called by all of them after the same updates.
        """
        if self._unasked and jax.process_count() > 1:
            said = multihost_utils.broadcast_one_to_all(np.int32(self._stop))
            self._stop = bool(said)
        self._unasked = False
        return self._stop

    def replay(self, workdir: epath.Path, last_step: int) -> None:
        """Takes up the rows of `workdir/metrics*.jsonl` up to a step; warns of nothing."""
        if not self._active or last_step == 0:
            return
        try:
            for path in sorted(workdir.glob("metrics*.jsonl")):
                for line in path.read_text().splitlines():
                    self._take_up(line, last_step)
        except Exception as error:
            LOG.warning("alarms start anew: %s: %s", type(error).__name__, error)
            self._rows, self._validations, self._raised = [], [], {}

    def close(self) -> None:
        """Logs all alarms of the run, with what to change."""
        if self._raised:
            found = [f"{a.name} (update {a.step}): {a.finding.change}" for a in self.raised]
            LOG.warning("alarms: %s", "; ".join(found))

    def _judge(self, row: Row) -> list[Alarm]:
        if not self._keep(row):
            return []
        return [x for name in ALARMS if name not in self._raised if (x := self._call(name))]

    def _call(self, name: str) -> Alarm | None:
        window = Window(self._rows, self._validations)
        finding = ALARMS[name](window, self._run)
        if finding is None:
            return None
        step = max(_step(row) for row in (*self._rows, *self._validations))
        self._raised[name] = Alarm(name, step, finding)
        return self._raised[name]

    def _keep(self, row: Row) -> bool:
        """Adds a row to the window; True if the window is full."""
        if "validation_implicit_accuracy" in row:
            self._validations = [*self._validations, row][-VALIDATIONS:]
        elif "learning_rate" in row:
            rows, step = [*self._rows, row], _step(row)
            recent = sum(_step(x) > step - SPAN for x in rows)
            self._rows = rows[-max(recent, ROWS) :]
        else:
            return False
        return len(self._rows) >= ROWS and _step(self._rows[-1]) >= SPAN

    def _take_up(self, line: str, last_step: int) -> None:
        try:
            row = json.loads(line)
            if row["step"] > last_step:
                return
        except (ValueError, KeyError, TypeError):  # cut off by a kill
            return
        self._keep(row)
        for name in ALARMS:
            if f"{_FIELD}{name}" in row and self._call(name) is None:
                finding = Finding("raised before the resume", "see the log")
                self._raised[name] = Alarm(name, row["step"], finding)


def _margins_are_zero(window: Window, run: Run, of_rows: Callable[[np.ndarray], float]) -> bool:
    margins, rates = window.column("margin_abs_max"), window.column("learning_rate")
    if not len(margins) or window.first <= run.warmup or not rates.any():
        return False
    return bool(of_rows(margins) <= STUCK * window.mean("chosen_error"))


def _learnt(window: Window) -> bool:
    """True if the loss is as low as that of learnt pairs; False if it is not logged."""
    losses = window.column("loss")
    return bool(len(losses)) and bool(np.median(losses) < LEARNT)


def _few(window: Window, run: Run) -> bool:
    """True if the window has too few pairs for a share of them."""
    return len(window.rows) * run.batch_size < PAIRS


def _step(row: Row) -> int:
    return int(row["step"] or 0)


def _finite(rows: Sequence[Row], name: str) -> np.ndarray:
    values = np.array([row.get(name, math.nan) for row in rows], np.float64)  # None is NaN
    return values[np.isfinite(values)]
