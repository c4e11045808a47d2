"""Tests for evaluate through its job: resumed = unbroken, what fails is named, work is kept."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from dmpo_jax import scoring
from dmpo_jax.config.configs import from_flat
from dmpo_jax.config.protocols import with_protocol
from dmpo_jax.data.prompt_files import Prompt
from dmpo_jax.errors import UserError
from dmpo_jax.evaluation import scores as scores_module
from dmpo_jax.evaluation.models import Model, find_images, list_models
from dmpo_jax.jobs import evaluate as job
from dmpo_jax.scoring import named
from tests.support import launched, outside_family
from tests.support.drawn import Killed, contents, quickly

LEAVES = {
    "model.compute_dtype": "float32",
    "sample.steps": 2,
    "sample.guidance_scale": 1.0,
    "sample.batch_size": 8,
    "evaluate.images_per_prompt": 3,
    "evaluate.judges": ("light", "left"),
}


class Light:
    """Mean brightness, of the image or of its left half."""

    version, temperature, uses_prompt = "1", None, False

    def __init__(self, name, columns):
        self.name, self.columns, self.asked = name, columns, 0
        self.fails_at, self.gives = None, None

    def check(self, prompts):
        if "unjudgeable" in prompts:
            raise UserError("'unjudgeable' cannot be judged")

    def __call__(self, images, prompts):
        assert len(images) == len(prompts)
        found = images[:, :, : self.columns].mean((1, 2, 3), dtype=np.float32)
        before, self.asked = self.asked, self.asked + len(images)
        if self.fails_at is not None and before <= self.fails_at < self.asked:
            if isinstance(self.gives, BaseException):
                raise self.gives
            found = self.gives(found, self.fails_at - before)
        return found


@pytest.fixture
def judges(monkeypatch):
    made = {"light": Light("light", 999), "left": Light("left", 16)}
    for name, judge in made.items():
        monkeypatch.setitem(named.SCORERS, name, lambda judge=judge: judge)
    return made


@pytest.fixture
def prompts(tmp_path):
    words = ("one", "two", "three", "four", "five", "six", "seven")
    rows = [
        {"prompt": f"a handwritten {word}", "category": "odd" if i % 2 else "even"}
        for i, word in enumerate(words)
    ]
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    return tmp_path / "prompts.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    with outside_family.registered():
        yield pathlib.Path(outside_family.write(tmp_path_factory.mktemp("models") / "base"))


@pytest.fixture
def other(base):
    """Another model with the same parts."""
    found = base.with_name("other")
    return found if found.exists() else shutil.copytree(base, found)


@pytest.fixture
def run(base, monkeypatch):
    """Evaluates with models that compile nothing; `run.batches` are those drawn."""
    batches, switch = quickly(monkeypatch)

    def run(prompts, out, b, scores=(), **changes):
        config = from_flat({**LEAVES, **changes})
        return job.evaluate(config, a=base, b=b, prompts=prompts, out=out, scores=scores)

    run.batches, run.switch = batches, switch
    return run


@pytest.mark.long
def test_killed_at_any_point_it_ends_with_the_same_bytes(
    run, monkeypatch, prompts, other, judges, tmp_path
):
    batches, switch = run.batches, run.switch
    run(prompts, tmp_path / "whole", other)
    unbroken, judged = len(batches), judges["light"].asked
    assert unbroken == 6
    whole = contents(tmp_path / "whole")
    for at in (0, 3):
        batches.clear()
        switch["at"] = at
        with pytest.raises(Killed):
            run(prompts, tmp_path / f"drawing{at}", other)
        switch["at"] = None
        run(prompts, tmp_path / f"drawing{at}", other)
        assert len(batches) == unbroken
        assert contents(tmp_path / f"drawing{at}") == whole
    monkeypatch.setattr(scores_module, "IMAGES_A_PART", 6)
    run(prompts, tmp_path / "parts", other)
    for at in (3, 30):
        judge = judges["left"]
        judge.asked, judge.fails_at, judge.gives = 0, at, Killed()
        with pytest.raises(Killed):
            run(prompts, tmp_path / f"scoring{at}", other)
        before, judge.fails_at = judge.asked, None
        run(prompts, tmp_path / f"scoring{at}", other)
        rehearsed = 2 * 7  # on blank images, at each start
        assert judge.asked - rehearsed <= 42 + 6  # a part at most is scored twice
        assert before > 0
        assert contents(tmp_path / f"scoring{at}") == contents(tmp_path / "parts")
    assert judged == 7 + 42


def test_the_result_compares_by_prompt_and_category(run, prompts, other, judges, tmp_path):
    result = run(prompts, tmp_path / "out", other)
    assert result == json.loads((tmp_path / "out" / "result.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "out/images.jsonl").read_text().splitlines()]
    assert len(rows) == 21
    wins = {row["prompt"]: [] for row in rows}
    for row in rows:
        assert set(row["images"]) == {"base", "policy"}
        with Image.open(tmp_path / "out" / row["images"]["policy"]) as image:
            mean = np.asarray(image, np.float32).mean()
        score = row["scores"]["light"]
        assert abs(score["policy"] - mean) < 1e-2
        wins[row["prompt"]].append((np.sign(score["policy"] - score["base"]) + 1) / 2)
    entry = result["comparisons"]["policy"]["overall"]["light"]
    assert entry == result["judges"]["light"]
    assert entry["win_rate"] == pytest.approx(np.mean([np.mean(w) for w in wins.values()]))
    assert (entry["prompts"], entry["images_per_prompt"]) == (7, 3)
    parts = result["comparisons"]["policy"]["categories"]
    assert {name: part["left"]["prompts"] for name, part in parts.items()} == {"even": 4, "odd": 3}
    assert result["scorers"]["light"]["primary"]
    assert not result["scorers"]["left"]["primary"]
    assert set(result["diversity"]) == {"base", "policy"}
    protocol = result["protocol"]
    for name in ("steps", "guidance_scale", "dtype", "seed", "vae_dtype", "noise", "jax"):
        assert name in protocol
    assert {"weights", "encoders", "sampler", "scheduler"} <= set(protocol["models"]["base"])


@pytest.mark.long
def test_images_of_others_several_models_and_given_scores(run, prompts, other, judges, tmp_path):
    """Folders of images beside a pipeline; scores of another program join ours."""
    batches = run.batches
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for i in range(21):  # prompt after prompt, of another size
        Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)).save(theirs / f"image_{i}.webp")
    first = run(prompts, tmp_path / "out", f"ours={other},theirs={theirs}")
    assert set(first["comparisons"]) == {"ours", "theirs"}
    drawn, asked = len(batches), judges["left"].asked
    rows = [json.loads(line) for line in (tmp_path / "out/images.jsonl").read_text().splitlines()]
    assert rows[8]["images"]["theirs"].endswith("image_4.webp")  # prompt 1, its second
    given = tmp_path / "hps.jsonl"
    lines = [
        json.dumps({"image": path, "score": len(path) + i})
        for i, row in enumerate(rows)
        for path in row["images"].values()
    ]
    given.write_text("\n".join(lines))
    models = f"ours={other},theirs={theirs}"
    again = run(prompts, tmp_path / "out", models, scores=[f"hpsv3:{given}"])
    assert len(batches) == drawn
    assert judges["left"].asked == asked + 7  # the rehearsal: nothing is scored again
    assert again["judges"]["light"]["win_rate"] == first["judges"]["light"]["win_rate"]
    assert "hpsv3" in again["judges"]
    for text, message in (
        ("\n".join(lines[1:]), r"--scores=hpsv3 has no score of images/base/00000\.png"),
        ('{"image": "x"}', r"hps\.jsonl, row 1 should be"),
        (lines[0] + "\n" + lines[0], "row 2 should be .* each image once"),
        ('{"image": "x", "score": NaN}', "row 1 should be"),
    ):
        given.write_text(text)
        with pytest.raises(UserError, match=message):
            run(prompts, tmp_path / "out", models, scores=[f"hpsv3:{given}"])


def set_nan(found, i):
    found[i] = np.nan
    return found


@pytest.mark.long
@pytest.mark.parametrize(
    ("gives", "message"),
    [
        (set_nan, r"'left' gave the score nan to image .*00005\.png \(prompt 'a handwritten six"),
        (lambda found, i: found[:-1], r"should give \d+ scores .* but gave an array of shape"),
        (ZeroDivisionError("broken"), r"'left' failed at image .*ZeroDivisionError: broken"),
    ],
)
def test_what_a_scorer_does_wrong_names_an_image_and_keeps_the_rest(
    gives, message, run, monkeypatch, prompts, other, judges, tmp_path
):
    monkeypatch.setattr(scores_module, "IMAGES_A_PART", 3)
    judge = judges["left"]
    judge.fails_at, judge.gives = 7 + 15, gives  # after the rehearsal
    with pytest.raises(UserError, match=message):
        run(prompts, tmp_path / "out", other)
    kept = list((tmp_path / "out" / "scores" / "base" / "left").iterdir())
    assert len(kept) == 5
    judge.fails_at = None
    run(prompts, tmp_path / "out", other)
    assert judge.asked <= 2 * 7 + 42 + 3


def test_a_damaged_image_is_named(run, prompts, other, judges, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for i in range(21):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(theirs / f"{i}.png")
    result = run(prompts, tmp_path / "out", theirs)  # of another size than the base's
    assert result["models"]["policy"] == {"folder": str(theirs)}
    (theirs / "7.png").write_bytes((theirs / "7.png").read_bytes()[:40])
    with pytest.raises(UserError, match=r"7\.png cannot be read"):
        run(prompts, tmp_path / "out", theirs)
    (theirs / "7.png").unlink()
    with pytest.raises(UserError, match=r"holds 20 images .* need 21"):
        run(prompts, tmp_path / "out2", theirs)


def test_faults_are_found_before_anything_is_drawn(run, prompts, other, judges, tmp_path):
    batches = run.batches
    lone = {"evaluate.estimand": "these", "evaluate.images_per_prompt": 1}
    sdpo = {"evaluate.protocol": "sdpo", "sample.steps": 20}
    for changes, b, message in (
        ({"evaluate.judges": ("taste",)}, other, "'taste' is unknown"),
        ({}, tmp_path / "nowhere", "nowhere"),
        ({}, f"x={other},x={other}", "two models are called 'x'"),
        (lone, other, "there is one of each"),
        (sdpo, other, "sets sample.steps to 50, but it is 20"),
    ):
        with pytest.raises(UserError, match=message):
            run(prompts, tmp_path / "out", b, **changes)
    prompts.write_text(json.dumps(["unjudgeable"]))
    with pytest.raises(UserError, match="cannot be judged"):
        run(prompts, tmp_path / "out", other)
    assert batches == []


def test_a_shared_noise_is_one_for_all_prompts(run, prompts, other, judges, tmp_path):
    shared = {"evaluate.noise": "shared", "evaluate.images_per_prompt": 2}
    result = run(prompts, tmp_path / "out", other, **shared)
    first, second = run.batches[:2]
    assert len(set(first[:7])) == 1
    assert {first[7], *second[:6]} == {first[0] + 1}
    assert result["protocol"]["noise"] == "shared"


def test_a_protocol_sets_what_published_scores_were_measured_with():
    config = with_protocol(from_flat({"evaluate.protocol": "sdpo"}))
    sample = config.sample
    assert (sample.sampler, sample.steps, sample.guidance_scale) == ("euler", 50, 8.5)
    assert (sample.vae_dtype, config.evaluate.noise) == ("float32", "shared")
    same = from_flat({"evaluate.protocol": "sdpo", "sample.steps": 50})
    assert with_protocol(same).sample.steps == 50


def test_models_get_names(tmp_path):
    runs = [tmp_path / "dpo" / "export", tmp_path / "dmpo" / "export"]
    found = list_models("base-folder", [str(path) for path in runs])
    assert [model.name for model in found] == ["base", "dpo", "dmpo"]
    assert [model.name for model in list_models("a", "b")] == ["base", "policy"]
    named = list_models("x=org/model", "y=org/other@main,z=runs/q=1/export")
    assert [(model.name, model.folder) for model in named] == [
        ("x", "org/model"),
        ("y", "org/other@main"),
        ("z", "runs/q=1/export"),
    ]
    assert list_models("a", "runs/q=1/export")[1].folder == "runs/q=1/export"


def test_lists_of_images_are_by_prompt(tmp_path):
    """The hub's metadata.jsonl; a prompt that is asked twice takes other images."""
    rows = [("a", "b"), ("b", "a"), ("c", "b"), ("d", "b")]
    lines = [json.dumps({"file_name": f"{file}.png", "text": text}) for file, text in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    for file, _ in rows:
        (tmp_path / f"{file}.png").write_bytes(b"")
    model = Model("m", str(tmp_path), False)
    asked = [Prompt("b"), Prompt("a"), Prompt("b")]
    assert [file.name for file in find_images(model, asked, 1)] == ["a.png", "b.png", "c.png"]
    with pytest.raises(UserError, match="lists 3 images of 'b', but 4"):
        find_images(model, [Prompt("b")], 4)
    (tmp_path / "c.png").unlink()
    with pytest.raises(UserError, match=r"lists .*c\.png, which is not there"):
        find_images(model, asked, 1)


def test_scorers_of_one_name_are_refused(judges):
    with pytest.raises(UserError, match="two scorers are called 'left'"):
        scoring.make_scorers(["left", "left"])


PROCESSES = """
import sys
from dmpo_jax import families
from dmpo_jax.config.configs import from_flat
from dmpo_jax.jobs.collect import collect
from dmpo_jax.jobs.evaluate import evaluate
from dmpo_jax.parallel import processes
from tests.support import launched, outside_family

base, other, prompts, out = sys.argv[1:]
processes.join_and_quiet()
families.register(outside_family.FAMILY)
leaves = {
    "model.folder": base, "model.compute_dtype": "float32", "sample.steps": 2,
    "sample.guidance_scale": 1.0, "sample.batch_size": 4, "evaluate.images_per_prompt": 3,
    "evaluate.judges": ("brightness", "contrast"), "collect.scorer": "contrast",
    "collect.pairs": 9, "collect.temperature": 10.0,
}
config = from_flat(leaves)
evaluate(config, a=base, b=other, prompts=prompts, out=out)
collect(config, prompts=prompts, out=out)
"""


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(base, other, prompts, tmp_path):
    """Real processes, each with one device: images, scores, result, page and pairs."""
    for count in (1, 2):
        out = tmp_path / str(count)
        launched.run_script(PROCESSES, base, other, prompts, out, count=count, timeout=400)
    assert contents(tmp_path / "2") == contents(tmp_path / "1")
    assert (tmp_path / "1" / "pairs.parquet").exists()
