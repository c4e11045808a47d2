"""Tests for dmpo_jax/jobs: all jobs are checked before the first starts; leaves are passed on."""

import json

import pytest

from dmpo_jax.config import arguments
from dmpo_jax.config.configs import from_flat
from dmpo_jax.jobs import collect, encode, evaluate
from dmpo_jax.jobs import run as jobs_run
from dmpo_jax.jobs.run import run
from dmpo_jax.toy.digits import PIPELINE

DIGITS = {
    "model.folder": str(PIPELINE),
    "sample.prompts": str(PIPELINE / "prompts.txt"),
    "collect.scorer": "digits_svm",
    "evaluate.judges": ("digits_svm", "digits_forest"),
}


@pytest.fixture
def started(monkeypatch):
    """The jobs that started: each of them does nothing else."""
    names = []
    for module, name in (
        (collect, "collect"),
        (encode, "encode"),
        (jobs_run.train, "train"),
        (evaluate, "evaluate"),
    ):
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: names.append(name))
    return names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate.judges": ("taste",)}, "scorer 'taste' is unknown; there are digits_forest"),
        ({"sample.prompts": "lost.txt"}, "prompts file lost.txt does not exist"),
        ({"sample.prompts": "PROMPTS"}, "'a cat' names 0 digits"),
        ({"model.folder": "MODEL"}, "supported pipelines"),
    ],
)
def test_what_the_last_job_lacks_is_said_before_the_first(changes, message, started, tmp_path):
    (tmp_path / "prompts.txt").write_text("a handwritten two\na cat\n")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "OtherPipeline"}))
    made = {"PROMPTS": str(tmp_path / "prompts.txt"), "MODEL": str(tmp_path)}
    changes = {path: made.get(value, value) for path, value in changes.items()}
    config = from_flat({**DIGITS, "jobs": ("encode", "train", "evaluate"), **changes})
    with pytest.raises(ValueError, match=message):
        run(config, tmp_path / "run")
    assert started == []


def test_the_jobs_run_in_order_once_all_are_checked(started, tmp_path):
    jobs = ("collect", "encode", "train", "evaluate")
    run(from_flat({**DIGITS, "jobs": jobs}), tmp_path / "run")
    assert started == list(jobs)


def test_a_source_of_no_kind_is_refused_before_collecting(started, tmp_path):
    changes = {"jobs": ("collect", "encode"), "data.source": "parquet:x"}
    with pytest.raises(ValueError, match="KIND one of hf, pickapic"):
        run(from_flat({**DIGITS, **changes}), tmp_path / "run")
    assert started == []


@pytest.mark.parametrize("job", ["collect", "evaluate"])
def test_vae_and_sampler_reach_what_is_drawn(job, monkeypatch, tmp_path):
    config = from_flat({**DIGITS, "model.vae": "other-vae", "sample.sampler": "euler"})
    asked = {}

    class ReachedError(Exception):
        pass

    def open_sampler(folder, **kw):
        asked.update(kw)
        raise ReachedError

    module, given = {
        "collect": (collect, {}),
        "evaluate": (evaluate, {"a": PIPELINE, "b": PIPELINE}),
    }[job]
    monkeypatch.setattr(module, "open_sampler", open_sampler)
    with pytest.raises(ReachedError):
        getattr(module, job)(config, out=tmp_path, **given)
    assert asked == {**arguments.pipeline(config), **arguments.sampling(config)}
    assert (asked["vae"], asked["sampler"]) == ("other-vae", "euler")


def test_every_leaf_of_sample_that_draws_is_passed_on():
    """No drift between commands: what is drawn is a function of all of these."""
    elsewhere = {"images_per_prompt", "prompts", "count"}
    config = from_flat({})
    assert set(arguments.sampling(config)) == set(config.sample) - elsewhere
