"""Tests for dmpo_jax/pages/charts.py: what is drawn is where the values are."""

import math

import numpy as np
import pytest

from dmpo_jax.pages import charts
from dmpo_jax.pages.charts import Line, make_chart


def line(values, steps=None, **kw):
    values = np.array(values, np.float64)
    steps = np.arange(1.0, len(values) + 1) if steps is None else np.array(steps, np.float64)
    return Line("it", steps, values, **kw)


def points(text) -> np.ndarray:
    return np.array([[float(x) for x in pair.split(",")] for pair in text.split()])


def values_at(chart, drawn) -> np.ndarray:
    """The values of drawn points, by the marks of the axis."""
    ends = [(tick.at, float(tick.text.replace(",", ""))) for tick in chart.y_ticks]
    (a, u), (b, v) = ends[0], ends[-1]
    return u + (points(drawn)[:, 1] - a) * (v - u) / (b - a)


@pytest.mark.parametrize(
    "values", [[0.7, 0.5, 0.9], [-3e-7, 4e-7], [12345.0, 99999.0, 70000.0], [5.0, 5.0], [0.0, 0.0]]
)
def test_points_are_where_the_marks_say(values):
    chart = make_chart("t", [line(values)])
    assert chart is not None
    size = max(abs(x) for x in values) or 1.0
    np.testing.assert_allclose(values_at(chart, chart.lines[0].line), values, atol=0.02 * size)
    at = points(chart.lines[0].line)
    assert (at[:, 0] >= charts.LEFT).all()
    assert (at[:, 0] <= charts.WIDTH - charts.RIGHT).all()
    assert 2 <= len(chart.y_ticks) <= 7


def test_a_logarithmic_axis_marks_powers_of_ten():
    chart = make_chart("t", [line([0.02, 300.0])], logarithmic=True)
    assert chart is not None
    assert (chart.y_ticks[0].text, chart.y_ticks[-1].text) == ("0.01", "1000")
    at = {float(tick.text): tick.at for tick in chart.y_ticks}
    bottom, top = at[0.01], at[1000.0]
    place = bottom + (top - bottom) * (math.log10(0.02) + 2) / 5
    assert points(chart.lines[0].line)[0, 1] == pytest.approx(place, abs=0.1)
    for values in ([0.0, 300.0], [-1.0, 300.0], [20.0, 300.0]):
        chart = make_chart("t", [line(values)], logarithmic=True)
        assert chart is not None
        assert float(chart.y_ticks[0].text) <= 0 or float(chart.y_ticks[-1].text) == 300


def test_what_is_not_finite_is_left_out():
    chart = make_chart("t", [line([math.nan, 1.0, math.inf, 2.0])])
    assert chart is not None
    assert len(points(chart.lines[0].line)) == 2
    assert chart.lines[0].last == "2"
    assert make_chart("t", [line([math.nan]), line([])]) is None


def test_many_noisy_values_keep_their_extremes_and_a_mean():
    rng = np.random.default_rng(0)
    values = rng.normal(size=20_000)
    chart = make_chart("t", [line(values)])
    assert chart is not None
    (drawn,) = chart.lines
    faint, mean = values_at(chart, drawn.faint), values_at(chart, drawn.line)
    assert len(faint) <= 300
    assert len(mean) <= 150
    assert faint.max() == pytest.approx(values.max(), abs=0.1)
    assert faint.min() == pytest.approx(values.min(), abs=0.1)
    assert abs(mean).max() < 0.2
    assert make_chart("t", [line(values)], exact=True).lines[0].faint == ""


def test_running_means_are_of_neighbours():
    means = charts.running_mean(np.arange(10.0), 3)
    np.testing.assert_allclose(means, [0.5, *range(1, 9), 8.5])


def test_a_band_encloses_its_line():
    low, high = np.full(10, -1.0), np.full(10, 3.0)
    chart = make_chart("t", [line(np.ones(10), between=(low, high))])
    assert chart is not None
    band = values_at(chart, chart.lines[0].band)
    np.testing.assert_allclose(band, [-1.0] * 10 + [3.0] * 10, atol=0.05)


def test_a_single_value_is_a_dot():
    chart = make_chart("t", [line([3.0])])
    assert chart is not None
    assert len(chart.lines[0].dots) == 1
    assert "it 3 at update 1" in chart.said
