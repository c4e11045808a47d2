"""Tests of benchmarks/study/health_curves.py, on made-up curves."""

import numpy as np
import pytest
from etils import epath

from benchmarks.study import health_curves
from dmpo_jax.config.files import load_config
from dmpo_jax.data.encoded import records
from tests.support.encoded import EncodedPair, PromptEmbedding, write_pairs


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


def test_rows_to_flip_are_the_share_of_the_decided_and_no_tie():
    preference = np.where(np.arange(1000) % 10 == 0, 0.5, 1.0)  # 900 decided
    some = health_curves.flipped_rows(preference, 0.1, seed=3)
    more = health_curves.flipped_rows(preference, 0.3, seed=3)
    assert len(set(some)) == 90
    assert len(set(more)) == 270
    assert set(some) < set(more)
    assert (preference[more] == 1).all()
    np.testing.assert_array_equal(some, health_curves.flipped_rows(preference, 0.1, seed=3))
    assert set(some) != set(health_curves.flipped_rows(preference, 0.1, seed=4))


def test_flipped_pairs_have_their_images_exchanged_in_training_alone(tmp_path):
    rng = np.random.default_rng(0)
    prompts = [PromptEmbedding(t, np.ones((2, 4), np.float32)) for t in ("", "a")]

    def pair(i):
        moments = rng.normal(size=(2, 2, 2, 4)).astype(np.float32)
        label = 0.5 if i % 4 == 0 else 1.0
        return EncodedPair(str(i), 1, label, moments, np.zeros((2, 6), np.int32))

    splits = {"train": [pair(i) for i in range(16)], "validation": [pair(i) for i in range(4)]}
    meta = {"model": "m", "scaling_factor": 1.0, "shift_factor": 0.0}
    write_pairs(tmp_path / "encoded", splits, prompts, meta)
    for _ in range(2):  # the second call finds it there
        out = health_curves.flip_labels(epath.Path(tmp_path / "encoded"), 0.25, seed=1)
    flipped = records.open_pairs(out)
    exchanged = []
    for split, given in splits.items():
        for i, before in enumerate(given):
            after = flipped.split(split)[i]
            assert (after.id, after.preference) == (before.id, before.preference)
            if (after.moments == before.moments).all():
                continue
            np.testing.assert_array_equal(after.moments, before.moments[::-1])
            exchanged.append((split, before.preference))
    assert exchanged == [("train", 1.0)] * 3
