"""Tests for dmpo_jax/progress.py."""

import io
import logging
import re
import time

import jax.numpy as jnp
import rich.console

from dmpo_jax import progress as progress_bar
from dmpo_jax.progress import Progress


def console(terminal, width=120):
    return rich.console.Console(file=io.StringIO(), force_terminal=terminal, width=width)


def screen(out):
    """The lines that a terminal holds in the end."""
    lines, row, column = [""], 0, 0
    for text, count, code in re.findall(
        r"([^\x1b\r\n]|\r|\n)|\x1b\[([?\d;]*)([A-Za-z])", out.file.getvalue()
    ):
        if code == "A":
            row -= int(count or 1)
        elif code == "K":
            lines[row] = ""
        elif text == "\r":
            column = 0
        elif text == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif text:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines if line.strip()]


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


def test_at_80_columns_nothing_is_cut_off():
    out = console(terminal=True, width=80)
    with Progress(150, description="dmpo", console=out) as progress:
        for _ in range(3):
            progress.advance(
                loss=1.3812, implicit_accuracy=0.4375, pairs_per_second=70.14, wait="1 %"
            )
    bar, values = screen(out)
    assert re.fullmatch(r"dmpo \S+ +3/150 0:00:00 ETA \S+", bar)
    assert values == "  loss 1.381  accuracy 0.4375  pairs/s 70.14  wait 1 %"


def test_log_lines_stand_above_the_bar_and_are_never_wrapped(monkeypatch):
    out = console(terminal=True, width=80)
    monkeypatch.setattr(progress_bar, "standard_error", lambda: out)
    log = logging.Logger("a")
    log.addHandler(progress_bar.ConsoleHandler())
    command = "next: " + "[b]/a/long/path " * 10
    with Progress(4, description="dmpo") as progress:
        log.info("compiled")
        progress.advance(2)
        log.info(command)
    first, second, bar = screen(out)
    assert (first, second) == ("compiled", command.rstrip())
    assert bar.startswith("dmpo")
    assert "2/4" in bar


def test_a_job_within_a_job_leaves_no_bar_behind():
    out = console(terminal=True)
    with Progress(8, description="dmpo", console=out) as progress:
        with Progress(2, description="samples", console=out) as inner:
            inner.advance(2)
        progress.advance(8)
    assert "samples" in out.file.getvalue()
    (bar,) = screen(out)
    assert bar.startswith("dmpo")
    assert "8/8" in bar


def test_a_job_with_nothing_left_shows_no_bar():
    out = console(terminal=True)
    with Progress(5, 5, "prompts", console=out):
        pass
    assert out.file.getvalue() == ""


def test_an_activity_that_counts_nothing_is_shown_while_it_runs():
    out = console(terminal=True)
    with Progress(8, description="dmpo", console=out) as progress:
        with progress.doing("checkpoint"):
            progress_bar._bars[0].refresh()
            assert screen(out)[-1] == "  checkpoint ..."
        progress.advance(1)
    assert "checkpoint" not in "".join(screen(out))


def test_off_a_terminal_a_long_activity_says_that_it_goes_on(monkeypatch, caplog):
    monkeypatch.setattr(progress_bar, "EVERY", 0.05)
    with (
        caplog.at_level(logging.INFO),
        Progress(8, console=console(terminal=False)) as progress,
        progress.doing("compiling the step"),
    ):
        time.sleep(0.12)
    assert caplog.messages[0] == "compiling the step, 0 s"


def test_of_activities_within_each_other_the_innermost_speaks(monkeypatch, caplog):
    monkeypatch.setattr(progress_bar, "EVERY", 0.05)
    with caplog.at_level(logging.INFO), progress_bar.reported("sampling", at_start=False):
        with progress_bar.reported("first batch, compiling", at_start=False):
            time.sleep(0.12)
        inner = list(caplog.messages)
        time.sleep(0.12)
    assert set(inner) == {"first batch, compiling, 0 s"}
    assert set(caplog.messages[len(inner) :]) == {"sampling, 0 s"}


def test_what_ends_a_job_is_printed_below_its_bar():
    """The bar of a generator's job is still there while its consumer's error is printed."""
    out = console(terminal=True)

    def batches():
        with Progress(8, description="sampling", console=out) as progress:
            while True:
                progress.advance(1)
                yield

    running = batches()
    next(running)
    progress_bar.stop_bars()
    out.print("stopped")
    assert screen(out)[-1] == "stopped"
    running.close()
    assert screen(out)[-1] == "stopped"
