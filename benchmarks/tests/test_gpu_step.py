"""Tests of benchmarks/speed/gpu_step.py and of PyTorch's side of it, on a CPU."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks.speed import gpu_step, torch_step
from dmpo_jax.objectives import OBJECTIVES


def test_both_sides_have_the_same_loss(triple):
    policy, reference, target = triple
    ours = OBJECTIVES["dmpo"](policy, reference, target, beta=3.0, alpha=0.01).mean()
    given = (torch.from_numpy(np.array(x.reshape(-1, 4, 4, 1))).movedim(3, 1) for x in triple)
    theirs = torch_step.dmpo_loss(torch_step.implied_logits(*given, beta=3.0), alpha=0.01)
    assert theirs.item() == pytest.approx(float(ours), rel=1e-5)


def run(side, seconds, **more):
    measured = {"peak_gb": seconds, "max_u_at_step_0": 0.0, "first_step_seconds": 9.0}
    case = {"case": "sd15:4:none", "side": side, "matmul_flops": 4e12}
    return {**case, **measured, "seconds": seconds, **more}


def test_the_table_has_medians_and_mfu_of_the_best_rate():
    runs = [run("ours", s, pair_flops=10**12) for s in (2.0, 8.0, 1.0)]
    runs += [run("eager", 6.0, matmul_flops=8e12), run("eager", 5.0), run("eager", 7.0)]
    runs += [{"case": "sd15:4:none", "side": "compiled", "error": "out of memory"}]
    ours, eager, compiled = gpu_step.summarise(runs)
    assert ours["milliseconds"] == 2000.0
    assert ours["milliseconds_min_max"] == [1000.0, 8000.0]
    assert ours["pairs_per_second"] == 2.0
    assert ours["mfu"] == 0.25
    assert ours["peak_gb"] == 8.0
    assert ours["times_ours"] == 1.0
    assert eager["times_ours"] == 3.0
    assert eager["mfu"] == pytest.approx(4 / 6 / 8)
    assert compiled == {"case": "sd15:4:none", "side": "compiled", "error": "out of memory"}


def test_without_a_gpu_it_refuses_in_words(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"needs an NVIDIA GPU .* --tiny, which measures nothing"):
        gpu_step.require_gpu()


@pytest.mark.slow
def test_the_program_runs_end_to_end_at_tiny_size(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, "benchmarks/speed/gpu_step.py", "--tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "NO MEASUREMENT" in done.stdout
    result = json.loads(out.read_text())
    assert not result["environment"]["measurement"]
    assert {(row["case"], row["side"]) for row in result["table"]} == {
        (case, side)
        for case in ("sd15:2:none", "sdxl:1:transformer")
        for side in ("ours", "eager", "compiled")
    }
    for row in result["table"]:
        assert row["pairs_per_second"] > 0, row
        assert 0 < row["mfu"] < 1, row
