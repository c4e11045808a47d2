"""Tests for dmpo_jax/jobs: all jobs are checked before the first starts; leaves are passed on."""

import json
import re

import jax
import pytest

from dmpo_jax.config import arguments
from dmpo_jax.config.configs import from_flat
from dmpo_jax.data.encoded.meta import EncodedMeta
from dmpo_jax.errors import UserError
from dmpo_jax.evaluation import drawing
from dmpo_jax.jobs import collect, encode, evaluate
from dmpo_jax.jobs import run as jobs_run
from dmpo_jax.jobs.run import run
from dmpo_jax.sampling.sampler import Sampler
from dmpo_jax.toy.digits import PIPELINE

DIGITS = {
    "model.folder": str(PIPELINE),
    "sample.prompts": str(PIPELINE / "prompts.txt"),
    "collect.scorer": "digits_svm",
    "evaluate.judges": ("digits_svm", "digits_forest"),
}


VAE = str(PIPELINE / "vae")


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
        ({"evaluate.judges": ("taste",)}, "scorer 'taste' is unknown; there are .*digits_forest"),
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jobs": ("foo",)}, "jobs must be some of collect, encode, train, evaluate, but got"),
        ({"model.folder": ""}, "model.folder must be"),
        ({"train.batch_size": 3, "train.accumulation": 2}, "must be a multiple"),
    ],
)
def test_a_call_from_python_is_checked_as_the_command_is(changes, message, started, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(from_flat({**DIGITS, **changes}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_is_a_file_is_refused(started, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="workdir must be a folder that can be made"):
        run(from_flat(DIGITS), tmp_path / "file")


def test_out_of_memory_says_what_to_change(monkeypatch, tmp_path):
    def fail(*given):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: used 21.50G of 16G")

    monkeypatch.setattr(jobs_run.train, "check", lambda *given: None)
    monkeypatch.setattr(jobs_run.train, "train", fail)
    config = from_flat({**DIGITS, "train.batch_size": 64, "train.accumulation": 2})
    with pytest.raises(UserError) as said:
        run(config, tmp_path / "run")
    for words in (
        "of 23.1 GB",
        "--config.train.accumulation=4",
        "--config.model.remat=transformer",
        "--config.mesh.fsdp=-1",
        "--config.optimizer.name=adamw_bf16",
        "--config.lora.rank=",
        "--config.train.batch_size below 64",
    ):
        assert words in str(said.value)
    leaner = {"model.remat": "transformer", "lora.rank": 4, "optimizer.name": "adafactor"}
    leaner |= {"mesh.data": 1, "mesh.fsdp": -1}
    with pytest.raises(UserError) as said:  # one pair on each of 8 devices
        run(from_flat({**DIGITS, **leaner, "train.batch_size": 8}), tmp_path / "run")
    assert not re.search("remat|lora|accumulation|optimizer|fsdp", str(said.value))


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
def test_a_judge_that_cannot_judge_ends_it_before_an_image_is_drawn(job, monkeypatch, tmp_path):
    class Undrawn(Sampler):
        def __init__(self):
            self.size, self.batch_size = (30, 30), 8

        def batches(self, *given):
            raise AssertionError("drawn")

    module = {"collect": collect, "evaluate": evaluate}[job]
    given = {"a": PIPELINE, "b": PIPELINE} if job == "evaluate" else {}
    opens = {"collect": collect, "evaluate": drawing}[job]
    monkeypatch.setattr(opens, "open_sampler", lambda *_, **kw: (Undrawn(), dict))
    with pytest.raises(UserError, match="cannot judge images of 30 x 30"):
        getattr(module, job)(from_flat(DIGITS), out=tmp_path, **given)


@pytest.mark.parametrize("job", ["collect", "evaluate"])
def test_vae_and_sampler_reach_what_is_drawn(job, monkeypatch, tmp_path):
    config = from_flat({**DIGITS, "model.vae": VAE, "sample.sampler": "euler"})
    asked = {}

    class ReachedError(Exception):
        pass

    def open_sampler(folder, **kw):
        asked.update(kw)
        raise ReachedError

    module, opens, given = {
        "collect": (collect, collect, {}),
        "evaluate": (evaluate, drawing, {"a": PIPELINE, "b": PIPELINE}),
    }[job]
    monkeypatch.setattr(opens, "open_sampler", open_sampler)
    with pytest.raises(ReachedError):
        getattr(module, job)(config, out=tmp_path, **given)
    assert asked == arguments.drawing(config)
    assert (asked["vae"], asked["sampler"]) == (VAE, "euler")


def test_every_leaf_of_sample_that_draws_is_passed_on():
    """No drift between commands: what is drawn is a function of all of these."""
    elsewhere = {"images_per_prompt", "prompts", "count", "vae_dtype"}
    config = from_flat({})
    assert set(arguments.sampling(config)) == set(config.sample) - elsewhere


def test_the_end_of_an_encode_says_how_much_there_is():
    shapes = {"moments": {"shape": [2, 4, 4, 8], "dtype": "float32"}}
    shapes["context"] = {"shape": [8, 4], "dtype": "float16"}
    about = {"model": "m", "scaling_factor": 1.0, "shapes": shapes, "format": 3}
    about["counts"] = {"train": 52, "validation": 5, "prompts": 11}
    plain = EncodedMeta.from_json(about)
    words = "52 pairs to train on and 5 for validation, of 11 prompts; skipped: "
    assert encode.described(plain) == words + "none"
    some = EncodedMeta.from_json({**about, "skipped": {"no image": 2, "bad label": 1}})
    assert encode.described(some) == words + "2 no image, 1 bad label"
