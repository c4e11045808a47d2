"""Tests for dmpo_jax/scoring: scorers by name, and labels from their scores."""

import numpy as np
import pytest

from dmpo_jax.scoring import KINDS, SCORERS, STATISTICS, Scorer, make_scorer, rehearse
from dmpo_jax.scoring.digits import DigitJudge
from dmpo_jax.scoring.labels import Labels, described, draw_labels, temperature_of, win_probability
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


@pytest.mark.parametrize("name", [*SCORERS, *STATISTICS])
def test_every_scorer_keeps_the_protocol(name):
    """Named, versioned; float32, an image's score its own whatever it is scored with."""
    scorer = make_scorer(name)
    assert isinstance(scorer, Scorer)
    assert scorer.name == name
    assert scorer.version
    assert (scorer.temperature is None) == (name in STATISTICS)
    assert (scorer.temperature or 1) > 0
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


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pikscore", r"did you mean pickscore:FOLDER\?"),
        ("digit_svm", r"did you mean digits_svm\?"),
        ("hps2:/some/folder", r"did you mean hpsv2:FOLDER\?"),
        ("nothing like it", "digits_svm, saturation, sharpness, pickscore:FOLDER, .*FUNCTION"),
    ],
)
def test_an_unknown_name_lists_what_there_is(name, says):
    with pytest.raises(ValueError, match=f"is unknown.*{says}"):
        make_scorer(name)
    assert isinstance(make_scorer(f"{next(iter(KINDS))}:nowhere"), Scorer)  # nothing is read yet


def test_statistics_of_known_images():
    black, white = np.zeros((8, 8, 3)), np.full((8, 8, 3), 255)
    red = white * [1, 0, 0]
    stripes = np.where(np.arange(8)[None, :, None] % 2, 255, 0) + np.zeros((8, 8, 3))
    images = np.stack([black, white, red, stripes]).astype(np.uint8)
    want = {
        "brightness": [0, 1, 0.299, 0.5],
        "contrast": [0, 0, 0, 0.5],
        "saturation": [0, 0, 1, 0],
        "sharpness": [0, 0, 0, 2],
    }
    for name, values in want.items():
        got = make_scorer(name)(images, [""] * 4)
        np.testing.assert_allclose(got, values, atol=1e-5, err_msg=name)
        assert np.isfinite(make_scorer(name)(images[:, :1, :1], [""] * 4)).all()
        transparent = np.concatenate([images, images[..., :1]], -1)
        np.testing.assert_array_equal(make_scorer(name)(transparent, [""] * 4), got)


OWN = """
import dataclasses
import numpy as np

def reds(images, prompts):
    return [image[..., 0].mean() for image in images]

@dataclasses.dataclass
class Judge:
    name: str = "judge"
    temperature: float = 2.0
    def check(self, prompts):
        if "a cat" in prompts:
            raise ValueError("no cats")
    def __call__(self, images, prompts):
        return np.arange(len(images))

judge = Judge()
"""


def test_a_scorer_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    images = np.full((3, 4, 4, 3), 7, np.uint8)
    function, judge = make_scorer(f"{file}:reds"), make_scorer(f"{file}:judge")
    for scorer in (function, judge):
        assert isinstance(scorer, Scorer)
        rehearse(scorer, (4, 4), ["a"])
        assert scorer(images, ["a"] * 3).dtype == np.float32
    assert (function.name, function.temperature, function.uses_prompt) == ("reds", None, True)
    function.check(["anything"])
    np.testing.assert_array_equal(function(images, ["a"] * 3), [7, 7, 7])
    assert (judge.name, judge.temperature) == ("judge", 2.0)
    with pytest.raises(ValueError, match="no cats"):
        judge.check(["a cat"])
    version = function.version
    file.write_text(OWN + "# changed")
    assert make_scorer(f"{file}:reds").version != version
    for spec, says in {
        f"{file}:red": r"no function 'red', only Judge, judge, reds; did you mean 'reds'\?",
        f"{tmp_path}/other.py:reds": "there is no file",
    }.items():
        with pytest.raises(ValueError, match=says):
            make_scorer(spec)
    file.write_text("import nothing_of_that_name")
    with pytest.raises(ValueError, match=r"running .* failed: ModuleNotFoundError: No module"):
        make_scorer(f"{file}:reds")


def test_an_unset_temperature_is_the_scorers_own():
    assert temperature_of(make_scorer("digits_svm"), None) == 0.25
    assert temperature_of(make_scorer("digits_svm"), 3.0) == 3.0
    assert temperature_of(make_scorer("brightness"), 3.0) == 3.0
    with pytest.raises(ValueError, match=r"scorer brightness .* set collect\.temperature"):
        temperature_of(make_scorer("brightness"), None)
