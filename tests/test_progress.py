"""Tests for dmpo_jax/progress.py."""

import io

import jax.numpy as jnp
import rich.console

from dmpo_jax import progress as progress_bar
from dmpo_jax.progress import Progress


def console(terminal):
    return rich.console.Console(file=io.StringIO(), force_terminal=terminal, width=120)


def test_progress_off_a_terminal_is_a_line_a_tenth():
    out = console(terminal=False)
    with Progress(1000, 500, "train", console=out) as progress:
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
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: clock[0])
    out = console(terminal=False)
    with Progress(10**6, description="train", console=out) as progress:
        for _ in range(41):
            clock[0] += 1
            progress.advance()
    got = out.file.getvalue().splitlines()
    assert len(got) == 4
    assert got[0] == "train 10/1000000 (0 %)  ETA 277:46:30"


def test_progress_on_a_terminal_is_a_bar():
    out = console(terminal=True)
    with Progress(4, description="encode", console=out) as progress:
        progress.advance(4, loss=0.25)
    shown = out.file.getvalue()
    assert "encode" in shown
    assert "4/4" in shown
    assert "loss 0.25" in shown
    assert "ETA" in shown
