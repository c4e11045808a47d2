"""Logging neither blocks nor ends a run: TensorBoard, W&B, grids, cards, traces, metrics."""

import json
import sys
import threading
import time
import types

import numpy as np
import pytest
import tensorboardX.event_file_writer
from etils import epath
from PIL import Image

from dmpo_jax.export import model_card
from dmpo_jax.sampling.images import image_grid
from dmpo_jax.training import background, build, hooks, metrics, step
from dmpo_jax.training.trace import Trace

# tensorboardX leaves the file open of a writer that could not begin.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
LINES = 40  # more than tensorboardX's own queue takes


@pytest.fixture
def stuck():
    """A call that hangs until the test is over."""
    over = threading.Event()
    yield lambda *args, **kw: over.wait(60)
    over.set()


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    for module in (background, metrics, hooks):
        monkeypatch.setattr(module, "CLOSE_SECONDS", 0.2, raising=False)


def full_disk(*args, **kw):
    raise OSError(28, "No space left on device")


def write_lines(folder, **kw) -> float:
    """The seconds that a run spends on its metrics."""
    began = time.monotonic()
    with metrics.MetricsWriter(folder, **kw) as writer:
        for step in range(1, LINES + 1):
            writer.write(step, {"loss": step})
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, LINES + 1))
    return time.monotonic() - began


def test_tensorboard_on_a_full_disk_is_off_with_one_warning(tmp_path, monkeypatch, caplog):
    writer = tensorboardX.event_file_writer.EventsWriter
    monkeypatch.setattr(writer, "write_event", full_disk)
    assert write_lines(tmp_path) < 10
    said = [r.getMessage() for r in caplog.records if "TensorBoard" in r.getMessage()]
    assert len(said) == 1
    assert "No space left" in said[0]


def test_tensorboard_that_hangs_is_left_behind(tmp_path, monkeypatch, caplog, stuck):
    monkeypatch.setattr(tensorboardX.event_file_writer.EventsWriter, "write_event", stuck)
    assert write_lines(tmp_path) < 10
    assert "TensorBoard hangs" in caplog.text


@pytest.mark.parametrize("part", ["init", "log", "finish"])
@pytest.mark.parametrize("fault", ["hangs", "failed"])
def test_wandb_that_hangs_or_fails_is_left_behind(
    part, fault, tmp_path, monkeypatch, caplog, stuck
):
    run = types.SimpleNamespace(log=lambda *a, **k: None, finish=lambda: None)
    fake = types.SimpleNamespace(init=lambda **kw: run)
    setattr(fake if part == "init" else run, part, stuck if fault == "hangs" else full_disk)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert write_lines(tmp_path, tensorboard=False, wandb="project") < 10
    assert f"W&B {fault}" in caplog.text


def test_metrics_that_a_full_disk_cuts_off_are_completed(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": 1})
        disk = writer._file

        class Full:
            left = 10

            def write(self, data):
                if not self.left:
                    full_disk()
                written = disk.write(data[: self.left])
                self.left -= written
                return written

            def close(self):
                disk.close()

        writer._file = Full()
        writer.write(2, {"loss": 2})
        writer.write(3, {"loss": 3})
        assert path.stat().st_size == len('{"step": 1, "loss": 1.0}\n') + 10
        writer._file.left = 1000  # room was made
        writer.write(4, {"loss": 4})
    assert [json.loads(row)["step"] for row in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert caplog.text.count("cannot be written") == 1


def test_what_waits_for_something_that_hangs_is_bounded(caplog, stuck):
    work, done = background.Background("it", size=3), []
    work.call(stuck)
    for i in range(100):
        work.call(done.append, i)
    work.close(time.monotonic() + 0.1)
    assert not done
    assert caplog.text.count("it hangs: the run goes on") == 1


NOTHING = step.TrainState(*[None] * 5)  # what these hooks do not look at


def draw_hook(draw):
    return hooks.Draw(build.TrainingStep(*[None] * 8), draw, every=1)


def test_a_grid_that_fails_or_hangs_does_not_end_the_run(caplog, stuck):
    state = NOTHING._replace(params={})
    began = time.monotonic()
    for draw, said in (
        (full_disk, "no image grid at step 3: OSError"),
        (lambda params, update: full_disk, "an image grid failed: OSError"),
        (lambda params, update: stuck, "an image grid hangs"),
    ):
        hook = draw_hook(draw)
        assert hook(state, 3) is None
        hook.close()
        assert said in caplog.text
    assert time.monotonic() - began < 10


def test_a_grid_goes_to_the_runs_destinations(tmp_path):
    seen, grid = [], Image.new("RGB", (4, 4))

    class Seen(metrics.Sink):
        name = "seen"

        def image(self, step, name, image):
            seen.append((step, name, image))

    hook = draw_hook(lambda params, update: lambda: grid)
    with metrics.MetricsWriter(tmp_path, tensorboard=False, sinks=[Seen()]) as writer:
        hook.attach(writer)
        hook(NOTHING._replace(params={}), 3)
        hook.close()
    assert seen == [(3, "samples", grid)]


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    with Trace((2, 9), epath.Path(tmp_path / "file")) as trace:
        trace.due(5)
        trace.switch()
    assert "the trace cannot be written" in caplog.text


def test_a_card_that_fails_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(model_card, "render", full_disk)
    trained = model_card.Trained("org/name", None, None)
    card = model_card.Card(trained, "dmpo", 8, 0.0, "pairs", {}, epath.Path(tmp_path))
    model_card.write_card(card, epath.Path(tmp_path), step=1, ema=False)
    assert "no model card" in caplog.text


def test_a_caption_of_a_million_letters_is_labelled_at_once():
    image = np.zeros((1, 16, 16, 3), np.uint8)
    began = time.monotonic()
    for caption in ("x" * 1_000_001, "x " * 600_000, "y" * 4_000):
        sheet = image_grid(image, 1, labels=[caption])
        assert (np.asarray(sheet) < 255).any()
    assert time.monotonic() - began < 5
