"""Tests for dmpo_jax/inspection/: the page of raw pairs; the look is judged by eye."""

import html.parser
import io

import pytest
from PIL import Image

from dmpo_jax.data import sources
from dmpo_jax.inspection import page as inspect_page
from dmpo_jax.inspection.look import inspect_source

EVIL = "<script>alert('x')</script> & \"cat\" </p>"


def picture(i, size=(500, 400)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (i % 256, i // 256, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def row(i, label=1.0, **changes):
    images = {"jpg_0": picture(2 * i), "jpg_1": picture(2 * i + 1, (30, 20))}
    return {"caption": f"prompt {i}", "label_0": label, **images, **changes}


class Page(html.parser.HTMLParser):
    """Tags and texts; complains of tags that are not closed."""

    OPEN = ("meta", "img", "br")

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.images, self._open = [], [], [], []
        self.feed(path.read_text())
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.images += [dict(attrs)["src"]] if tag == "img" else []
        if tag not in self.OPEN:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts += [data.strip()] if data.strip() else []

    def after(self, text):
        """The text that follows."""
        return self.texts[self.texts.index(text) + 1]


def write(folder, rows):
    sources.write_pick_a_pic(folder / "raw" / "a.parquet", rows)
    return f"pickapic:{folder}/raw"


def test_the_page_holds_what_was_found(tmp_path):
    rows = [
        row(0, caption=EVIL),
        *(row(i, 0.0) for i in range(1, 5)),
        row(5, 0.5, jpg_source=picture(77), mask=b"broken"),
        row(0, caption=EVIL),  # again
        row(1, 1.0, jpg_0=row(1)["jpg_1"], jpg_1=row(1)["jpg_0"]),  # again, the other way round
        row(2, 1.0),  # again, contradicting
        row(3, caption="prompt 3, otherwise"),  # the same images alone
        row(6, jpg_0=b"<b>no image"),
        row(7, has_label=False),
    ]
    path = inspect_source(write(tmp_path, rows), tmp_path / "out", ties="keep", limit=100)
    assert path == tmp_path / "out" / "index.html"
    page, text = Page(path), path.read_text()
    assert "script" not in page.tags
    assert "http" not in text  # nothing from elsewhere
    assert page.texts.count(EVIL) == 3  # two samples and the repeated pair
    assert page.after("pairs") == "10"
    assert page.after("distinct prompts") == "7"
    assert page.after("ties") == "1"
    assert page.after("repeated pairs") == "3"
    assert page.after("skipped") == "2"
    assert page.after("0: image 1") == "4 (40.0%)"
    assert page.after("0.5: a tie") == "1 (10.0%)"
    assert page.after("1: image 0") == "5 (50.0%)"
    assert page.after("500x400") == page.after("30x20") == "10 (50.0%)"
    assert page.after("no label") == "1 row, 8.3%"
    assert page.after("undecodable image") == "1 row, 8.3%"
    assert "8 of 12 distinct images (by their bytes) are in several pairs." in text
    assert page.after("1 of them with different preferences") == "."
    assert page.after("a.parquet:2 = a.parquet:8") == "different preferences"
    assert "a.parquet:1 = a.parquet:7" in page.texts
    assert "All 12 rows were read." in page.texts
    assert page.texts.count("given") == page.texts.count("mask") == 0
    assert page.texts.count("source") == 1  # the broken mask is no reason to stop
    for name in page.images:
        with Image.open(path.parent / name) as image:
            assert max(image.size) in (384, 30)


@pytest.mark.parametrize(
    ("preference", "said"),
    [
        (1.0, ["chosen", "rejected"]),
        (0.0, ["rejected", "chosen"]),
        (0.5, ["tie", "tie"]),
        (0.25, ["rejected, 25%", "chosen, 75%"]),
    ],
)
def test_the_chosen_one_is_marked(tmp_path, preference, said):
    page = Page(inspect_source(write(tmp_path, [row(0, preference)]), tmp_path, ties="keep"))
    got = [t for t in page.texts if t.startswith(("chosen", "rejected", "tie")) and t != "ties"]
    assert got == said


def test_a_limit_is_spread_over_the_source(tmp_path):
    for k in range(50):
        sources.write_pick_a_pic(tmp_path / "raw" / f"{k:02}.parquet", [row(k), row(100 + k)])
    path = inspect_source(
        f"pickapic:{tmp_path}/raw", tmp_path / "out", ties="keep", limit=20, samples=5
    )
    page = Page(path)
    assert page.after("pairs") == "20"
    assert len(page.images) == 10
    assert any(t.startswith("20 rows of at most 100 were read, from 20 of") for t in page.texts)
    shown = [t for t in page.texts if ".parquet:" in t]
    assert shown[0] == "00.parquet:0"
    assert shown[-1].startswith("40.")


def test_a_source_of_nothing_good(tmp_path):
    said = rf"none of the 1 rows of .* \(1 no image\); see {tmp_path}/out/index.html"
    with pytest.raises(ValueError, match=said):
        inspect_source(write(tmp_path, [row(0, jpg_0=b"")]), tmp_path / "out", ties="keep")
    page = Page(tmp_path / "out" / "index.html")
    assert page.after("pairs") == "0"
    assert page.texts.count("None.") == 4
    with pytest.raises(ValueError, match="at least 1, but got 0"):
        inspect_source(f"pickapic:{tmp_path}/raw", tmp_path / "out", ties="keep", limit=0)


def test_many_labels_and_sizes_are_binned():
    labels = {f"{i / 100:.2f}": 1 for i in range(101)}
    bins = inspect_page.label_bins(labels)
    assert [count for _, count in bins] == [10] * 9 + [11]
    assert bins[2][0] == "0.2 to 0.3"
    assert inspect_page.most_common({f"{i}x1": 20 - i for i in range(20)})[-1] == ("8 others", 36)
