"""Tests for dmpo_jax/evaluation/report.py: what the page holds; its script has its own tests."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from dmpo_jax.evaluation import plots, report
from dmpo_jax.training.run_page import PAGE
from tests.support.made_evaluation import EVIL, write
from tests.support.page import Page


def data_of(page):
    return json.loads(page.scripts[0])


def test_the_page_holds_all_figures_and_rows(tmp_path):
    path = write(tmp_path, count=6)
    assert path == tmp_path / "report" / "index.html"
    page = Page(path)
    text = " ".join(page.texts)
    assert "The prompts are a sample." in text
    assert "no independent judge" in page.texts
    assert "second labelled" not in text
    assert "judge labelled the training pairs" in text
    assert "numbers of prompts" in text
    assert "75.0%" in page.texts  # one loss, a tie, and four wins
    assert {"Animals", "Arts & Crafts", "<tuned> 1%", "0.25"} <= set(page.texts)
    assert [row["number"] for row in data_of(page)["rows"]] == list(range(6))
    assert data_of(page)["rows"][0]["prompt"] == EVIL
    assert data_of(page)["rows"][0]["images"] == [
        "images/base/00000.png",
        "images/<tuned> 1%/00000.png",
    ]
    assert data_of(page)["primary"] == "judge"
    assert "http" not in path.read_text()  # nothing from elsewhere
    for row in data_of(page)["rows"]:
        for side, thumb in enumerate(row["thumbs"]):
            with Image.open(path.parent / thumb) as image:
                assert (image.getpixel((9, 9))[1] > 50) == side  # of the model in its place
                assert image.format == "WEBP"
                assert image.width == (384 if row["number"] == 0 else 40)
    before = path.read_bytes()
    assert write(tmp_path, count=6).read_bytes() == before


def test_the_other_question_has_other_words(tmp_path):
    text = " ".join(Page(write(tmp_path, estimand="these")).texts)
    assert "These prompts are all that is asked about." in text
    assert "numbers of images" in text


def test_several_models_without_categories(tmp_path):
    page = Page(write(tmp_path, models=("base", "one", "two"), categories=()))
    assert page.texts.count("against base") == 2
    assert [len(row["thumbs"]) for row in data_of(page)["rows"]] == [3] * 6
    assert sum(tag == "svg" for tag, _ in page.tags) == 2
    assert "By category, in figures" not in page.texts


def test_it_links_to_the_page_of_the_run_beside_it(tmp_path):
    assert "How it was trained" not in Page(write(tmp_path)).texts
    (tmp_path / PAGE).write_text("")
    page = Page(write(tmp_path))
    assert ("a", {"href": "training.html"}) in page.tags
    assert "How it was trained" in page.texts


def test_a_single_file_holds_the_extremes(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "EXTREMES", 2)
    path = write(tmp_path, count=9, single_file=True)
    rows = data_of(Page(path))["rows"]
    assert [row["number"] for row in rows] == [0, 1, 7, 8]
    assert all(t.startswith("data:image/webp;base64,") for row in rows for t in row["thumbs"])
    assert [file.name for file in path.parent.iterdir()] == ["index.html"]


def test_without_matplotlib_there_are_tables_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = Page(write(tmp_path))
    assert not any(tag == "svg" for tag, _ in page.tags)
    assert "Plots need matplotlib:" in page.texts
    assert sum(tag == "table" for tag, _ in page.tags) > 3


def test_a_plot_says_its_figures_and_takes_the_pages_colours():
    row = plots.Row('a $x$ <"&', 0.625, [0.5, 0.75], True)
    svg = plots.win_rates([row], "judge")
    assert svg is not None
    assert 'aria-label="judge: a $x$ &#60;&#34;&#38; 62%, 50% to 75%"' in svg
    assert "var(--bar)" in svg
    assert "#0a0b" not in svg
    assert "a $x$" in svg.split("aria-label", 1)[1].split(">", 1)[1]  # text, and no formula
    assert svg == plots.win_rates([row], "judge")


@pytest.mark.parametrize("side", [30, 2000])
def test_small_copies(side):
    image = np.zeros((side // 2, side, 3), np.uint8)
    with Image.open(io.BytesIO(report._webp(image))) as made:
        assert made.size == ((30, 15) if side == 30 else (384, 192))
