"""A failing command: its output and exit status."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = """
import errno, logging, sys
from absl import app
from dmpo_jax.config.command_line import in_words, log_to_console
from dmpo_jax.errors import UserError

def fail(argv):
    log_to_console()
    try:
        {act}
    except ZeroDivisionError:
        logging.getLogger("a.library").exception("a thread failed")
        raise UserError("the disk is full")

app.run(in_words(fail))
"""


def run(act, *flags):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(act=act), *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


@pytest.mark.long
@pytest.mark.parametrize(
    ("act", "status", "said"),
    [
        ('raise UserError("set train.steps")', 1, "set train.steps\n"),
        (
            'raise OSError(errno.ENOSPC, "No space left on device", "/full")',
            1,
            "/full: No space left on device\n",
        ),
        ("raise KeyboardInterrupt", 130, "\nstopped; the same command resumes\n"),
        ("1 / 0", 1, "a thread failed\nthe disk is full\n"),
        (
            'said = {"pathname": "a/orbax/b.py", "levelno": logging.ERROR, "msg": "of a thread"}; '
            "logging.getLogger().handle(logging.makeLogRecord(said)); "
            'raise UserError("the disk is full")',
            1,
            "the disk is full\n",
        ),
    ],
)
def test_what_the_user_can_act_on_is_all_that_is_said(act, status, said):
    assert run(act) == (status, said)


def test_a_bug_shows_its_traceback():
    status, said = run('raise ValueError("an invariant")')
    assert status == 1
    assert "Traceback" in said
    assert said.endswith("ValueError: an invariant\n")


def test_debug_shows_where_a_user_s_error_was_raised():
    status, said = run("1 / 0", "--debug")
    assert status == 1
    assert "in fail" in said
    assert said.count("Traceback") >= 2  # the library's, and ours
