"""How levels grow: with the summed learning rate, with beta, and against the loss's own pull.

While little pulls back, margins grow in proportion to the sum of the learning rates, and the level
`beta x` in proportion to beta besides: such a level is free. The loss bends it. With b the bend, a
level L grows as d ln L / d ln S = 1 / (1 + L / b), which integrates to

    straight(L) = ln L + L / b = ln(free level).

Measured on the digits (docs/calibrate.md), where it holds for a beta up to the target. Past it most
pairs are saturated and hold nothing back: margins no longer depend on beta, and levels are
proportional to it (`coordinate`).
"""

import math

from dmpo_jax.objectives.pulls import Pull

_SMALLEST, _LARGEST = -40.0, 40.0  # ln of a level


def straight(level: float, bend: float) -> float:
    """Returns ln of the free level that the loss has bent to `level`; both above 0."""
    return math.log(level) + level / bend


def bent(log_free: float, bend: float) -> float:
    """Inverts `straight`."""
    return _solve(lambda level: straight(level, bend), log_free)


def coordinate(level: float, pull: Pull) -> float:
    """A function of the level that grows by ln r where beta is multiplied by r."""
    below = min(level, pull.target)
    return straight(below, pull.bend) + math.log(level / below)


def at_coordinate(value: float, pull: Pull) -> float:
    """Inverts `coordinate`."""
    return _solve(lambda level: coordinate(level, pull), value)


def extrapolate(level: float, times: float, bend: float) -> float:
    """Returns the level once the summed rate has grown `times`, at the same beta."""
    return bent(straight(level, bend) + math.log(times), bend)


def _solve(rising, value: float) -> float:
    """Returns the level at which a rising function has a value, by halving."""
    low, high = _SMALLEST, _LARGEST
    for _ in range(100):
        middle = 0.5 * (low + high)
        if rising(math.exp(middle)) < value:
            low = middle
        else:
            high = middle
    return math.exp(0.5 * (low + high))
