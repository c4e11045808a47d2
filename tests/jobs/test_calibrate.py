"""Tests for dmpo_jax/jobs/calibrate.py: refusals, the command end to end, a workdir left alone."""

import hashlib
import json

import numpy as np
import pytest

import dmpo_jax as dj
from dmpo_jax import diffusers_io
from dmpo_jax.calibration import probe as probing
from dmpo_jax.jobs.run import run
from tests.support import outside_family, tiny

BETA = "objectives.dmpo.beta"
# Orbax leaves coroutines of reads that failed to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def _registered():
    with outside_family.registered():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("tiny"), outside_family.write)


@pytest.fixture
def compiles_nothing(monkeypatch):
    def compiled(*args, **kw):
        raise AssertionError("compiled")

    monkeypatch.setattr(probing, "make_update", compiled)


def hashes(folder) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.long
def test_a_workdir_is_as_without(made, tmp_path, capsys):
    """Calibrating between two halves of a run writes its two files, and the run ends the same."""
    leaves = {"log__validate_every": 0, "log__tensorboard": False}
    run(tiny.make_config(*made, train__steps=2, **leaves), tmp_path / "run")
    before = hashes(tmp_path / "run")
    config = tiny.make_config(*made, train__steps=4, objectives__dmpo__beta=7.0, **leaves)
    found = dj.calibrate(config, workdir=str(tmp_path / "run"), updates=4, rates=("1",))
    after = hashes(tmp_path / "run")
    assert set(after) - set(before) == {"calibration.json", "calibration.md"}
    assert {name: after[name] for name in before} == before
    assert found == json.loads((tmp_path / "run" / "calibration.json").read_text())
    assert found["config_beta"] == 7.0
    assert found["paste"] == f"--config.{BETA}={found['suggested_beta']:g}"
    assert found["paste"] in capsys.readouterr().out
    assert found["probes"][0]["beta"] == 7.0
    for folder in ("run", "whole"):
        run(tiny.make_config(*made, train__steps=4, **leaves), tmp_path / folder)
    ours, theirs = (
        diffusers_io.state_dict(diffusers_io.load_model(tmp_path / folder / "export"))
        for folder in ("run", "whole")
    )
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("leaves", "options", "words"),
    [
        ({"objective": "sft"}, {}, "'sft' cannot be calibrated: it has no beta"),
        ({"optimizer__learning_rate": 0.0}, {}, r"optimizer\.learning_rate is 0"),
        ({}, {"rates": ("1", "0")}, "--rates must be factors .* above 0, but got '1,0'"),
        ({}, {"rates": ("fast",)}, "--rates must be factors"),
        ({"train__batch_size": 12}, {}, "must be a multiple of"),
        ({"data__encoded": "nowhere"}, {}, "no encoded pairs"),
        ({"objectives__dmpo__beta": -1.0}, {}, "beta must be"),
    ],
)
def test_refusals_come_before_compiling(leaves, options, words, made, tmp_path, compiles_nothing):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        dj.calibrate(tiny.make_config(*made, **leaves), workdir=str(tmp_path), **options)
    assert not hashes(tmp_path)
