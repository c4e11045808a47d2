"""Telemetry of a run: throughput in pairs and FLOPs, time by activity, memory."""

import contextlib
import logging
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from dmpo_jax.errors import UserError
from dmpo_jax.parallel.compilation import describe_cache
from dmpo_jax.progress import Progress
from dmpo_jax.training import health
from dmpo_jax.training.alarms import Alarms
from dmpo_jax.training.metrics import MetricsWriter

LOG = logging.getLogger(__name__)

# Keys of metrics.jsonl that depend on clock and machine; all others on config and step.
MEASURED = frozenset(
    "pairs_per_second pairs_per_second_per_chip tflops_per_second_per_chip mfu seconds_input "
    "seconds_step seconds_checkpoint seconds_validation seconds_sampling seconds_profile "
    "seconds_compile compiled_from_cache seconds_to_first_step device_memory_gb "
    "device_memory_peak_gb host_memory_gb host_memory_peak_gb".split()
)
COMPILING = "compiling the step: about a minute for a small model, 10 for a full-size one ..."
_CACHE_HIT = "/jax/compilation_cache/cache_hits"


class NonFiniteError(UserError):
    """More updates than `train.skip_limit` were not finite, or one broke the parameters."""


class Cost(NamedTuple):
    """Factors that convert pairs per second to FLOP/s and MFU.

    pair_flops: of one pair, recomputation excluded.
    chips: of the mesh. peak_flops: bfloat16 FLOP/s of one chip; None if unknown.
    """

    pair_flops: int
    chips: int
    peak_flops: float | None = None


class Watch:
    """Reports a step's metrics as a line and in the bar; raises if too many are not finite.

    It never waits for the device by itself. The metrics of a step are read once the next step
    is dispatched, when `report` is called; the moment they are available is the step's end.

    Args:
        start: the update that the run resumes from. total: the last one.
        batch_size: pairs per update. every: updates between two lines of metrics.
        skip_limit: updates that may have a non-finite loss or gradient.
        learning_rate: by step. cost: of a pair. curves: of the run's objective.
        alarms: judge every line.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        start: int,
        *,
        total: int,
        batch_size: int,
        every: int,
        skip_limit: int,
        learning_rate: Callable[[Any], jax.Array],
        cost: Cost,
        curves: health.Curves,
        alarms: Alarms,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._batch_size, self._every = total, batch_size, every
        self._skip_limit, self._learning_rate, self._cost = skip_limit, learning_rate, cost
        self._curves = curves
        self.alarms = alarms
        self._clock = clock
        self._last: int | None = start
        self._since = clock()
        self._input = (0, 0.0)  # batches taken since then, seconds it took
        self._once: dict[str, float] = {}  # further values for the next line
        self._finished_any = False

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds the seconds of the block to the time of `what`.

        "input" is a part of every step. Everything else is a pause: it is excluded from
        throughput, and its seconds are in the next line. Report steps in flight before a pause.
        """
        began = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - began
            if what == "input":
                self._input = (self._input[0] + 1, self._input[1] + seconds)
            else:
                name = f"seconds_{what}"
                self._once[name] = self._once.get(name, 0.0) + seconds
                self._restart()

    def compile(self, jitted: Any, *arguments: Any) -> Any:
        """Compiles `jitted` for its arguments ahead of its first call; logs the time it took."""
        hits: list[str] = []

        def listen(event: str, **details: Any) -> None:
            if event == _CACHE_HIT:
                hits.append(event)

        LOG.info("%s", describe_cache())
        LOG.info(COMPILING)
        with self.timed("compile"):
            lowered = jitted.lower(*arguments)
            jax.monitoring.register_event_listener(listen)
            try:
                compiled = lowered.compile()
            finally:
                jax.monitoring.unregister_event_listener(listen)
        self._once["compiled_from_cache"] = float(bool(hits))
        where = "from the compilation cache" if hits else "not in the compilation cache"
        LOG.info("compiled the step in %.1f s, %s", self._once["seconds_compile"], where)
        return compiled

    def report(
        self,
        number: int,
        metrics: Any,
        writer: MetricsWriter,
        progress: Progress,
    ) -> None:
        """Reads the metrics of update `number`; raises NonFiniteError past the limit."""
        fetched = dict(jax.device_get(metrics))
        pairs = fetched.pop("pairs")
        values = {name: float(x) for name, x in fetched.items()}
        values |= self._curves.add(pairs)
        now = self._clock()
        check_finite(number, values, self._skip_limit)
        if self._last is None:  # the first after a pause
            self._last = number - 1
        self._note_first_step()
        pace = self._pace(number - self._last, now)
        if number % self._every == 0 or number in (1, self._total):
            values["learning_rate"] = float(self._learning_rate(number - 1))
            line = {**values, **pace, **memory(), **self._once}
            line |= self.alarms.add(number, line)
            writer.write(number, line, detail=self._curves.take())
            self._last, self._since, self._input = number, now, (0, 0.0)
            self._once.clear()
        shown: dict[str, Any] = {
            name: values[name] if name in values else pace[name]
            for name in ("loss", "implicit_accuracy", "pairs_per_second")
        }
        waited = pace["seconds_input"] / (pace["seconds_input"] + pace["seconds_step"])
        shown["input wait"] = f"{100 * waited:.0f} %"
        if "mfu" in pace:
            shown["MFU"] = f"{100 * pace['mfu']:.1f} %"
        progress.advance(1, **shown)

    def _restart(self) -> None:
        """Excludes the time up to now from throughput."""
        self._since, self._last, self._input = self._clock(), None, (0, 0.0)

    def _note_first_step(self) -> None:
        if self._finished_any:
            return
        self._finished_any = True
        seconds = process_seconds()
        if seconds is not None:
            self._once["seconds_to_first_step"] = seconds
            LOG.info(
                "the first step ended %.1f s after the process began, earlier jobs included",
                seconds,
            )

    def _pace(self, steps: int, now: float) -> dict[str, float]:
        """Returns throughput and seconds per step since the last line or pause."""
        seconds = max(now - self._since, 1e-9) / steps
        batches, waited = self._input
        # A batch is taken before its step, so there may be one batch more.
        waiting = min(waited / max(batches, 1), seconds)
        speed = self._batch_size / seconds
        flops = speed * self._cost.pair_flops / self._cost.chips
        pace = {
            "pairs_per_second": speed,
            "pairs_per_second_per_chip": speed / self._cost.chips,
            "tflops_per_second_per_chip": flops / 1e12,
            "seconds_input": waiting,
            "seconds_step": seconds - waiting,
        }
        if self._cost.peak_flops:
            pace["mfu"] = flops / self._cost.peak_flops
        return pace


def check_finite(number: int, values: dict[str, float], limit: int) -> None:
    """Raises NonFiniteError if update `number` left a state that must not be saved.

    More than `limit` updates were skipped, or the parameters are no longer finite.
    """
    skipped = int(values["skipped"])
    if not math.isfinite(values["update_norm"]):
        raise NonFiniteError(
            f"update {number} made parameters that are not finite (loss {values['loss']}, gradient "
            f"norm {values['grad_norm']}). They are not saved: the newest checkpoint is of an "
            "earlier update. Lower optimizer.learning_rate, or raise optimizer.eps."
        )
    if skipped > limit:
        raise NonFiniteError(
            f"update {number}: loss {values['loss']}, gradient norm {values['grad_norm']} is "
            f"the non-finite update number {skipped}, above train.skip_limit={limit}. "
            "Nothing of it was kept or saved. Look for broken pairs, lower "
            "--config.optimizer.learning_rate, or raise --config.train.skip_limit."
        )


def memory() -> dict[str, float]:
    """Returns GB (1e9 bytes) held now and at the peak, on the fullest of this process's devices.

    If the backend does not report it, as on a CPU, the process's own; empty if that is unknown.
    """
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    if stats:
        return {
            name: max(found[key] for found in stats) / 1e9
            for name, key in (
                ("device_memory_gb", "bytes_in_use"),
                ("device_memory_peak_gb", "peak_bytes_in_use"),
            )
            if all(key in found for found in stats)
        }
    try:
        status = pathlib.Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        return {}
    names = (("host_memory_gb", "VmRSS:"), ("host_memory_peak_gb", "VmHWM:"))
    return {
        name: int(status.split(key)[1].split()[0]) * 1024 / 1e9
        for name, key in names
        if key in status
    }


def process_seconds() -> float | None:
    """Returns seconds since this process began, imports included; None if the system cannot say."""
    try:
        stat = pathlib.Path("/proc/self/stat").read_text()
    except OSError:  # not Linux
        return None
    began = int(stat.rpartition(")")[2].split()[19])  # the name, in brackets, may have spaces
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK")
