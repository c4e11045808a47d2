"""Tests for dmpo_jax/config/leaves.py and dmpo_jax/config/command_line.py."""

import json
import pathlib
import subprocess
import sys

import pytest

from dmpo_jax import families
from dmpo_jax.config import checks as config_checks
from dmpo_jax.config import command_line as flags
from dmpo_jax.config import leaves as config_lib
from dmpo_jax.diffusion import noise as noising
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.training import optim


def valid(**overrides):
    """A config that can run, with leaves changed: a__b=c is a.b=c."""
    config = config_lib.defaults()
    config.model.folder = "somewhere"
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return config


def test_every_leaf_has_a_default_and_a_meaning():
    config = config_lib.defaults()
    assert set(config_lib.flatten(config)) == set(config_lib.LEAVES) - {"objectives.sft"}
    assert all(meaning for _, meaning in config_lib.LEAVES.values())
    described = config_lib.describe()
    assert "train.steps=2000 " in described
    assert "data.resolution=unset " in described
    for section in config.values():
        if hasattr(section, "keys"):
            assert len(section) <= 12


def test_defaults_are_fresh_and_locked():
    config = config_lib.defaults()
    config.data.resolution = 512
    config.train.steps = 1
    assert config_lib.defaults().data.resolution is None
    assert config_lib.defaults().train.steps == 2000
    with pytest.raises(AttributeError, match="stepz"):
        config.train.stepz = 3
    with pytest.raises(AttributeError):
        config.objectives.sft.beta = 1.0


def test_names_equal_those_of_optim():
    assert config_lib.OPTIMIZERS == optim.OPTIMIZERS
    assert config_lib.WEIGHTINGS == noising.WEIGHTINGS
    assert config_lib.SCHEDULES == optim.SCHEDULES


def test_debug_families_are_those_of_models():
    assert set(config_lib.FAMILIES) == {family.name for family in families.FAMILIES.values()}


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


def test_validate_tells_all_faults_and_a_missing_section():
    with pytest.raises(ValueError) as error:
        config_checks.validate(valid(train__steps=0, log__keep=0))
    assert len(str(error.value).splitlines()) == 2
    with pytest.raises(ValueError, match=r"no section objectives\.ours"):
        config_checks.validate(
            valid(objective="ours"), objectives={**OBJECTIVES, "ours": OBJECTIVES["dmpo"]}
        )


def test_identity_is_what_changes_the_run_and_nothing_else():
    base = config_lib.identity(valid())
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
        assert config_lib.identity(valid(**{leaf: value})) == base, leaf
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
        assert config_lib.identity(valid(**{leaf: value})) != base, leaf
    cosine = [
        config_lib.identity(valid(optimizer__schedule="cosine", train__steps=s)) for s in (6, 7)
    ]
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
    assert config_lib.nearest(wrong, list(config_lib.LEAVES)) == meant


def test_split_leaves_the_rest_to_absl():
    line = "x --config=a.py -config.a.b=1 --workdir=w --config.c -1 --config.d --noconfig.e"
    rest, overrides = flags.split([*line.split(), "--config.a.b=a=b", "--", "--config.f=1"])
    assert rest == ["x", "--config=a.py", "--workdir=w", "--", "--config.f=1"]
    assert overrides == {"a.b": "a=b", "c": "-1", "d": "true", "e": "false"}


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("train.steps", "7", 7),
        ("mesh.data", "-1", -1),
        ("optimizer.learning_rate", "1e-4", 1e-4),
        ("optimizer.learning_rate", "1", 1.0),
        ("log.tensorboard", "false", False),
        ("log.wandb", "12", "12"),
        ("data.source", "folder:a=b", "folder:a=b"),
        ("data.resolution", "512", 512),
        ("jobs", "encode,train", ("encode", "train")),
        ("jobs", "('train',)", ("train",)),
        ("evaluate.judges", "a, b", ("a", "b")),
    ],
)
def test_override_reads_the_leafs_type(path, text, value):
    config = config_lib.defaults()
    flags.apply_overrides(config, {path: text})
    got = config_lib.flatten(config)[path]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("path", "text", "match"),
    [
        ("train.stepz", "3", r"there is no train.stepz; did you mean --config.train.steps\?"),
        ("train.steps", "abc", "train.steps must be an integer, but got 'abc'"),
        ("train.steps", "1.5", "train.steps must be an integer, but got '1.5'"),
        ("train.steps.x", "1", "did you mean --config.train.steps"),
        ("data.resolution", "big", "data.resolution must be an integer, but got 'big'"),
        ("optimizer.b1", "", "optimizer.b1 must be a number, but got ''"),
        ("log.tensorboard", "maybe", "true or false, but got 'maybe'"),
        ("jobs", "(1", "names with commas"),
        ("mesh", "4", "mesh is a section; its leaves are mesh.cpu_devices, mesh.data, mesh.fsdp"),
    ],
)
def test_override_refuses(path, text, match):
    with pytest.raises(ValueError, match=match):
        flags.apply_overrides(config_lib.defaults(), {path: text})


CONFIG = """
from dmpo_jax.config.leaves import defaults

def get_config(variant=""):
    config = defaults()
    config.model.folder = "somewhere"
    if variant == "debug":
        config.train.steps = 3
    elif variant:
        config.train[variant] = 1
    return config
"""
SCRIPT = """'''Trains, as its docstring says.'''
import functools
from absl import flags as absl_flags
from dmpo_jax.config import leaves as config, checks as config_checks, command_line as flags
from dmpo_jax.objectives import OBJECTIVES
WORKDIR = absl_flags.DEFINE_string("workdir", "here", "where to")
def main(config):
    print(config.train.steps, config.jobs, WORKDIR.value)
if __name__ == "__main__":
    flags.run(main, check=functools.partial(config_checks.validate, objectives=OBJECTIVES))
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    folder = tmp_path_factory.mktemp("script")
    (folder / "c.py").write_text(CONFIG)
    (folder / "run.py").write_text(SCRIPT)
    return folder


def run(script, *argv):
    root = pathlib.Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, script / "run.py", *argv],
        cwd=script,
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )


def test_command_line_end_to_end(script):
    # The override may come first, and absl's own flags between.
    done = run(script, "--config.jobs=encode,train", "--workdir", "there", "--config=c.py:debug")
    assert (done.returncode, done.stdout) == (0, "3 ('encode', 'train') there\n"), done.stderr


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--config=c.py --config.train.stepz=3", "did you mean --config.train.steps?"),
        ("--config=c.py --config.train.steps=abc", "train.steps must be an integer, but got 'abc'"),
        ("--config=c.py --config.train.steps=0", "train.steps must be at least 1, but got 0"),
        ("--config=c.py:stepz", 'c.py:10: Key "stepz" does not exist'),
        ("--config=nowhere.py", "cannot read nowhere.py (No such file or directory)"),
        ("--confi=c.py", "confi"),
        ("--config=c.py stray", "takes flags only, but got ['stray']"),
        ("", "--config must name a config file"),
    ],
)
def test_command_line_refuses_shortly(argv, says, script):
    done = run(script, *argv.split())
    assert done.returncode == 1
    assert done.stdout == ""
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 3


def test_help_lists_every_leaf(script):
    done = run(script, "--help")
    assert done.returncode == 0
    assert "as its docstring says" in done.stdout
    assert "--workdir" in done.stdout
    assert "optimizer.clip_norm=1.0" in done.stdout
