"""Tests for dmpo_jax/commands.py, __main__.py, python.py and launch/: one table, three doors."""

import inspect
import pathlib
import subprocess
import sys

import pytest

import dmpo_jax as dj
from dmpo_jax import __main__ as entry
from dmpo_jax import commands, extras
from dmpo_jax.config import configs, parsing

ROOT = pathlib.Path(__file__).parents[2]
# The flags that each script has had since the first release.
FLAGS = {
    "train": "workdir",
    "encode": "source model out inspect vae variant resolution crop moments moments_dtype flip "
    "ties validation_fraction max_bad batch_size num_threads dtype distributed",
    "collect": "model prompts scorer out pairs seed temperature tie_margin variant steps "
    "guidance_scale batch_size dtype labels vae sampler",
    "sample": "model prompts out variant seed sampler images_per_prompt steps guidance_scale "
    "image_guidance_scale negative_prompt height width batch_size dtype vae",
    "evaluate": "a b prompts out judges seeds seed variant steps guidance_scale batch_size dtype "
    "vae sampler",
    "verify": "folder",
    "convert": "checkpoint single_file out step weights merge dtype shard_gb verify like",
    "plan": "topology model out cache",
    "make_digits": "out seed vae_steps",
}


def run(*argv: str, cwd: pathlib.Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *argv],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


def test_every_command_has_its_script():
    assert set(entry.NAMES) == set(commands.COMMANDS) == set(FLAGS)
    assert {file.stem for file in (ROOT / "launch").glob("*.py")} == set(FLAGS)


@pytest.mark.parametrize("name", FLAGS)
def test_flags_stay(name):
    interface = commands.COMMANDS[name].interface
    assert set(FLAGS[name].split()) <= set(interface.short) | set(interface.options)
    assert set(interface.short.values()) <= set(configs.declared())
    assert not set(interface.short) & set(interface.options)


def test_keywords_of_python_are_the_flags():
    for name in ("encode", "collect", "sample", "evaluate", "convert"):
        interface = commands.COMMANDS[name].interface
        parameters = inspect.signature(getattr(dj, name)).parameters
        assert set(parameters) == {"config", *interface.short, *interface.options}
        known = configs.declared()
        for short, path in interface.short.items():
            if short not in interface.required:
                assert parameters[short].default == known[path].default
    assert "steps=50" in dj.sample.__doc__


def test_a_notebooks_call_reaches_the_job_as_the_command_does(monkeypatch):
    seen = []
    for name in ("sample", "train"):
        command = commands.COMMANDS[name]._replace(call=lambda *given: seen.append(given) or "made")
        monkeypatch.setitem(commands.COMMANDS, name, command)
    made = dj.sample(model="m", prompts="p", out="o", steps=3)
    assert made == "made"
    line = "x --model=m --prompts=p --out=o --steps=3".split()
    config, options = parsing.parse(line, commands.COMMANDS["sample"].interface)
    assert options == {"prompts": "p", "out": "o"}
    assert configs.flatten(seen[0][0]) == configs.flatten(config)
    assert seen[0][1] == options
    config = dj.load_config("sd15_dmpo:debug")
    config.train.steps = 2
    hook = object()
    assert dj.train(config, "run", hooks=[hook]) == "made"
    assert seen[1][0].train.steps == 2
    assert seen[1][1] == {"workdir": "run", "hooks": (hook,)}
    config.train.accumulation = 3
    with pytest.raises(ValueError, match=r"train\.batch_size must be a multiple"):
        dj.train(config, "run")
    with pytest.raises(AttributeError, match="nowhere"):
        dj.nowhere  # noqa: B018


def test_importing_the_package_imports_no_jax():
    code = "import dmpo_jax as dj, sys; dj.__version__, dir(dj); print('jax' in sys.modules)"
    assert run("-c", code).stdout == "False\n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["launch/train.py", "--config=sdxl_dmpo", "--config.train.stepz=3"], "train.steps?"),
        (["-m", "dmpo_jax", "train"], "--config must name a config"),
        (["-m", "dmpo_jax", "trian"], "there is no command 'trian'"),
        (["launch/evaluate.py", "--a=x", "--b=y", "--prompts=z"], "--out is required"),
        (["launch/sample.py", "--stepz=3"], "did you mean --steps?"),
    ],
)
def test_a_wrong_line_ends_with_a_short_message(argv, says):
    done = run(*argv)
    assert done.returncode == 1
    assert done.stdout == ""
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 4


def test_help_lists_flags_and_every_leaf():
    text = commands.help_of("sample", "dmpo-jax sample")
    assert "dmpo-jax sample --model=FOLDER" in text
    assert "--guidance_scale=7.5" in text
    assert "optimizer.clip_norm=1.0" in text
    done = run("launch/sample.py", "--help")
    assert done.returncode == 0
    assert "launch/sample.py --model=FOLDER" in done.stdout


def test_an_install_hint_names_packages(monkeypatch):
    required = ['torch<3,>=2.8; extra == "eval"', "jax>=0.10", "peft; extra == 'eval'"]
    monkeypatch.setattr(extras.importlib.metadata, "requires", lambda name: required)
    assert extras.install_hint("eval") == "pip install 'torch<3,>=2.8' 'peft'"
    assert "pip install -e '.[data]'" in extras.install_hint("data")
