"""Tests for dmpo_jax.jobs.train and the jobs around it: resuming, refusing, stopping.

Of what is the same for every family: the smallest model serves.
"""

import gc
import json
import pathlib
import random
import re
import signal
import time
import types

import numpy as np
import pytest
from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.config import checks as config_checks
from dmpo_jax.config import configs, reference
from dmpo_jax.config.files import load_config
from dmpo_jax.jobs import train
from dmpo_jax.jobs.convert import convert
from dmpo_jax.jobs.run import run
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.training import hooks
from dmpo_jax.training import step as training_step
from dmpo_jax.training import telemetry as watch
from dmpo_jax.training.run_page import PAGE
from tests.support import launched, outside_family, tiny
from tests.support.quick import EXACT

# Orbax leaves coroutines of reads that failed to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _collect():
    yield
    gc.collect()


@pytest.fixture(scope="module", autouse=True)
def _registered():
    with outside_family.registered():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("tiny"), outside_family.write)


@pytest.fixture(scope="module")
def uninterrupted(made, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    run(tiny.make_config(*made), workdir)
    return workdir


def state_dict(folder) -> dict[str, np.ndarray]:
    return diffusers_io.state_dict(diffusers_io.load_model(folder))


def weights(workdir) -> dict[str, np.ndarray]:
    return state_dict(workdir / "export")


def lines(workdir) -> list[dict]:
    """metrics.jsonl without what clock and machine say."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in watch.MEASURED} for row in rows]


def curves_on_page(workdir) -> dict[str, list[str]]:
    """The figures of the run's page, without what clock and machine say."""
    page = (workdir / PAGE).read_text()
    rows = re.findall(r'<tr><th scope="row">(\w+)</th>((?:<td>[^<]*</td>){4})</tr>', page)
    return {k: re.findall("<td>([^<]*)", v) for k, v in rows if k not in watch.MEASURED}


def assert_same_run(workdir, other):
    ours, theirs = weights(workdir), weights(other)
    assert set(ours) == set(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert lines(workdir) == lines(other)


def test_a_run_writes_what_it_promises(uninterrupted):
    rows = lines(uninterrupted)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    for name in ("implicit_accuracy", "grad_norm", "learning_rate", "margin"):
        assert all(np.isfinite(row[name]) for row in steps)
    assert [row["step"] for row in rows if "validation_loss" in row] == [3, 6]
    assert (uninterrupted / "export" / "model_index.json").exists()
    assert list((uninterrupted / "tensorboard").iterdir())
    assert json.loads((uninterrupted / "config.json").read_text())["objective"] == "dmpo"


# Of two images: the policy's forward, a backward of twice that, and the reference's forward. One
# forward: 16 tokens through 16 -> 24 -> 24 -> 24 -> 16, 6 words through 32 -> 24, the time.
FORWARD = 2 * (16 * (2 * 16 * 24 + 2 * 24 * 24) + 6 * 32 * 24 + 2 * 24)
PAIR_TFLOPS = 2 * (1 + 2 + 1) * FORWARD * 1e-12


def test_a_run_tells_its_pace(uninterrupted):
    text = (uninterrupted / "metrics.jsonl").read_text()
    rows = [row for row in map(json.loads, text.splitlines()) if "loss" in row]
    first, later = rows[0], rows[1:]
    assert first["seconds_compile"] > 0
    assert first["seconds_to_first_step"] > first["seconds_compile"]
    assert not any("seconds_compile" in row for row in later)
    for row in rows:
        assert row["seconds_input"] + row["seconds_step"] == pytest.approx(
            8 / row["pairs_per_second"]
        )
        per_chip = row["pairs_per_second_per_chip"]
        assert per_chip == pytest.approx(row["pairs_per_second"] / 8)
        assert row["tflops_per_second_per_chip"] / per_chip == pytest.approx(PAIR_TFLOPS)
        assert row["host_memory_peak_gb"] >= row["host_memory_gb"] > 0
        assert "mfu" not in row
    assert [row["step"] for row in rows if "seconds_checkpoint" in row] == [3, 5]
    assert [row["step"] for row in rows if "seconds_validation" in row] == [4]


def test_the_policy_moves(made, uninterrupted):
    before, after = state_dict(made[0]), weights(uninterrupted)
    assert {name for name in before if np.array_equal(before[name], after[name])} == {"positions"}


def test_resumed_equals_uninterrupted(made, uninterrupted, tmp_path):
    run(tiny.make_config(*made, train__steps=3), tmp_path)
    run(tiny.make_config(*made, profile="5:6"), tmp_path)  # a longer run is the same run
    assert_same_run(tmp_path, uninterrupted)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))  # and a trace changes nothing
    assert curves_on_page(tmp_path) == curves_on_page(uninterrupted)
    assert curves_on_page(tmp_path)["loss"][0] == f"{lines(tmp_path)[0]['loss']:.4g}"


@pytest.mark.long
def test_a_moving_reference_goes_on_where_it_was(made, tmp_path):
    leaves = {"reference__decay": 0.5, "train__steps": 4, "anchor__kind": "hinge"}
    run(tiny.make_config(*made, **leaves), tmp_path / "whole")
    run(tiny.make_config(*made, **{**leaves, "train__steps": 2}), tmp_path / "parts")
    run(tiny.make_config(*made, **leaves), tmp_path / "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_finished_run_is_not_run_again(made, uninterrupted):
    before = weights(uninterrupted)
    run(tiny.make_config(*made), uninterrupted)
    after = weights(uninterrupted)
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.long
def test_a_broken_newest_checkpoint_falls_back(made, uninterrupted, tmp_path, caplog):
    run(tiny.make_config(*made, train__steps=4), tmp_path)
    for file in (tmp_path / "checkpoints" / "4").rglob("*"):
        if file.is_file() and file.stat().st_size > 500:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    run(tiny.make_config(*made), tmp_path)
    assert "checkpoint 4 is not valid" in caplog.text
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize(
    "change",
    [
        {"objectives__dmpo__beta": 5.0},
        {"objective": "diffusion_dpo"},
        {"seed": 1},
        {"train__batch_size": 16},
        {"optimizer__learning_rate": 1e-4},
    ],
)
def test_a_workdir_of_another_run_is_refused(made, uninterrupted, change):
    (key,) = change
    with pytest.raises(ValueError, match="another run") as error:
        run(tiny.make_config(*made, **change), uninterrupted)
    assert key.replace("__", ".") in str(error.value)


@pytest.mark.long
def test_another_mesh_or_log_interval_is_the_same_run(made, uninterrupted, tmp_path):
    run(tiny.make_config(*made, train__steps=3), tmp_path)
    other = tiny.make_config(*made, mesh__data=4, mesh__fsdp=2, log__every=3, train__steps=4)
    run(other, tmp_path)
    assert [row["step"] for row in lines(tmp_path) if "loss" in row] == [1, 2, 3, 4]


# With and without reference, with and without rejected images, with a mean over the batch.
KINDS = {"dmpo", "sft", "mapo", "diffusion_kto"}


@pytest.mark.long
@pytest.mark.parametrize(
    "objective",
    [pytest.param(n, marks=[] if n in KINDS else pytest.mark.slow) for n in sorted(OBJECTIVES)],
)
def test_every_objective_trains_with_accumulation_in_bfloat16(made, objective, tmp_path):
    leaves = {"train__accumulation": 2, "train__steps": 2, "train__batch_size": 16}
    leaves |= {"timesteps__weighting": "cosmap", "log__every": 1, "log__tensorboard": True}
    if OBJECTIVES[objective].needs_rejected:
        leaves["safeguard__mu"] = 0.5
    config = tiny.make_config(*made, objective=objective, model__compute_dtype="bfloat16", **leaves)
    run(config, tmp_path)
    rows = lines(tmp_path)
    assert rows[-1]["step"] == 2
    assert np.isfinite(rows[-1]["loss"])
    assert rows[-1]["update_norm"] > 0
    assert ("safeguard" in rows[-1]) == ("margin_p50" in rows[-1]) == ("safeguard__mu" in leaves)
    logit = OBJECTIVES[objective].implied_logit
    assert ("logit_p95" in rows[-1]) == ("saturation" in rows[-1]) == logit
    softened = {"dmpo", "alpha_divergence", "jensen_shannon"}
    assert ("past_optimum" in rows[-1]) == (objective in softened)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss_by_timestep/" in events.read_bytes()
    assert not any("by_timestep" in name for name in rows[-1])


class Count(hooks.Hook):
    """A hook as a user writes one."""

    name, every, at_start = "count", 2, True

    def __init__(self):
        self.seen = []

    def __call__(self, state, update):
        self.seen.append((update, int(state.step)))
        return {"updates_seen": float(len(self.seen))}


def test_a_callers_hooks_are_called_and_their_scalars_written(made, tmp_path):
    ours, plain = Count(), []

    class Plain:  # no `Hook`, but like one
        name, every = "plain", 3

        def __call__(self, state, update):
            plain.append(update)

    train.train(
        tiny.make_config(*made, train__steps=4, log__validate_every=0),
        epath.Path(tmp_path),
        hooks=(ours, Plain()),
    )
    assert ours.seen == [(0, 0), (2, 2), (4, 4)]
    assert plain == [3]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["updates_seen"]) for r in rows if "updates_seen" in r] == [
        (0, 1.0),
        (2, 2.0),
        (4, 3.0),
    ]
    assert [r["step"] for r in rows if "seconds_count" in r] == [1, 3]
    with pytest.raises(TypeError, match="no every"):
        hooks.as_hook(types.SimpleNamespace(name="x"))


OWN_OBJECTIVE = """
import jax.numpy as jnp
from dmpo_jax import config, objectives

@objectives.objective(
    needs_reference=True,
    needs_rejected=True,
    beta=objectives.Hyperparameter(2000.0, "steepness", "(0, inf)"),
)
def slic(policy, reference, target, preference, *, beta):
    return jnp.logaddexp(0.0, 1 - beta * objectives.margin(policy, reference, target))

def get_config():
    return config.from_flat({VALUES})
"""


@pytest.mark.long
def test_a_config_file_adds_an_objective_and_trains_with_it(made, tmp_path, monkeypatch):
    """No file of the package is changed."""
    monkeypatch.setattr(
        training_step, "COMPILER_OPTIONS", {**training_step.COMPILER_OPTIONS, **EXACT}
    )
    leaves = {"train__steps": 1, "log__validate_every": 0}
    values = configs.flatten(tiny.make_config(*made, **leaves)) | {"objective": "slic"}
    file = tmp_path / "own.py"
    file.write_text(OWN_OBJECTIVE.replace("{VALUES}", repr(values)))
    try:
        config = load_config(str(file))
        assert "objectives.slic.beta=2000.0" in reference.describe()
        assert "steepness; above 0" in reference.describe()
        config_checks.validate(config)
        run(config, tmp_path / "run")
        assert lines(tmp_path / "run")[-1]["loss"] == pytest.approx(np.log1p(np.e), rel=1e-5)
        load_config(str(file)).objectives.slic.beta = 3.0  # the file may be read again
        config.objectives.slic.beta = -1.0
        with pytest.raises(ValueError, match=r"objectives\.slic: beta must be .* got beta=-1.0"):
            config_checks.validate(config)
    finally:
        OBJECTIVES.pop("slic", None)
    # Its checkpoint is converted where the objective is not known.
    convert(workdir=tmp_path / "run", out=tmp_path / "converted")
    assert (tmp_path / "converted" / "model_index.json").exists()


@pytest.fixture
def broken_model(made, tmp_path):
    """The tiny model with one weight so large that every loss is NaN."""
    model = diffusers_io.load_model(made[0])
    model.proj_out.bias[...] = model.proj_out.bias[...].at[0].set(3e38)
    diffusers_io.save_pipeline(model, made[0], tmp_path / "broken")
    return str(tmp_path / "broken")


def test_a_non_finite_loss_stops_the_job_and_saves_nothing(made, broken_model, tmp_path):
    with pytest.raises(watch.NonFiniteError, match="update 1: loss nan"):
        run(tiny.make_config(broken_model, made[1]), tmp_path / "run")
    saved = tmp_path / "run" / "checkpoints"
    assert [p.name for p in saved.iterdir() if p.is_dir()] == []
    assert not (tmp_path / "run" / "export").exists()


def test_skipped_updates_are_counted_up_to_the_limit(made, broken_model, tmp_path):
    config = tiny.make_config(broken_model, made[1], train__skip_limit=3)
    with pytest.raises(watch.NonFiniteError, match=r"update 4: .* number 4, above .*=3"):
        run(config, tmp_path / "run")


def test_refusals_come_before_compiling(made, tmp_path, monkeypatch):
    model, encoded = made

    def compiled(*args, **kw):
        raise AssertionError("compiled")

    monkeypatch.setattr(training_step, "jit_train_step", compiled)
    cases = {
        "must be a multiple of": {"train__batch_size": 12},
        "mesh has 8 devices": {"mesh__fsdp": 3},
        "does not exist": {"model__folder": str(tmp_path / "nowhere")},
        "no encoded pairs": {"data__encoded": str(tmp_path / "nowhere")},
    }
    for words, change in cases.items():
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            run(tiny.make_config(model, encoded, **change), tmp_path / "run")


def test_pairs_of_another_model_are_refused(made, tmp_path):
    outside_family.write(tmp_path / "other", text_width=24)
    with pytest.raises(ValueError, match="context of width 24, the encoded prompts have 32"):
        run(tiny.make_config(str(tmp_path / "other"), made[1]), tmp_path / "run")


def test_convert_any_step(uninterrupted, tmp_path):
    convert(workdir=uninterrupted, out=tmp_path / "last")
    ours = state_dict(tmp_path / "last")
    for name, array in weights(uninterrupted).items():
        np.testing.assert_array_equal(ours[name], array)
    convert(workdir=uninterrupted, out=tmp_path / "four", at=4)
    four = state_dict(tmp_path / "four")
    assert any(not np.array_equal(four[name], ours[name]) for name in ours)
    with pytest.raises(ValueError, match=r"no checkpoint 5 .* \[2, 4, 6\]"):
        convert(workdir=uninterrupted, out=tmp_path / "five", at=5)


# --- killed processes ---------------------------------------------------------


LONG = {"train__steps": 400, "log__checkpoint_every": 25, "log__validate_every": 0}


def start(made, workdir, **leaves) -> launched.Job:
    return launched.Job(made, workdir, count=1, devices=1, **{**LONG, **leaves})


@pytest.mark.long
def test_sigterm_saves_and_resumes(made, tmp_path):
    workdir = tmp_path / "run"
    with start(made, workdir) as job:
        job.wait_for_step(30)
        job.processes[0].send_signal(signal.SIGTERM)
        ((status, said),) = job.end(120)
    assert status == 128 + signal.SIGTERM, said
    assert "the same command resumes" in said
    stopped = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.is_dir())
    assert f"stopped at step {stopped}" in said
    with start(made, workdir, train__steps=stopped + 5) as job:
        ((status, said),) = job.end(300)
    assert status == 0, said
    assert f"resuming from step {stopped}" in said
    steps = [row["step"] for row in lines(workdir)]
    assert steps == list(range(1, stopped + 6))


@pytest.mark.slow
def test_killed_at_ten_random_moments(made, tmp_path):
    whole, broken = tmp_path / "a" / "run", tmp_path / "b" / "run"
    with start(made, whole) as job:
        ((status, said),) = job.end(600)
    assert status == 0, said
    assert (whole / "export").exists()
    moments = random.Random(0)
    kills = 0
    for step in sorted(moments.sample(range(10, 390), 10)):
        with start(made, broken) as job:
            job.wait_for_step(step)
            time.sleep(moments.random() * 0.05)
        kills += job.processes[0].returncode == -signal.SIGKILL
    with start(made, broken) as job:
        assert job.end(600)[0][0] == 0
    assert kills == 10
    assert_same_run(broken, whole)
