"""Tests for dmpo_jax/calibration/growth.py: the law that predictions follow."""

import math

import pytest

from dmpo_jax.calibration import growth
from dmpo_jax.objectives.pulls import Pull

LEVELS = (1e-6, 0.02, 0.5, 1.0, 2.4, 2.6, 7.0, 300.0)
BEND = 1.0


@pytest.fixture
def pull():
    return Pull(lambda rows: rows["margin"])


@pytest.mark.parametrize("level", LEVELS)
def test_levels_and_free_levels_are_inverses(level, pull):
    assert growth.bent(growth.straight(level, BEND), BEND) == pytest.approx(level)
    assert growth.at_coordinate(growth.coordinate(level, pull), pull) == pytest.approx(level)


def test_a_small_level_grows_as_the_rate_and_a_large_one_hardly():
    assert growth.extrapolate(1e-4, 7.0, BEND) == pytest.approx(7e-4, rel=1e-3)
    assert growth.extrapolate(4.0, 7.0, BEND) < 6.0
    # In two parts as in one, forwards and back.
    there = growth.extrapolate(growth.extrapolate(0.8, 3.0, BEND), 5.0, BEND)
    assert there == pytest.approx(growth.extrapolate(0.8, 15.0, BEND))
    assert growth.extrapolate(there, 1 / 15, BEND) == pytest.approx(0.8)


def test_the_growth_solves_its_equation():
    """d ln L / d ln S = 1 / (1 + L / b), by small steps."""
    level, steps = 0.3, 20_000
    for _ in range(steps):
        level *= math.exp(math.log(50.0) / steps / (1 + level / BEND))
    assert growth.extrapolate(0.3, 50.0, BEND) == pytest.approx(level, rel=1e-3)


def test_past_the_target_levels_are_proportional_to_beta(pull):
    def at(level: float, times: float) -> float:
        return growth.at_coordinate(growth.coordinate(level, pull) + math.log(times), pull)

    assert at(3.0, 10.0) == pytest.approx(30.0)
    assert at(30.0, 0.1) == pytest.approx(3.0)
    assert at(1e-4, 10.0) == pytest.approx(1e-3, rel=1e-2)
    assert 1.0 < at(0.9, 10.0) / 0.9 < 10.0
