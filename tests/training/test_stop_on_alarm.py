"""Alarms of a job: in its log, its metrics and its end, and with train.stop_on_alarm its stop."""

import json
import logging

import numpy as np
import pytest

from dmpo_jax import diffusers_io
from dmpo_jax.errors import INTERRUPTED
from dmpo_jax.jobs.run import run
from dmpo_jax.training import telemetry
from tests.support import outside_family, tiny

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
# A reference that never moves is an alarm once a window is full, at update 50.
LEAVES = {
    "reference__decay": 1.0,
    "optimizer__learning_rate": 1e-5,  # at the default of these configs, pairs are saturated too
    "train__steps": 60,
    "log__validate_every": 20,
    "log__checkpoint_every": 30,
}


@pytest.fixture(scope="module", autouse=True)
def _registered():
    with outside_family.registered():
        yield


def lines(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in telemetry.MEASURED} for row in rows]


def weights(workdir):
    return diffusers_io.state_dict(diffusers_io.load_model(workdir / "export"))


def alarms_in(caplog):
    found = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return [words for words in found if words.startswith("alarm")]


@pytest.mark.long
def test_a_run_warns_and_one_that_is_to_stop_stops_once(tmp_path, caplog, capsys):
    made = tiny.write(tmp_path / "tiny", outside_family.write)
    with caplog.at_level(logging.WARNING):
        run(tiny.make_config(*made, **LEAVES), tmp_path / "whole")
    during, end = alarms_in(caplog)
    assert during.startswith("alarm reference at update 50: the reference never moves")
    assert end == "alarms: reference (update 50): lower reference.decay, or unset it"
    whole = lines(tmp_path / "whole")
    named = [(x["step"], x["alarm_reference"]) for x in whole if "alarm_reference" in x]
    assert named == [(50, 1.0)]
    assert {x["validation_pairs"] for x in whole if "validation_loss" in x} == {24.0}

    stopping = tiny.make_config(*made, **LEAVES, train__stop_on_alarm=True)
    capsys.readouterr()
    with caplog.at_level(logging.WARNING), pytest.raises(SystemExit) as stopped:
        run(stopping, tmp_path / "parts")
    assert stopped.value.code == INTERRUPTED  # launchers do not run it again
    said = "stopped by an alarm (train.stop_on_alarm) at step 51, saved"
    assert said in capsys.readouterr().out
    assert alarms_in(caplog) == [during, end]
    assert not (tmp_path / "parts" / "export").exists()
    with caplog.at_level(logging.WARNING):
        run(stopping, tmp_path / "parts")
    assert alarms_in(caplog) == [end]  # raised before the resume: it stops nothing again

    assert lines(tmp_path / "parts") == whole
    ours, theirs = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
