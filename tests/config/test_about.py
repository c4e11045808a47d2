"""Tests for dmpo_jax/config/about.py: what a run's page says beside its curves."""

import shlex

import pytest

from dmpo_jax.commands import COMMANDS
from dmpo_jax.config import configs, parsing
from dmpo_jax.config.about import about_run
from dmpo_jax.config.files import load_config, shipped


@pytest.mark.parametrize("name", [*shipped(), "sdxl_dmpo:lora"])
def test_every_command_would_be_accepted(name, tmp_path):
    config = load_config(name)
    config.model.folder = config.model.folder or "BASE"
    config.sample.negative_prompt = "a 'quoted' one"
    config.model.variant = "fp16"
    about = about_run(config, tmp_path / "a run", [])
    commands = [step.command for step in about.following if step.command.startswith("dmpo-jax")]
    names = []
    for command in commands:
        _, name, *flags = shlex.split(command)
        given, options = parsing.parse([name, *flags], COMMANDS[name].interface)
        COMMANDS[name].check(given, options)
        names.append(name)
        if name != "convert":
            assert given.sample.negative_prompt == "a 'quoted' one"
            assert given.sample.guidance_scale == config.sample.guidance_scale
            assert (given.model.variant == "fp16") == (name == "evaluate")
        if name == "evaluate":
            assert str(options["b"]) == str(tmp_path / "a run" / "export")
    assert set(names) == {"sample", "convert"} | ({"evaluate"} - set(config.jobs))
    assert about.compared == ("evaluate" in config.jobs)
    adapters = f"pipeline.load_lora_weights({str(tmp_path / 'a run' / 'lora')!r})"
    assert (adapters in [s.command for s in about.following]) == bool(config.lora.rank)


def test_settings_are_those_that_were_changed(tmp_path):
    config = configs.defaults()
    config.model.folder = "org/name"
    config.train.steps = 77
    config.objectives.dmpo.beta = 3.5
    config.objectives.ipo.beta = 4.5  # not of this run
    config.evaluate.judges = ("a", "b:c")
    about = about_run(config, tmp_path, ["one"])
    default = configs.defaults()
    assert {tuple(setting) for setting in about.settings} == {
        ("model.folder", "org/name", default.model.folder or ""),
        ("train.steps", "77", str(default.train.steps)),
        ("objectives.dmpo.beta", "3.5", str(default.objectives.dmpo.beta)),
        ("evaluate.judges", "a,b:c", ""),
    }
    assert about.title == tmp_path.name
    assert about.prompts == ("one",)
