"""Tests for dmpo_jax/training/metrics.py."""

import io
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from dmpo_jax import storage
from dmpo_jax.training import metrics


def lines(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(t, parse_constant=refuse) for t in path.read_text().splitlines()]


def events(folder, read=lambda value: value.simple_value):
    """[(step, tag, value)] of TensorBoard's record files: length, crc, bytes, crc."""
    found = []
    for path in sorted(folder.glob("events*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            event = event_pb2.Event.FromString(content[at + 12 : at + 12 + size])
            found += [(event.step, v.tag, read(v)) for v in event.summary.value]
            at += 12 + size + 4
    return found


def test_a_line_a_step_at_once_and_tensorboard(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": jnp.float32(0.5), "grad_norm": np.float64(2)})
        assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5, "grad_norm": 2.0}]
        writer.write(2, {"step": 2, "loss": float("nan"), "grad_norm": jnp.inf})
    assert lines(tmp_path / "metrics.jsonl")[1] == {"step": 2, "loss": None, "grad_norm": None}
    got = events(tmp_path / "tensorboard")
    assert (1, "loss", 0.5) in got
    assert (1, "grad_norm", 2.0) in got


def test_tensorboard_gets_images(tmp_path):
    grid = Image.new("L", (30, 20), 77)
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 0.5})
        writer.image(1, "samples", grid)
        writer.image(2, "samples", grid.resize((6000, 3000)))
    (_, first), (_, second) = [
        (step, v.image)
        for step, tag, v in events(tmp_path / "tensorboard", read=lambda value: value)
        if tag == "samples"
    ]
    with Image.open(io.BytesIO(first.encoded_image_string)) as image:
        assert image.size == (first.width, first.height) == (30, 20)
        assert image.getpixel((3, 3)) == (77, 77, 77)
    assert (second.width, second.height) == (2048, 1024)


def test_wandb_gets_images_with_the_next_row(tmp_path, monkeypatch):
    logged = []
    run = types.SimpleNamespace(
        log=lambda row, **kw: logged.append((row, kw)), finish=lambda: logged.append("end")
    )
    fake = types.SimpleNamespace(
        init=lambda **kw: run, Image=lambda image, caption: (image.size, caption)
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with metrics.MetricsWriter(tmp_path, tensorboard=False, wandb="project") as writer:
        writer.write(9, {"loss": 0.5})
        writer.image(7, "samples", Image.new("RGB", (30, 20)))
    assert logged == [
        ({"loss": 0.5}, {"step": 9}),
        ({"samples": ((30, 20), "update 7")}, {"commit": False}),
        "end",
    ]


def test_resuming_drops_what_the_killed_run_wrote_later(tmp_path):
    with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": step})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "lo')  # killed in the middle of a line
    with metrics.MetricsWriter(tmp_path, tensorboard=False, resume_step=3) as writer:
        assert [x["step"] for x in lines(path)] == [1, 2, 3]
        writer.write(4, {"loss": 40})
    assert [x["loss"] for x in lines(path)] == [1, 2, 3, 40]
    with metrics.MetricsWriter(tmp_path, tensorboard=False):
        assert len(lines(path)) == 4  # another job's writer cuts nothing
    with metrics.MetricsWriter(tmp_path, tensorboard=False, resume_step=0):
        assert path.read_text() == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_object_storage_gets_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "is_remote", lambda path: True)
    monkeypatch.setattr(metrics.MetricsWriter, "PART_SECONDS", 0.0)
    with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": step})
    monkeypatch.setattr(metrics.MetricsWriter, "PART_SECONDS", 1e9)
    with metrics.MetricsWriter(tmp_path, tensorboard=False, resume_step=2) as writer:
        writer.write(3, {"loss": 30})
        writer.write(4, {"loss": 40})
    parts = sorted(tmp_path.glob("metrics-*.jsonl"))
    assert not (tmp_path / "metrics.jsonl").exists()
    assert [x["loss"] for p in parts for x in lines(p)] == [1, 2, 30, 40]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with metrics.MetricsWriter(tmp_path / "run", wandb="project") as writer:
        writer.write(1, {"loss": 1})
    assert not (tmp_path / "run").exists()


def test_wandb_missing_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'wandb"):
        metrics.MetricsWriter(tmp_path, wandb="project")
