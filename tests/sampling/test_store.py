"""Tests for the store of drawn images: resumed = unbroken, many processes = one, refusals."""

import json

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath

from dmpo_jax.config import arguments
from dmpo_jax.config.configs import from_flat
from dmpo_jax.data.prompt_files import load_prompts
from dmpo_jax.errors import UserError
from dmpo_jax.jobs import collect, sample
from dmpo_jax.jobs.verify import verify
from dmpo_jax.sampling import sampler as samplers
from dmpo_jax.sampling import store
from dmpo_jax.sampling.gallery import Pngs
from dmpo_jax.toy.digits import PIPELINE
from tests.support.drawn import Killed, contents, quickly

LEAVES = {
    "model.folder": str(PIPELINE),
    "model.compute_dtype": "float32",
    "sample.steps": 2,
    "sample.guidance_scale": 1.0,
    "sample.batch_size": 8,
    "sample.images_per_prompt": 3,
    "collect.scorer": "digits_svm",
    "collect.pairs": 19,
}


@pytest.fixture
def prompts(tmp_path):
    words = ("one", "two", "three", "four", "five", "six", "seven")
    (tmp_path / "prompts.txt").write_text("".join(f"a handwritten {word}\n" for word in words))
    return tmp_path / "prompts.txt"


def run(job, prompts, out, **changes):
    job(from_flat({**LEAVES, **changes}), prompts=prompts, out=out)


JOBS = {"sample": sample.sample, "collect": collect.collect}


@pytest.mark.long
@pytest.mark.parametrize("name", JOBS)
def test_a_killed_job_ends_with_the_same_bytes_and_draws_only_what_is_missing(
    name, monkeypatch, prompts, tmp_path
):
    batches, switch = quickly(monkeypatch)
    run(JOBS[name], prompts, tmp_path / "whole")
    unbroken = len(batches)
    for at in (1, 2):
        batches.clear()
        switch["at"] = at
        with pytest.raises(Killed):
            run(JOBS[name], prompts, tmp_path / f"killed{at}")
        switch["at"] = None
        run(JOBS[name], prompts, tmp_path / f"killed{at}")
        assert len(batches) == unbroken  # a batch drawn is a batch kept
        assert contents(tmp_path / f"killed{at}") == contents(tmp_path / "whole")
    batches.clear()
    run(JOBS[name], prompts, tmp_path / "whole")
    assert batches == []


def test_two_processes_draw_the_files_of_one(monkeypatch, prompts, tmp_path):
    batches, _ = quickly(monkeypatch)
    how = arguments.drawing(from_flat(LEAVES))
    sampler, load = samplers.open_sampler(PIPELINE, **how)
    asked = load_prompts(prompts) * 5
    about = store.describe(PIPELINE, sampler, how)
    drawing = store.Drawing(sampler, load, asked, list(range(len(asked))), about)

    def draw(index, count, out):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "process_count", lambda: count)
            patch.setattr(jax, "process_index", lambda: index)
            patch.setattr(store.processes, "barrier", lambda _: None)
            store.draw(out, drawing, Pngs(out, drawing, {}), "drawing")

    draw(0, 1, epath.Path(tmp_path / "one"))
    alone = sorted(batches)
    batches.clear()
    for index in (0, 1, 2):
        draw(index, 3, epath.Path(tmp_path / "three"))
    assert sorted(batches) == alone
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


@pytest.mark.long
def test_another_drawing_is_refused_with_what_differs(monkeypatch, prompts, tmp_path):
    quickly(monkeypatch)
    run(sample.sample, prompts, tmp_path / "out")
    before = contents(tmp_path / "out")
    for changes, message in (
        ({"sample.steps": 3}, "steps 2 there, 3 asked"),
        ({"seed": 5}, "images '"),
        ({"sample.height": 64}, "height 32 there, 64 asked"),
        ({"model.attention": "splash"}, "attention None there, 'splash' asked"),
    ):
        with pytest.raises(UserError, match=f"another drawing.*{message}.*choose another folder"):
            run(sample.sample, prompts, tmp_path / "out", **changes)
    prompts.write_text("a handwritten nine\n" * 7)
    with pytest.raises(UserError, match="another drawing"):
        run(sample.sample, prompts, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_files_of_others_are_not_overwritten(monkeypatch, prompts, tmp_path):
    quickly(monkeypatch)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "00003.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"holds 00003\.png, but no valid drawn\.json"):
        run(sample.sample, prompts, tmp_path / "out")
    assert (tmp_path / "out" / "00003.png").read_bytes() == b"mine"


def test_the_list_names_every_image(monkeypatch, prompts, tmp_path):
    quickly(monkeypatch)
    run(sample.sample, prompts, tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out/images.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == [f"{i:05}.png" for i in range(21)]
    assert rows[3]["prompt"] == "a handwritten two"
    assert [row["seed"] for row in rows] == list(range(21))


def test_collected_pairs_hold_scores_and_what_the_model_was_given(monkeypatch, prompts, tmp_path):
    quickly(monkeypatch)
    run(
        collect.collect,
        prompts,
        tmp_path / "out",
        **{"collect.labels": "probability", "collect.temperature": 1.0},
    )
    assert [path.name for path in epath.Path(tmp_path / "out").iterdir()] == ["pairs.parquet"]
    table = pq.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()
    assert len(table) == 19
    assert [row["caption"] for row in table[:8]][-1] == "a handwritten one"  # prompts in turn
    for row in table:
        assert row["scorer"] == "digits_svm"
        odds = 1 / (1 + np.exp(row["score_1"] - row["score_0"]))
        assert abs(row["label_0"] - odds) < 1e-6


def test_verify_reads_every_image(monkeypatch, prompts, tmp_path):
    quickly(monkeypatch)
    run(sample.sample, prompts, tmp_path / "out")
    assert len(verify(folder=tmp_path / "out")) == 22
    image = tmp_path / "out" / "00004.png"
    image.write_bytes(image.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"00004\.png: image .* cannot be read"):
        verify(folder=tmp_path / "out")
    image.unlink()
    with pytest.raises(UserError, match="1 of 21 images are not drawn"):
        verify(folder=tmp_path / "out")
