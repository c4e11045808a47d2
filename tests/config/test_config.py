"""Tests for dmpo_jax/config/configs.py, checks.py and what is derived from a leaf."""

import json
import pathlib

import pytest

from dmpo_jax.config import checks as config_checks
from dmpo_jax.config import configs, parsing, reference
from dmpo_jax.config.configs import LEAVES, declared
from dmpo_jax.config.declare import ITSELF, Leaf, OneOf
from dmpo_jax.objectives import OBJECTIVES, Hyperparameter, objective

ROOT = pathlib.Path(__file__).parents[2]


def valid(**overrides):
    """A config that can run, with leaves changed: a__b=c is a.b=c."""
    config = configs.defaults()
    config.model.folder = "somewhere"
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return config


def test_every_leaf_has_a_default_and_a_meaning():
    config = configs.defaults()
    assert set(configs.flatten(config)) == set(declared())
    assert all(leaf.meaning for leaf in declared().values())
    assert all(leaf.fits(leaf.default) for leaf in declared().values())
    described = reference.describe()
    assert "train.steps=2000 " in described
    assert "data.resolution=unset " in described
    assert len(described.split("\n")) >= len(declared())


def test_defaults_are_fresh_and_locked():
    config = configs.defaults()
    config.data.resolution = 512
    config.train.steps = 1
    assert configs.defaults().data.resolution is None
    assert configs.defaults().train.steps == 2000
    with pytest.raises(AttributeError, match="stepz"):
        config.train.stepz = 3
    with pytest.raises(AttributeError):
        config.objectives.sft.beta = 1.0


def another(leaf: Leaf):
    """A value that is not the default, of those that the leaf takes."""
    if isinstance(leaf.check, OneOf):
        tried = tuple(leaf.check)
    elif leaf.kind in (int, float):
        tried = [leaf.kind(x) for x in ((leaf.default or 0) + 1, 16, 0.5, 0.25, -1)]
    else:
        tried = {bool: (not leaf.default,), str: ("x",), tuple: (("train", "x"),)}[leaf.kind]
    return next(value for value in tried if value != leaf.default and leaf.fits(value))


@pytest.mark.parametrize("path", declared())
def test_identity_is_what_a_leaf_says_that_it_affects(path):
    """With every leaf that it counts with changed too."""
    leaf, known = declared()[path], declared()
    others = [p for p in leaf.counts_with.split() if p not in (ITSELF, path)]
    base = configs.flatten(configs.defaults())
    base |= {other: another(known[other]) for other in others}
    if path.startswith("objectives."):
        base["objective"] = path.split(".")[1]
    before, after = (configs.from_flat(flat) for flat in (base, {**base, path: another(leaf)}))
    changes = configs.identity(after) != configs.identity(before)
    assert changes == ("run" in leaf.affects.split())
    if others and not {path, ITSELF} & set(leaf.counts_with.split()):  # without them it is nothing
        plain = configs.defaults()
        alone = configs.from_flat({**configs.flatten(plain), path: another(leaf)})
        assert configs.identity(alone) == configs.identity(plain)


def test_identity_stays_what_older_runs_have_written():
    """identity.json of a run, as version 0.1.0 wrote it."""
    written = {
        "objective": "sft",
        "objectives": {"sft": {}},
        "seed": 0,
        "model": {"folder": "somewhere", "variant": "", "compute_dtype": "bfloat16"},
        "data": {
            "source": "",
            "encoded": "",
            "resolution": None,
            "prompt_dropout": 0.2,
            "validation_fraction": 0.01,
        },
        "train": {"batch_size": 2048},
        "optimizer": {
            "name": "adamw",
            "learning_rate": 2.048e-5,
            "warmup_steps": 500,
            "schedule": "constant",
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.01,
            "clip_norm": 1.0,
        },
        "debug": {"family": ""},
    }
    assert configs.identity(valid(objective="sft")) == written
    written["lora"] = {
        "rank": 4,
        "alpha": None,
        "dropout": 0.0,
        "targets": ["to_q", "to_k", "to_v", "to_out.0"],
    }
    written["timesteps"] = {"low": 0.0, "high": 0.9}
    changed = valid(objective="sft", lora__rank=4, timesteps__high=0.9)
    assert configs.identity(changed) == written


def test_a_leaf_declared_on_one_line_is_everywhere(monkeypatch):
    line = Leaf(1.0, "how hard it pulls", "(0, 2]", affects="run", counts_with=ITSELF)
    before = configs.identity(valid())
    monkeypatch.setitem(LEAVES, "train.pull", line)
    assert "train.pull=1.0 " in reference.describe()
    assert "how hard it pulls; in (0, 2]" in reference.describe()
    assert "| pull | `1.0` | how hard it pulls | in (0, 2] | run |" in reference.render()
    with pytest.raises(ValueError, match=r"train.pull must be in \(0, 2\], but got 3.0"):
        config_checks.validate(valid(train__pull=3.0))
    assert configs.identity(valid()) == before  # runs from before it can be resumed
    assert configs.identity(valid(train__pull=2.0))["train"]["pull"] == 2.0
    interface = parsing.Interface({"pull": "train.pull"}, {})
    config, _ = parsing.parse(["x", "--pull=0.5"], interface)
    assert config.train["pull"] == 0.5
    assert "--pull=1.0" in parsing.describe(interface)


def test_an_objectives_hyperparameters_are_leaves():
    @objective(
        needs_reference=False,
        needs_rejected=False,
        pull=Hyperparameter(2.0, "how hard it pulls", "(0, 4]"),
    )
    def of_a_test(policy, reference, target, preference, *, pull, power=2):
        return preference * pull**power

    try:
        config = valid(objective="of_a_test")
        assert config.objectives.of_a_test.to_dict() == {"pull": 2.0, "power": 2}
        assert "objectives.of_a_test.pull=2.0" in reference.describe()
        assert configs.identity(config)["objectives"] == {"of_a_test": {"pull": 2.0, "power": 2}}
        config.objectives.of_a_test.pull = 5.0
        with pytest.raises(ValueError, match=r"pull must be .*in \(0, 4\], got pull=5.0; how hard"):
            config_checks.validate(config)
        saved = configs.flatten(config)
    finally:
        del OBJECTIVES["of_a_test"]
    # A saved config is read where the file that defined the objective is not loaded.
    assert configs.flatten(configs.from_flat(saved))["objectives.of_a_test.pull"] == 5.0
    with pytest.raises(ValueError, match=r"objective must be one of .* but got 'of_a_test'"):
        config_checks.validate(configs.from_flat(saved))


def test_the_reference_page_is_current():
    page = (ROOT / "docs" / "config_reference.md").read_text()
    assert page == reference.render(), "python -m dmpo_jax.config.reference writes it"


def test_valid_is_valid():
    config_checks.validate(valid())
    config_checks.validate(valid(model__folder="", debug__family="sd"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"objective": "dmpp"}, "got 'dmpp': did you mean 'dmpo'"),
        (
            {"objectives__dmpo__alpha": 0.0},
            r"objectives.dmpo: alpha must be .* in \(0, 0.5\], got alpha=0.0",
        ),
        ({"objectives__dmpo__alpha": 0.51}, r"in \(0, 0.5\], got alpha=0.51"),
        (
            {"objectives__dmpo__beta": float("inf")},
            "objectives.dmpo: beta must be a finite Python number above 0, got beta=inf",
        ),
        (
            {"objective": "diffusion_dpo", "objectives__diffusion_dpo__label_smoothing": 0.6},
            "objectives.diffusion_dpo: label_smoothing must be .*, got label_smoothing=0.6",
        ),
        ({"safeguard__mu": 1.5}, r"safeguard.mu must be in \[0, 1\], but got 1.5"),
        ({"safeguard__mu": 0.5, "objective": "sft"}, "rejected images, which 'sft' does not use"),
        (
            {"train__group": 8, "objective": "dspo_sdxl", "train__batch_size": 24}
            | {"train__accumulation": 2},
            "multiple of train.accumulation x train.group, but got 24, 2 and 8: change one",
        ),
        (
            {"train__accumulation": 0, "safeguard__mu": 0.9},
            r"=auto \(0\) chooses by memory .* give a number, or set train.group",
        ),
        (
            {"train__accumulation": 0, "lora__rank": 4, "lora__dropout": 0.1},
            "depends on that: give a number, or unset lora.dropout",
        ),
        ({"train__group": 8}, "objective=dmpo without safeguard.mu has none: unset it"),
        ({"train__group": 0, "safeguard__mu": 0.9}, "train.group must be at least 1, but got 0"),
        ({"data__flip_each": True}, "how data.flip flips, which is not set"),
        ({"data__sizes": "whole"}, "data.sizes must be one of own, resolution, but got 'whole'"),
        ({"timesteps__weighting": "snr"}, "timesteps.weighting must be one of uniform, min_snr"),
        ({"timesteps__low": 0.7, "timesteps__high": 0.6}, "but got 0.7 and 0.6"),
        ({"timesteps__gamma": 0.0}, "timesteps.gamma must be above 0 and finite, but got 0.0"),
        ({"model__folder": ""}, "model.folder must be"),
        ({"model__compute_dtype": "fp16"}, "bfloat16, float32, but got 'fp16'"),
        ({"optimizer__name": "lion"}, "adamw, adamw_bf16, adafactor, but got 'lion'"),
        ({"optimizer__schedule": "step"}, "constant, cosine, linear, but got 'step'"),
        ({"optimizer__schedule": "linear", "train__steps": 500}, "but got 500 and 500"),
        ({"optimizer__learning_rate": float("nan")}, "learning_rate must be .* but got nan"),
        ({"train__steps": 0}, "train.steps must be at least 1, but got 0"),
        ({"train__batch_size": 10, "train__accumulation": 4}, "but got 10 and 4"),
        ({"data__prompt_dropout": 1.1}, r"prompt_dropout must be in \[0, 1\], but got 1.1"),
        ({"data__validation_fraction": 1.0}, r"validation_fraction must be in \[0, 1\)"),
        ({"data__resolution": 100}, "resolution must be a positive multiple of 8, but got 100"),
        ({"data__source": "folder"}, "data.source must be KIND:PATH, but got 'folder'"),
        ({"mesh__data": 0}, "mesh.data must be a number of devices"),
        ({"jobs": ("trian",)}, r"collect, encode, train, evaluate, but got \('trian',\)"),
        ({"jobs": ()}, r"but got \(\)"),
        ({"jobs": (1,)}, r"but got \(1,\)"),
        ({"jobs": ("train", "encode")}, "in the order"),
        ({"jobs": ("train", "train")}, "once each"),
        ({"jobs": ("collect", "train")}, "needs collect.scorer"),
        ({"profile": "1:3"}, r"updates from 2 on \(the first compiles\), but got '1:3'"),
        ({"profile": "9"}, "profile must be START:STOP, .* but got '9'"),
        ({"profile": "9:8"}, "profile must be START:STOP, .* but got '9:8'"),
        ({"profile": "9:8000"}, "by train.steps, 2000, but got '9:8000'"),
        ({"evaluate__judges": (1,)}, "evaluate.judges must be names"),
    ],
)
def test_validate_refuses_in_words(change, match):
    with pytest.raises(ValueError, match=match):
        config_checks.validate(valid(**change))


def test_validate_tells_all_faults():
    with pytest.raises(ValueError) as error:
        config_checks.validate(valid(train__steps=0, log__keep=0))
    assert len(str(error.value).splitlines()) == 2


def test_identity_is_what_changes_the_run_and_nothing_else():
    base = configs.identity(valid())
    assert json.loads(json.dumps(base)) == base
    same = {
        "train__steps": 9,
        "train__accumulation": 2,
        "mesh__fsdp": 4,
        "log__every": 1,
        "sample__steps": 3,
        "objectives__diffusion_dpo__beta": 1.0,
        "jobs": ("evaluate",),
        "profile": "3:4",
    }
    for leaf, value in same.items():
        assert configs.identity(valid(**{leaf: value})) == base, leaf
    other = {
        "objective": "sft",
        "objectives__dmpo__beta": 1.0,
        "safeguard__mu": 0.9,
        "timesteps__weighting": "min_snr",
        "timesteps__high": 0.9,
        "seed": 1,
        "model__folder": "x",
        "model__compute_dtype": "float32",
        "data__encoded": "x",
        "data__prompt_dropout": 0.0,
        "data__resolution": 64,
        "train__batch_size": 8,
        "optimizer__b2": 0.5,
        "optimizer__name": "adamw_bf16",
    }
    for leaf, value in other.items():
        assert configs.identity(valid(**{leaf: value})) != base, leaf
    # Means over a microbatch depend on its size, those over a group do not.
    for group, differs in ((None, True), (8, False)):
        runs = [
            configs.identity(valid(safeguard__mu=0.9, train__accumulation=a, train__group=group))
            for a in (1, 2)
        ]
        assert (runs[0] != runs[1]) == differs
    dropout = {"lora__rank": 4, "lora__dropout": 0.1, "safeguard__mu": 0.9, "train__group": 8}
    runs = [configs.identity(valid(**dropout, train__accumulation=a)) for a in (1, 2)]
    assert runs[0] != runs[1]
    cosine = [configs.identity(valid(optimizer__schedule="cosine", train__steps=s)) for s in (6, 7)]
    assert cosine[0] != cosine[1]  # there the rate is a function of train.steps


@pytest.mark.parametrize(
    ("meant", "wrong"),
    [
        ("train.steps", "train.stepz"),
        ("train.steps", "trian.steps"),
        ("optimizer.learning_rate", "learning_rate"),
        ("optimizer.learning_rate", "train.learning_rate"),
        ("objectives.dmpo.beta", "dmpo.beta"),
        ("train.batch_size", "train.batchsize"),
        ("log.checkpoint_every", "checkpoint_every"),
    ],
)
def test_nearest_is_the_one_meant(meant, wrong):
    assert configs.nearest(wrong, declared()) == meant
