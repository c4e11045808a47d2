"""Runs benchmarks/speed/cpu_step.py once: both sides must agree, or it reports nothing."""

import json
import pathlib
import subprocess
import sys

import pytest

SPEED = pathlib.Path(__file__).parents[1] / "speed"


@pytest.mark.slow
def test_one_round_of_both_sides(tmp_path):
    out = tmp_path / "cpu_step.json"
    flags = ["--rounds=1", "--steps=1", f"--out={out}"]
    run = subprocess.run(
        [sys.executable, SPEED / "cpu_step.py", *flags], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(out.read_text())["environment"]["rounds"] == 1
