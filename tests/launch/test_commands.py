"""Tests for dmpo_jax/commands.py, __main__.py, python.py and launch/: one table, three doors."""

import inspect
import logging
import pathlib
import re
import subprocess
import sys

import pytest
from etils import epath

import dmpo_jax as dj
from dmpo_jax import __main__ as entry
from dmpo_jax import commands, extras
from dmpo_jax.config import configs, parsing

ROOT = pathlib.Path(__file__).parents[2]
# The flags that each script has had since the first release.
FLAGS = {
    "train": "workdir",
    "calibrate": "workdir updates rates",
    "encode": "source model out inspect vae variant resolution crop moments moments_dtype flip "
    "ties validation_fraction max_bad batch_size num_threads dtype distributed",
    "collect": "model prompts scorer out pairs seed temperature tie_margin variant steps "
    "guidance_scale batch_size dtype labels vae sampler",
    "sample": "model prompts out variant seed sampler images_per_prompt steps guidance_scale "
    "image_guidance_scale negative_prompt height width batch_size dtype vae",
    "evaluate": "a b prompts out judges seeds seed variant steps guidance_scale batch_size dtype "
    "vae sampler images_per_prompt estimand noise protocol single_file labelled_by scores",
    "verify": "folder",
    "convert": "checkpoint single_file out step weights merge dtype shard_gb verify like",
    "plan": "topology model out cache",
    "make_digits": "out family vae seed vae_steps",
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
    assert options == {"prompts": "p", "out": "o", "lora": ()}
    assert configs.flatten(seen[0][0]) == configs.flatten(config)
    assert seen[0][1] == options
    config = dj.load_config("sd15_dmpo:debug")
    config.train.steps = 2
    hook = object()
    assert dj.train(config, "run", hooks=[hook]) == "made"
    assert seen[1][0].train.steps == 2
    given = {"workdir": "run", "fork": "", "dry_run": False, "hooks": (hook,)}
    assert seen[1][1] == given
    config.train.accumulation = 3
    with pytest.raises(ValueError, match=r"train\.batch_size must be a multiple"):
        dj.train(config, "run")
    with pytest.raises(AttributeError, match="nowhere"):
        dj.nowhere  # noqa: B018


def test_importing_the_package_imports_no_jax():
    code = "import dmpo_jax as dj, sys; dj.__version__, dir(dj); print('jax' in sys.modules)"
    assert run("-c", code).stdout == "False\n"


@pytest.mark.long
@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["launch/train.py", "--config=sdxl_dmpo", "--config.train.stepz=3"], "train.steps?"),
        (["-m", "dmpo_jax", "train"], "--config must name a config"),
        (["-m", "dmpo_jax", "trian"], "there is no command 'trian'; did you mean train?"),
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


@pytest.mark.parametrize("name", FLAGS)
def test_ctrl_c_ends_every_command_in_words(name, monkeypatch, tmp_path, capsys):
    def stop(*given):
        raise KeyboardInterrupt

    command = commands.COMMANDS[name]._replace(call=stop, check=lambda config, options: None)
    monkeypatch.setitem(commands.COMMANDS, name, command)
    # absl's own would set up logging and signals of this process.
    monkeypatch.setattr(
        commands.app, "run", lambda main, argv, flags_parser: main(flags_parser(argv))
    )
    monkeypatch.setattr(commands, "log_to_console", lambda: None)
    values = {"config": "digits_dmpo", "topology": "cpu:1"}
    needed = [
        *command.interface.required,
        *(["config"] if command.interface.config is None else []),
    ]
    flags = [f"--{flag}={values.get(flag, tmp_path / 'x')}" for flag in needed]
    with pytest.raises(SystemExit) as ended:
        commands.main(name, ["dmpo-jax", *flags])
    resumes = name in ("train", "encode", "collect", "sample", "evaluate")
    words = f"stopped; the same command {'resumes' if resumes else 'starts over'}\n"
    assert ended.value.code == 130
    assert capsys.readouterr().err.strip("\n") == words.strip("\n")


@pytest.mark.parametrize(
    ("name", "job", "options", "says"),
    [
        ("encode", "encode", {"out": "o", "inspect": None}, "train --config=.*folder=m .*=made"),
        ("encode", "inspect", {"out": None, "inspect": "o"}, "encode --source=table:t --model="),
        ("collect", "collect", {"out": "o"}, "encode --source=pickapic:made --model=m "),
        ("train", "run", {"workdir": "o"}, "evaluate --a=m --b=made/export "),
        ("convert", "convert", {"checkpoint": "o", "single_file": ""}, "load_lora_weights.'made'"),
    ],
)
def test_a_command_ends_with_the_next_one(name, job, options, says, monkeypatch, caplog):
    config = dj.defaults()
    config.model.folder, config.data.source = "m", "table:t"
    monkeypatch.setattr(f"dmpo_jax.jobs.{job}.{job}", lambda *_, **kw: epath.Path("made"))
    interface = commands.COMMANDS[name].interface
    unset = {key: option.default for key, option in interface.options.items()}
    with caplog.at_level(logging.INFO):
        commands.COMMANDS[name].call(config, {**unset, **options})
    assert re.search(f"^next.*{says}", caplog.messages[-1])


def test_ctrl_c_while_the_libraries_load(monkeypatch, capsys):
    def stop(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["dmpo-jax", "train"])
    monkeypatch.setattr(commands, "main", stop)
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "\nstopped; the same command resumes\n"


@pytest.mark.parametrize("name", ["encode", "collect", "sample", "evaluate", "convert", "train"])
def test_an_output_that_cannot_be_a_folder_is_refused_first(name, tmp_path):
    (tmp_path / "file").write_text("")
    interface = commands.COMMANDS[name].interface
    (flag,) = {"out", "workdir"} & set(interface.options)
    needed = [f"--{other}=x" for other in interface.required if other != flag]
    config = ["--config=digits_dmpo"] if name == "train" else []
    for inside in ("", "/run"):
        line = ["x", *needed, *config, f"--{flag}={tmp_path}/file{inside}"]
        with pytest.raises(ValueError, match=f"--{flag} must be a folder that can be made"):
            parsing.parse(line, interface)


def test_help_lists_flags_and_every_leaf():
    text = commands.help_of("sample", "dmpo-jax sample")
    assert "dmpo-jax sample --model=FOLDER" in text
    assert "--guidance_scale=7.5" in text
    assert "optimizer.clip_norm=1.0" in text
    digits = commands.help_of("train", "dmpo-jax train", dj.load_config("digits_dmpo"))
    assert "train.steps=150 " in digits
    assert "with this config's value" in digits
    config = dj.load_config("digits_dmpo")
    for folder in ("short", "long" * 30):  # there is a space before the meaning
        config.model.folder = folder
        described = commands.help_of("train", "dmpo-jax train", config)
        assert re.search(rf"model.folder='{folder}' +diffusers pipeline folder", described)
    done = run("launch/sample.py", "--help")
    assert done.returncode == 0
    assert "launch/sample.py --model=FOLDER" in done.stdout


def test_an_install_hint_names_packages(monkeypatch):
    required = ['torch<3,>=2.8; extra == "eval"', "jax>=0.10", "peft; extra == 'eval'"]
    required += ['jax[cuda13-local]<0.13,>=0.10; extra == "plan-gpu"']
    monkeypatch.setattr(extras.importlib.metadata, "requires", lambda name: required)
    assert extras.install_hint("eval") == "pip install 'torch<3,>=2.8' 'peft'"
    assert extras.install_hint("plan-gpu") == "pip install 'jax[cuda13-local]<0.13,>=0.10'"
    assert "pip install -e '.[data]'" in extras.install_hint("data")
