"""Chooses into how many microbatches an update is cut, so that its step fits into the memory.

The compiler states what a step needs. It grows with a microbatch's pairs, nearly in a straight
line: two small steps tell the size that should fit, and the step of that size is compiled to know.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from dmpo_jax.errors import UserError
from dmpo_jax.parallel import meshes
from dmpo_jax.planning.report import GB, bytes_needed, cuts, leaner, measure_memory
from dmpo_jax.planning.step import Model, make_planned
from dmpo_jax.training.build import StepSettings

LOG = logging.getLogger(__name__)
SHARE = 0.9  # of the memory, for the step: allocators leave gaps, and grids and checks need some


class Choice(NamedTuple):
    """A number of microbatches, 0 if none fits. needs: {number: bytes a device}, as compiled."""

    accumulation: int
    needs: dict[int, float | int]


def device_memory() -> int | None:
    """Returns the bytes that a program may have on every device of the job.

    None if a device does not say, as CPUs do not. Every process must call it.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    least = min(one.get("bytes_limit", 0) for one in stats)
    if jax.process_count() > 1:
        # In kilobytes: 32-bit integers are what JAX sends.
        told = multihost_utils.process_allgather(np.asarray(least // 1024, np.int32))
        least = int(np.min(told)) * 1024
    return least or None


def choose(measure: Callable[[int], float | int], numbers: list[int], limit: float | int) -> Choice:
    """Returns the least of `numbers` with which a step is found to fit, 0 if it fits with none.

    Args:
        measure: number of microbatches -> bytes a device that the step needs, inf if more than the
            compiler could say. Called three times as a rule.
        numbers: ascending; the last makes the smallest microbatch.
        limit: bytes a device that the step may take.
    """
    needs: dict[int, float | int] = {}

    def need(number: int) -> float | int:
        if number not in needs:
            needs[number] = measure(number)
        return needs[number]

    sizes = [numbers[-1] / number for number in numbers]  # of microbatches; the smallest is 1
    if need(numbers[-1]) > limit:
        return Choice(0, needs)
    if len(numbers) == 1 or need(numbers[-2]) > limit:
        return Choice(numbers[-1], needs)
    slope = (needs[numbers[-2]] - needs[numbers[-1]]) / (sizes[-2] - 1)
    expected = [needs[numbers[-1]] + slope * (size - 1) for size in sizes]
    first = next(i for i, bytes_ in enumerate(expected) if bytes_ <= limit)
    fits = next(number for number in numbers[first:] if need(number) <= limit)
    return Choice(fits, needs)


def fit(
    model: Model, settings: StepSettings, axes: Mapping[str, Any], limit: float | int
) -> Choice:
    """Chooses the accumulation of a run on this job's devices, by compiling its step from shapes.

    Every process must call it. axes: of the mesh. limit: bytes of memory a device has.

    Raises:
        UserError: the step does not fit even with the smallest microbatch (the message has
            `report.leaner`); mesh, batch or model do not fit each other.
    """
    mesh = meshes.make_mesh(**axes)
    meshes.check_batch(settings.batch_size, 1, mesh, settings.group)

    def measure(number: int) -> float | int:
        cut = dataclasses.replace(settings, accumulation=number)
        LOG.info("train.accumulation=auto: compiling the step with %d ...", number)
        planned = make_planned(model, cut, axes, jax.devices())
        try:
            compiled: Any = planned.update.lower(*planned.arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            needed = bytes_needed(error)
            if needed is None:
                raise
            return max(needed, SHARE * limit + 1) if needed else math.inf
        return measure_memory(compiled).total

    numbers = cuts(settings.batch_size, mesh, settings.group)
    choice = choose(measure, numbers, SHARE * limit)
    if choice.accumulation:
        return choice
    smallest, needed = numbers[-1], choice.needs[numbers[-1]]
    much = f"{needed / GB:.3g} GB" if math.isfinite(needed) else "more than that"
    raise UserError(
        f"train.accumulation=auto: a step may take {SHARE * limit / GB:.3g} GB a device, and even "
        f"with {smallest} microbatches of {settings.batch_size // smallest} pairs it needs {much}. "
        + "\n".join(["Each of these needs less:", *leaner(settings, mesh, cut=False)])
    )


def reason(choice: Choice, settings: StepSettings, limit: float | int) -> str:
    """Says in a sentence what was chosen and why."""
    number, needs = choice
    size = settings.batch_size // number
    above = [n for n, bytes_ in needs.items() if bytes_ > SHARE * limit]
    more = f"; with {max(above)} it needs {needs[max(above)] / GB:.3g} GB" if above else ""
    return (
        f"train.accumulation={number}, chosen: a step of {number} microbatches of {size} pairs "
        f"needs {needs[number] / GB:.3g} GB a device, and {SHARE:.0%} of the memory is "
        f"{SHARE * limit / GB:.3g} GB{more}"
    )
