"""Refusals and warnings before a run begins, and the output of a dry run."""

import json
import pathlib

import numpy as np
import pytest

from dmpo_jax.config import checks, configs, parsing
from dmpo_jax.config.recipes import RECIPES
from dmpo_jax.jobs.run import run
from dmpo_jax.toy.digits import PIPELINE
from dmpo_jax.training.checkpoint import check_identity
from tests.support.encoded import EncodedPair, PromptEmbedding, write_pairs

SD15 = 860_000_000  # parameters


def config_of(**leaves):
    flat = configs.flatten(configs.defaults()) | {"model.folder": "somewhere"}
    return configs.from_flat(flat | {k.replace("__", "."): v for k, v in leaves.items()})


def advice(pairs=10**6, parameters=SD15, **leaves) -> str:
    return "\n".join(checks.advice(config_of(**leaves), pairs, parameters))


def test_a_warmup_longer_than_the_run_is_said():
    assert "the learning rate ends at 40% of its peak" in advice(train__steps=200)
    assert not advice(train__steps=500)


def test_fewer_pairs_than_a_batch_are_said():
    assert "train.batch_size=2048 is more than the 57 pairs there are" in advice(pairs=57)


def test_a_rate_far_from_the_published_a_pair_is_said():
    assert "512 times the published 1e-08" in advice(train__batch_size=4)
    assert "times the published 1e-09" in advice(optimizer__learning_rate=1e-9)
    assert not advice(parameters=1_000_000, train__batch_size=4)  # small models take more
    assert not advice(train__batch_size=4, lora__rank=8)
    for name, recipe in RECIPES.items():
        assert not advice(**{k.replace(".", "__"): v for k, v in recipe.leaves.items()}), name


@pytest.mark.parametrize("seed", ["-1", "2147483648", "3000000000"])
@pytest.mark.parametrize("command", ["evaluate", "sample", "collect", "train", "encode"])
def test_a_seed_is_in_one_range_in_every_command(seed, command):
    from dmpo_jax.commands import COMMANDS

    with pytest.raises(ValueError, match=r"seed must be in \[0, 2147483648\), but got"):
        parsing.parse(
            ["x", f"--config.seed={seed}", "--config=digits_dmpo"], COMMANDS[command].interface
        )
    assert configs.declared()["seed"].fits(31337)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"jobs": ("train", "evaluate")}, "the evaluate job needs prompts"),
        (
            {"jobs": ("train", "evaluate"), "sample__prompts": "x"},
            "needs evaluate.judges or collect.scorer",
        ),
        ({"jobs": ("collect", "train"), "collect__scorer": "x"}, "the collect job needs prompts"),
    ],
)
def test_what_a_later_job_lacks_is_refused_in_words(changes, words):
    with pytest.raises(ValueError, match=words):
        checks.validate(config_of(**changes))


def test_a_missing_folder_of_pairs_is_said_before_another_job(tmp_path):
    config = config_of(model__folder=str(PIPELINE), jobs=("train",), train__batch_size=8)
    with pytest.raises(ValueError, match="no encoded pairs"):
        run(config, tmp_path / "run")


def test_a_start_that_failed_does_not_claim_its_folder(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "identity.json").write_text(json.dumps({"optimizer": {"learning_rate": 1e30}}))
    check_identity(folder, {"optimizer": {"learning_rate": 1e-5}})
    (folder / "4").mkdir()
    with pytest.raises(ValueError, match=r"learning_rate: 1e\+30 there, 1e-05 now"):
        check_identity(folder, {"optimizer": {"learning_rate": 1e-5}})


# --- --dry_run ------------------------------------------------------------------


def dry(config, workdir, capsys, **kw) -> tuple[int, str]:
    """(exit status, what was printed)"""
    try:
        run(config, workdir, dry_run=True, **kw)
        status = 0
    except SystemExit as error:
        status = error.code
    return status, capsys.readouterr().out


def files(folder) -> set[str]:
    return {str(p.relative_to(folder)) for p in pathlib.Path(folder).rglob("*")}


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path, capsys):
    config = config_of(model__folder="", debug__family="sd", train__steps=3, train__batch_size=16)
    status, said = dry(config, tmp_path / "run", capsys)
    assert (status, files(tmp_path)) == (0, set())
    for words in (
        "train.batch_size = 16",
        "jobs:\n  encode:",
        "training: 3 updates of 16 pairs on 8 devices",
        "times the published 1e-08 a pair",
        "GB a device, by shapes: params ",
        "compilation cache:",
        "warning: optimizer.warmup_steps=500 is longer",
        "refusals: none",
    ):
        assert words in said, said


def test_a_dry_run_counts_pairs_an_epoch(tmp_path, capsys):
    meta = {"model": "digits", "scaling_factor": 1.0}
    moments = np.zeros((2, 8, 8, 8), np.float16)
    sizes = np.full((2, 6), 32, np.int32)
    pairs = [EncodedPair(str(i), 1, 1.0, moments, sizes) for i in range(24)]
    prompts = [PromptEmbedding(p, np.zeros((8, 32), np.float16)) for p in ("", "a")]
    write_pairs(tmp_path / "encoded", {"train": iter(pairs)}, prompts, meta)
    config = config_of(
        model__folder=str(PIPELINE), data__encoded=str(tmp_path / "encoded"), train__batch_size=16
    )
    before = files(tmp_path)
    status, said = dry(config, tmp_path / "run", capsys)
    assert files(tmp_path) == before
    assert status == 0, said
    assert "24 pairs an epoch, 1.5 updates" in said


def test_a_dry_run_lists_every_refusal(tmp_path, capsys):
    (tmp_path / "run").write_text("a file")
    config = config_of(
        model__folder=str(tmp_path / "lost"),
        jobs=("train", "evaluate"),
        train__batch_size=10,
        train__accumulation=4,
    )
    status, said = dry(config, tmp_path / "run" / "deeper", capsys)
    assert status == 1
    for words in (
        "train.batch_size must be a multiple",
        "the evaluate job needs prompts",
        "is no writable folder",
        "lost' does not exist",
    ):
        assert words in said, said
    assert files(tmp_path) == {"run"}
