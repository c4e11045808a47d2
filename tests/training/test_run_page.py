"""Tests for dmpo_jax/training/run_page.py: what the page says; its look is judged by eye."""

import io
import json
import math
import time

import jax
import numpy as np
import pytest
from PIL import Image

from dmpo_jax import storage
from dmpo_jax.pages.charts import number
from dmpo_jax.training import alarms, metrics, run_page
from dmpo_jax.training.hooks import Hook
from dmpo_jax.training.run_page import About, Next, RunPage, Setting
from tests.support import watched
from tests.support.page import Page

EVIL = "<script>alert('x')</script> & \"cat\" </p>"
ABOUT = About("a run", "dmpo on a model")


class Shown(Page):
    """The page of a run: figures of its curves, tiles, alarms."""

    def figures(self) -> dict[str, list[str]]:
        """{curve: first, lowest, highest, last}."""
        return {row[0]: row[1:] for row in self.rows if len(row) == 5 and row[1] != "first"}

    def tile(self, name) -> str:
        return self.texts[self.texts.index(name) + 1]

    def alarms(self) -> str:
        return " ".join(self.texts[self.texts.index("Alarms") + 1 : self.texts.index("Curves")])


def picture(shade: int = 90) -> Image.Image:
    return Image.new("RGB", (40, 60), (shade, shade, shade))


def expected(rows) -> dict[str, list[str]]:
    """The figures of rows of metrics.jsonl."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and value is not None and not name.startswith(("alarm_", "compiled")):
                found.setdefault(name, []).append(value)
    return {
        name: [number(x) for x in (values[0], min(values), max(values), values[-1])]
        for name, values in found.items()
    }


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return watched.write(tmp_path_factory.mktemp("pairs"), told=1.0, validation=16)


def test_a_run_has_a_page_from_its_start_whose_figures_are_the_metrics(pairs, tmp_path, caplog):
    path, seen = tmp_path / run_page.PAGE, []

    class Look(Hook):
        """Waits for the page to show an earlier update; returns what cannot be drawn."""

        name, every = "look", 20

        def attach(self, writer):
            self.writer = writer

        def close(self):  # as the grid of the last update, which a thread is still drawing
            self.writer.image(40, "samples", picture())

        def __call__(self, state, update):
            deadline = time.monotonic() + 20
            while not seen and time.monotonic() < deadline:
                page = Shown(path) if path.exists() else None
                if page and page.tile("update") != "0":
                    seen.append(page)
            return {"mine": math.nan, "not_always": math.inf if update == 20 else 7.0}

    rows, _ = watched.run(tmp_path, pairs, steps=40, validate_every=20, page=ABOUT, hooks=[Look()])
    meanwhile, page = seen[0], Shown(path)
    assert "training" in meanwhile.texts
    assert 1 <= int(meanwhile.tile("update")) <= 20
    assert "complete" in page.texts
    assert page.tile("update") == "40"
    assert page.figures() == expected(rows)
    assert page.figures()["not_always"] == ["7"] * 4
    assert [image["src"] for image in page.images] == ["samples/40.webp"]
    assert page.tile("loss") == number([row["loss"] for row in rows if "loss" in row][-1])
    charts = {a["aria-label"].partition(":")[0] for tag, a in page.tags if tag == "svg"}
    assert charts >= {"loss", "accuracy", "margin", "implied logit u", "gradient norm"}
    assert not {"script", "link"} & {tag for tag, _ in page.tags}
    assert "http" not in path.read_text()  # nothing from elsewhere
    assert "not complete" not in caplog.text


def write_rows(folder, steps, *, resume_step=0, about=ABOUT, images=(), **kw) -> Shown:
    """Writes rows and images of these updates as training does; returns the page."""
    page = RunPage(folder, about, total=9, resume_step=resume_step, **kw)
    writer = metrics.MetricsWriter(folder, tensorboard=False, resume_step=resume_step, sinks=[page])
    with writer:
        for step in steps:
            writer.write(step, {"loss": 10 + step, "learning_rate": 0.1, "skipped": 0.0})
            for number_, image in images:
                if number_ == step:
                    writer.image(step, "samples", image)
    return Shown(page.path)


@pytest.mark.parametrize("remote", [False, True])
def test_a_resumed_run_has_all_its_curve_and_grids(tmp_path, remote, monkeypatch):
    if remote:  # metrics are in parts there
        monkeypatch.setattr(storage, "is_remote", lambda path: True)
    (tmp_path / "samples").mkdir()
    for step in (2, 4):
        picture(step).save(tmp_path / "samples" / f"{step}.png")
    (tmp_path / "samples" / "1.png").write_bytes(b"no image")
    (tmp_path / "samples" / "before_after.png").write_bytes(b"of another job")
    write_rows(tmp_path, range(1, 6))  # killed; the newest checkpoint is of update 3
    page = write_rows(tmp_path, [4, 9], resume_step=3, images=[(9, picture())])
    assert page.figures()["loss"] == ["11", "11", "19", "19"]
    (said,) = [a["aria-label"] for t, a in page.tags if t == "svg" and "loss" in a["aria-label"]]
    assert "training from 11 at update 1 to 19 at update 9" in said
    assert [image["src"] for image in page.images] == ["samples/2.webp", "samples/9.webp"]
    assert any(
        t.startswith("This grid cannot be shown: UnidentifiedImageError") for t in page.texts
    )
    for image in page.images:
        with Image.open(tmp_path / "report" / image["src"]) as copy:
            assert copy.size == (40, 60) == (int(image["width"]), int(image["height"]))


def test_a_fresh_start_shows_nothing_of_the_run_before(tmp_path):
    write_rows(tmp_path, range(1, 6), images=[(2, picture())])
    (tmp_path / "samples").mkdir()
    picture().save(tmp_path / "samples" / "2.png")
    page = write_rows(tmp_path, [1, 2])
    assert page.figures()["loss"] == ["11", "11", "12", "12"]
    assert not page.images


class Broken(Image.Image):
    """An image that cannot be used."""

    def copy(self):
        raise ValueError("broken image")

    def convert(self, *args, **kw):
        raise ValueError("broken image")


def test_a_broken_image_and_a_full_disk_do_not_end_the_run(tmp_path, monkeypatch, caplog):
    page = write_rows(tmp_path, range(1, 4), images=[(2, Broken())])
    assert "This grid cannot be shown: ValueError: broken image" in page.texts
    assert page.figures()["loss"][-1] == "13"
    there = (tmp_path / run_page.PAGE).read_bytes()

    write = storage.write_bytes

    def full(path, content):
        if "report" in str(path):
            raise OSError(28, "No space left on device")
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", full)
        write_rows(tmp_path, range(1, 4), images=[(2, picture())])
    assert caplog.text.count("the run's page is not complete: OSError") == 1
    assert (tmp_path / run_page.PAGE).read_bytes() == there
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3]


def test_all_texts_are_escaped_and_images_have_words(tmp_path):
    about = About(
        EVIL, EVIL, [Setting(EVIL, EVIL, EVIL)], [EVIL, "second"], [Next(EVIL, EVIL)], True
    )
    raised = [alarms.Alarm("stuck", 2, alarms.Finding(EVIL, EVIL))]
    page = write_rows(tmp_path, [1, 2], about=about, images=[(2, picture())], alarms=lambda: raised)
    assert "script" not in {tag for tag, _ in page.tags}
    (image,) = page.images
    assert image["alt"] == f"Images drawn after 2 updates, a row a prompt: {EVIL}; second"
    assert page.alarms() == f"stuck , at update 2: {EVIL}. To change: {EVIL}."
    assert [EVIL] * 3 in page.rows
    assert all(a.get("aria-label") and a["role"] == "img" for t, a in page.tags if t == "svg")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (SystemExit(143), "stopped, its state is saved: the same command resumes"),
        (ValueError("update 3 broke"), "ended by ValueError: update 3 broke"),
    ],
)
def test_it_says_how_training_ended(tmp_path, error, said):
    page = RunPage(tmp_path, ABOUT, total=9)
    page.open()
    page.ended(type(error), error, None)
    page.close()
    assert said in Shown(page.path).texts


def test_the_time_left_is_by_the_pace_of_this_process(tmp_path):
    now = [0.0]
    page = RunPage(tmp_path, ABOUT, total=1000, resume_step=100, clock=lambda: now[0])
    for step in (110, 120, 130):
        now[0] += 36.0
        page.write(step, {"loss": 1.0, "learning_rate": 0.1})
    assert Shown(page.path).tile("time left") == "52 min"  # 870 updates of 3.6 s


def test_rewriting_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    now, wrote, write = [0.0], [], storage.write_bytes

    def slow(path, content):
        write(path, content)
        now[0] += 1.0
        wrote.append(now[0])

    monkeypatch.setattr(storage, "write_bytes", slow)
    page = RunPage(tmp_path, ABOUT, total=9999, clock=lambda: now[0])
    page.open()
    for step in range(1, 301):
        now[0] += 1.0
        page.write(step, {"loss": 1.0, "learning_rate": 0.1})
    assert len(wrote) in (3, 4)  # 1 %
    before = len(wrote)
    for step in range(301, 401):
        now[0] += 1.0
        page.write(step, {"validation_loss": 1.0})
    assert 8 <= len(wrote) - before <= 11  # 10 %


def test_other_processes_write_no_page(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    page = RunPage(tmp_path / "run", ABOUT, total=9)
    with metrics.MetricsWriter(tmp_path / "run", sinks=[page]) as writer:
        writer.write(1, {"loss": 1.0})
        writer.image(1, "samples", picture())
    assert not (tmp_path / "run").exists()


def test_a_large_grid_has_a_small_copy(tmp_path):
    page = RunPage(tmp_path, ABOUT, total=9)
    page.image(1, "samples", Image.fromarray(np.zeros((3000, 1500, 3), np.uint8)))
    page.close()
    (image,) = Shown(page.path).images
    content = (tmp_path / "report" / image["src"]).read_bytes()
    assert Image.open(io.BytesIO(content)).size == (512, 1024)


def test_many_grids_are_folded_away(tmp_path):
    page = RunPage(tmp_path, ABOUT, total=99)
    for step in range(0, 90, 10):
        page.image(step, "samples", picture())
    page.close()
    shown = Shown(page.path)
    assert [image["src"] for image in shown.images] == [
        f"samples/{step}.webp" for step in (0, 40, 50, 60, 70, 80, 10, 20, 30)
    ]
    assert "3 more, between the first and these" in shown.texts
