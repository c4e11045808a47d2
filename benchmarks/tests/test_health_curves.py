"""Tests of benchmarks/study/health_curves.py, on made-up curves."""

import numpy as np
import pytest

from benchmarks.study import health_curves
from dmpo_jax.config.files import load_config


def test_smoothing_is_a_mean_of_what_came_before():
    values = np.random.default_rng(0).random(40)
    steps, smooth = health_curves.smooth([(i, x) for i, x in enumerate(values)])
    np.testing.assert_array_equal(steps, np.arange(40))
    for i in (0, 3, 14, 15, 39):
        expected = values[max(0, i + 1 - health_curves.SMOOTHED) : i + 1].mean()
        assert smooth[i] == pytest.approx(expected)


def test_every_way_to_go_wrong_is_a_config():
    for settings, flipped in health_curves.RUNS.values():
        config = load_config(str(health_curves.ROOT / "configs" / "digits_dmpo.py"))
        config.update_from_flattened_dict(settings)  # locked: refuses unknown keys
        assert 0 <= flipped <= 0.5
    with pytest.raises(KeyError):
        config.update_from_flattened_dict({"optimizer.rate": 1.0})


def test_table_and_picture_show_every_run(tmp_path):
    pytest.importorskip("matplotlib")
    wanted = {curve for panel in health_curves.PANELS.values() for curve in panel}
    judges = {"digits_svm": {"win_rate": 0.75}, "digits_forest": {"win_rate": 0.5}}
    curves = {name: [(i, 0.01 * i) for i in range(1, 31)] for name in wanted}
    one = {"settings": {}, "flipped": 0.0, "curves": curves, "result": {"judges": judges}}
    found = dict.fromkeys(health_curves.RUNS, one)
    text = health_curves.table(found)
    assert text.count("\n") == 1 + len(found)
    assert text.count("75.0 %") == len(found)
    assert "| healthy | 0.2300 |" in text  # the mean of 0.16 to 0.30
    health_curves.plot(found, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
