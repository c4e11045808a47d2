"""Tests for dmpo_jax/scoring: scorers by name, and labels from their scores."""

import numpy as np
import pytest

from dmpo_jax.scoring import SCORERS, make_scorer, rehearse
from dmpo_jax.scoring.digits import DigitJudge
from dmpo_jax.scoring.labels import Labels, described, draw_labels, win_probability
from dmpo_jax.toy import digits


@pytest.mark.parametrize(
    ("name", "unseen", "least"), [("digits_svm", 1, 0.95), ("digits_forest", 0, 0.85)]
)
def test_judges_know_digits_that_they_never_saw(name, unseen, least):
    ink, labels = digits.load_digits()
    rows = digits.half(unseen)[:300]
    images = digits.to_images(ink[rows])
    captions = [digits.CAPTIONS[label] for label in labels[rows]]
    right = make_scorer(name)(images, captions)
    others = [digits.CAPTIONS[label - 1] for label in labels[rows]]
    wrong = make_scorer(name)(images, others)
    assert (right > wrong).mean() > least
    with pytest.raises(ValueError, match="digits_forest, digits_svm"):
        make_scorer("taste")


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_keeps_the_protocol(name):
    """Named, versioned; float32, an image's score its own whatever it is scored with."""
    scorer = make_scorer(name)
    assert scorer.name == name
    assert scorer.version
    assert scorer.temperature > 0
    captions = list(digits.CAPTIONS)
    scorer.check(captions)
    images = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8)
    scores = scorer(images, captions)
    assert scores.dtype == np.float32
    assert scores.shape == (10,)
    parts = [scorer(images[i : i + 3], captions[i : i + 3]) for i in range(0, 10, 3)]
    np.testing.assert_array_equal(np.concatenate(parts), scores)
    if scorer.uses_prompt:
        assert (scorer(images, captions[::-1]) != scores).any()


def test_a_prompt_that_cannot_be_judged_is_named():
    for name in SCORERS:
        with pytest.raises(ValueError, match="'a cat' names 0 digits"):
            make_scorer(name).check(["a handwritten two", "a cat"])


def draws():
    return np.random.default_rng(0)


def test_labels_are_as_noisy_as_the_temperature():
    scores = np.tile([[0.7, 0.5]], (4000, 1))
    np.testing.assert_allclose(win_probability(scores, 0.25), 1 / (1 + np.exp(-0.8)))
    assert list(win_probability(np.array([[0.0, 1e3], [2.0, 2.0], [1e3, 0.0]]), 1.0)) == [0, 0.5, 1]
    labels = draw_labels(scores, temperature=0.25, tie_margin=0.0, draws=draws())
    assert abs(labels.mean() - 1 / (1 + np.exp(-0.8))) < 0.03
    assert set(draw_labels(scores, temperature=0.25, tie_margin=0.3, draws=draws())) == {0.5}


@pytest.mark.parametrize("labels", ["drawn", "probability"])
def test_labels_do_not_depend_on_the_batches(labels):
    scores = np.random.default_rng(1).random((50, 2)).astype(np.float32)
    label = Labels(labels, temperature=0.25, tie_margin=0.05, seed=3)
    together = label(scores, 0)
    apart = [label(scores[i : i + 7], i) for i in reversed(range(0, 50, 7))]
    np.testing.assert_array_equal(np.concatenate(apart[::-1]), together)
    assert described(scores, together).startswith("50 pairs, ")
    assert (set(together) == {0, 0.5, 1}) == (labels == "drawn")


def test_a_rehearsal_finds_a_judge_that_cannot_judge():
    judge = make_scorer("digits_svm")
    captions = digits.CAPTIONS[:3]
    rehearse(judge, (32, 32), captions)
    with pytest.raises(ValueError, match="digits_svm cannot judge images of 30 x 30 pixels"):
        rehearse(judge, (30, 30), captions)

    class Odd(DigitJudge):
        def __call__(self, images, prompts):
            return np.full(len(images), np.nan, np.float32)

    with pytest.raises(ValueError, match="odd should give one finite number an image"):
        rehearse(Odd("odd", "svm"), (32, 32), captions)
