"""Tests for dmpo_jax/writers.py."""

import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from PIL import Image
from tensorboardX.proto import event_pb2

from dmpo_jax import writers


def lines(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(t, parse_constant=refuse) for t in path.read_text().splitlines()]


def events(folder):
    """[(step, tag, value)] of TensorBoard's record files: length, crc, bytes, crc."""
    found = []
    for path in sorted(folder.glob("events*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            event = event_pb2.Event.FromString(content[at + 12 : at + 12 + size])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            at += 12 + size + 4
    return found


def test_a_line_a_step_at_once_and_tensorboard(tmp_path):
    with writers.MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": jnp.float32(0.5), "grad_norm": np.float64(2)})
        assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5, "grad_norm": 2.0}]
        writer.write(2, {"step": 2, "loss": float("nan"), "grad_norm": jnp.inf})
    assert lines(tmp_path / "metrics.jsonl")[1] == {"step": 2, "loss": None, "grad_norm": None}
    got = events(tmp_path / "tensorboard")
    assert (1, "loss", 0.5) in got
    assert (1, "grad_norm", 2.0) in got


def test_resuming_drops_what_the_killed_run_wrote_later(tmp_path):
    with writers.MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": step})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "lo')  # killed in the middle of a line
    with writers.MetricsWriter(tmp_path, tensorboard=False, resume_step=3) as writer:
        assert [x["step"] for x in lines(path)] == [1, 2, 3]
        writer.write(4, {"loss": 40})
    assert [x["loss"] for x in lines(path)] == [1, 2, 3, 40]
    with writers.MetricsWriter(tmp_path, tensorboard=False):
        assert len(lines(path)) == 4  # another job's writer cuts nothing
    with writers.MetricsWriter(tmp_path, tensorboard=False, resume_step=0):
        assert path.read_text() == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_object_storage_gets_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "_OBJECT_STORAGE", (str(tmp_path),))
    monkeypatch.setattr(writers.MetricsWriter, "PART_SECONDS", 0.0)
    with writers.MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": step})
    monkeypatch.setattr(writers.MetricsWriter, "PART_SECONDS", 1e9)
    with writers.MetricsWriter(tmp_path, tensorboard=False, resume_step=2) as writer:
        writer.write(3, {"loss": 30})
        writer.write(4, {"loss": 40})
    parts = sorted(tmp_path.glob("metrics-*.jsonl"))
    assert not (tmp_path / "metrics.jsonl").exists()
    assert [x["loss"] for p in parts for x in lines(p)] == [1, 2, 30, 40]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with writers.MetricsWriter(tmp_path / "run", wandb="project") as writer:
        writer.write(1, {"loss": 1})
    writers.save_png(tmp_path / "run" / "a.png", Image.new("RGB", (2, 2)))
    assert not (tmp_path / "run").exists()


def test_wandb_missing_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"dmpo_jax\[wandb\]"):
        writers.MetricsWriter(tmp_path, wandb="project")


def console(terminal):
    return rich.console.Console(file=io.StringIO(), force_terminal=terminal, width=120)


def test_progress_off_a_terminal_is_a_line_a_tenth():
    out = console(terminal=False)
    with writers.Progress(1000, 500, "train", console=out) as progress:
        for _ in range(500):
            progress.advance(loss=jnp.float32(1.61446), implicit_accuracy=0.5, pairs_per_second=9)
    got = out.file.getvalue().splitlines()
    assert len(got) == 5
    assert got[0].startswith(
        "train 600/1000 (60 %)  loss 1.614  accuracy 0.5  pairs/s 9  ETA 0:00:0"
    )
    assert got[-1].startswith("train 1000/1000 (100 %)")
    assert got[-1].endswith("done")


def test_progress_off_a_terminal_speaks_every_ten_seconds(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(writers.time, "monotonic", lambda: clock[0])
    out = console(terminal=False)
    with writers.Progress(10**6, description="train", console=out) as progress:
        for _ in range(41):
            clock[0] += 1
            progress.advance()
    got = out.file.getvalue().splitlines()
    assert len(got) == 4
    assert got[0] == "train 10/1000000 (0 %)  ETA 277:46:30"


def test_progress_on_a_terminal_is_a_bar():
    out = console(terminal=True)
    with writers.Progress(4, description="encode", console=out) as progress:
        progress.advance(4, loss=0.25)
    shown = out.file.getvalue()
    assert "encode" in shown
    assert "4/4" in shown
    assert "loss 0.25" in shown
    assert "ETA" in shown


def test_grid_places_every_image_and_draws_captions():
    images = np.random.default_rng(0).integers(0, 200, (5, 8, 9, 3), np.uint8)
    plain = np.asarray(writers.image_grid(images, 3, scale=2))
    big = images.repeat(2, 1).repeat(2, 2)
    gap = 4
    assert plain.shape == (gap + 2 * (16 + gap), gap + 3 * (18 + gap), 3)
    for i, image in enumerate(big):
        y, x = gap + i // 3 * (16 + gap), gap + i % 3 * (18 + gap)
        np.testing.assert_array_equal(plain[y : y + 16, x : x + 18], image)
    assert (plain[gap + 16 + gap :, gap + 2 * (18 + gap) :] == 255).all()
    told = np.asarray(writers.image_grid(images, 3, labels=["one", "two"], header=list("abc")))
    white = np.asarray(writers.image_grid(images, 3, labels=["", ""], header=[""] * 3))
    assert told.shape == white.shape
    assert told.sum() < white.sum()
    with pytest.raises(ValueError, match="labels must have 2 texts, but got 1"):
        writers.image_grid(images, 3, labels=["one"])


def test_captions_keep_inside_the_sheet():
    images = np.full((1, 32, 32, 3), 255, np.uint8)
    for caption in ("word " * 100, "x" * 500):
        sheet = np.asarray(writers.image_grid(images, 1, labels=[caption]))
        assert (sheet < 255).any()
        assert (sheet[:, -4:] == 255).all()


def test_png_is_whole(tmp_path):
    image = writers.image_grid(np.zeros((2, 4, 4, 3), np.uint8), 2)
    writers.save_png(tmp_path / "samples" / "10.png", image)
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["10.png"]
    np.testing.assert_array_equal(Image.open(tmp_path / "samples" / "10.png"), image)
