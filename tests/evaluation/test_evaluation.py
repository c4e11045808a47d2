"""Tests for dmpo_jax/evaluation: judging as images come, the page."""

import numpy as np

from dmpo_jax.evaluation.judging import judge
from dmpo_jax.evaluation.page import before_after, render, rows_shown


class Brightness:
    """A scorer that remembers what it was asked."""

    name, version, temperature, uses_prompt = "brightness", "1", 1.0, False

    def __init__(self):
        self.asked = []

    def check(self, prompts):
        pass

    def __call__(self, images, prompts):
        self.asked += prompts
        return images.mean((1, 2, 3), dtype=np.float32)


def test_images_are_judged_as_they_come_and_few_are_kept():
    images = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((4, 4, 3), np.uint8)
    prompts = [f"prompt {i}" for i in range(10)]
    scorer = Brightness()
    batches = (images[i : i + 4] for i in range(0, 10, 4))
    found = judge(batches, prompts, {"brightness": scorer}, {1, 9})
    np.testing.assert_array_equal(found.scores["brightness"], np.arange(10))
    assert scorer.asked == prompts
    assert {i: image[0, 0, 0] for i, image in found.kept.items()} == {1: 1, 9: 9}


def test_the_picture_shows_whole_rows():
    prompts = ["a", "b", "a", "a", "b", "c"]
    rows = rows_shown(prompts, 2)
    assert rows == {"a": [0, 2], "b": [1, 4]}
    assert rows_shown(prompts, 8) == rows  # as many as half of the prompts have
    few = rows_shown([str(i) for i in range(256)], 8)
    assert few == {str(i): [i] for i in range(12)}  # each with its prompt, and not all
    assert len(rows_shown([str(i % 40) for i in range(400)], 8)) == 12
    model = {i: np.full((64, 64, 3), i, np.uint8) for i in range(6)}
    picture = before_after(model, model, rows)
    assert picture.size[0] > 2 * 128
    assert picture.size[1] > 4 * 128


def test_the_page_escapes_and_rounds():
    judged = {"win_rate": 0.5512, "win_rate_ci95": [0.4, 0.7], "score_base": 1, "score_policy": 2}
    page = render(
        {
            "judges": {"<b>": judged},
            "seeds": 80,
            "base": "a & b",
            "policy": "c",
            "sampler": {"name": "ddim", "steps": 20, "guidance_scale": 1.0},
        }
    )
    for text in ("a &amp; b", "&lt;b&gt;", "55.1%", "40.0% to 70.0%", "2.000", "ddim, 20 steps"):
        assert text in page
    assert "{" not in page.split("</style>")[1]


def test_the_picture_of_large_images_is_small():
    images = np.zeros((24, 512, 768, 3), np.uint8)
    prompts = [f"prompt {i % 3}" for i in range(24)]
    rows = rows_shown(prompts, 8)
    shown = {i for row in rows.values() for i in row}
    kept = judge([images], prompts, {"brightness": Brightness()}, shown).kept
    assert kept[0].shape == (171, 256, 3)
    width, height = before_after(kept, kept, rows).size
    assert 8 * 256 < width < 8 * 300
    assert 6 * 171 < height < 6 * 230
