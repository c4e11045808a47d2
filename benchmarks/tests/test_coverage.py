"""Tests of benchmarks/study/coverage.py: intervals hold what they say, at few draws."""

import pathlib
import sys

import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / "study"
DRAWS = 400
TOLERANCE = 4 * np.sqrt(0.95 * 0.05 / DRAWS)  # four standard errors: 4.4 %


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import coverage

        yield coverage
    sys.modules.pop("coverage", None)


@pytest.mark.long
@pytest.mark.parametrize(
    ("design", "win_rate"),
    [
        (("like_these", 200, 1, 0.0), 0.5),
        (("like_these", 100, 4, 0.3), 0.65),  # by image: 86 %
        (("like_these", 50, 1, 0.0), 0.8),
        (("like_these", 10, 40, 0.1), 0.65),  # by image: 63 %
        (("these", 10, 40, 0.1), 0.65),
        (("these", 100, 2, 0.3), 0.5),
    ],
)
def test_intervals_hold_the_true_win_rate(bench, design, win_rate):
    held = bench.coverage(bench.Design(*design), win_rate, DRAWS, 499)
    assert abs(held - 0.95) < TOLERANCE


def test_a_model_against_itself_rarely_wins(bench):
    found = bench.named(bench.Design("like_these", 100, 2, 0.0), DRAWS)
    assert all(abs(share - 0.05) < TOLERANCE for share in found.values())
    assert min(found.values()) > 0


@pytest.mark.slow
def test_full_table(bench):
    for design in bench.DESIGNS[:3]:
        for win_rate in bench.WIN_RATES:
            assert 0.93 <= bench.coverage(design, win_rate, 2000, 999) <= 0.97
    for design in bench.ITSELF[:3]:
        assert 0.03 <= bench.named(design, 20_000)["winner"] <= 0.07
