"""Tests for dmpo_jax/config/parsing.py and files.py: command lines, keywords, config files."""

import sys

import pytest

from dmpo_jax.config import configs
from dmpo_jax.config.declare import Leaf
from dmpo_jax.config.files import load_config, shipped
from dmpo_jax.config.parsing import Interface, from_keywords, parse

PLAIN = Interface({}, {"workdir": Leaf("here", "where to")})
SHORT = Interface(
    {"model": "model.folder", "steps": "sample.steps", "flip": "data.flip"},
    {"out": Leaf(None, "folder to write"), "count": Leaf(1, "of them", "[1, inf)")},
    required=("model", "out"),
)


@pytest.mark.parametrize(
    ("flag", "path", "value"),
    [
        ("--config.train.steps=7", "train.steps", 7),
        ("--config.mesh.data -1", "mesh.data", -1),
        ("--config.train.accumulation=auto", "train.accumulation", 0),
        ("-config.optimizer.learning_rate 1e-4", "optimizer.learning_rate", 1e-4),
        ("--config.optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
        ("--config.log.tensorboard=false", "log.tensorboard", False),
        ("--noconfig.log.tensorboard", "log.tensorboard", False),
        ("--config.model.scan", "model.scan", True),
        ("--config.log.wandb=12", "log.wandb", "12"),
        ("--config.data.source=folder:a=b", "data.source", "folder:a=b"),
        ("--config.data.resolution=512", "data.resolution", 512),
        ("--config.jobs=encode,train", "jobs", ("encode", "train")),
        ("--config.jobs=('train',)", "jobs", ("train",)),
        ("--config.evaluate.judges=a,b", "evaluate.judges", ("a", "b")),
        ("--config.safeguard.mu=0.5 --config.safeguard.mu=0.9", "safeguard.mu", 0.9),
    ],
)
def test_an_override_reads_the_leafs_type(flag, path, value):
    config, options = parse(["x", *flag.split()], PLAIN)
    got = configs.flatten(config)
    assert got[path] == value
    assert type(got[path]) is type(value)
    plain = configs.flatten(configs.defaults())
    assert {k for k in got if got[k] != plain[k]} <= {path}
    assert options == {"workdir": "here"}


@pytest.fixture(autouse=True)
def no_gcsfs(monkeypatch):
    """As where the package is not installed."""
    monkeypatch.setitem(sys.modules, "gcsfs", None)


@pytest.mark.parametrize(
    ("flag", "match"),
    [
        ("--config.train.stepz=3", r"there is no train.stepz; did you mean --config.train.steps\?"),
        ("--config.train.steps=abc", "train.steps must be an integer, but got 'abc'"),
        ("--config.train.accumulation=x", "train.accumulation must be an integer or auto, but got"),
        ("--config.train.steps=1.5", "train.steps must be an integer, but got '1.5'"),
        ("--config.train.steps=0", "train.steps must be at least 1, but got '0'"),
        ("--config.train.steps.x=1", "did you mean --config.train.steps"),
        ("--config.train.steps", "Missing value"),
        ("--config.data.resolution=big", "data.resolution must be an integer, but got 'big'"),
        ("--config.optimizer.b1=", "optimizer.b1 must be a number, but got ''"),
        ("--config.log.tensorboard=maybe", "true or false, but got 'maybe'"),
        ("--config.jobs=(1", "names with commas"),
        ("--config.mesh=4", "mesh is a section; its leaves are mesh.cpu_devices, mesh.data"),
        ("--worddir=x", "there is no flag --worddir; did you mean --workdir"),
        ("stray", "takes flags only, but got ..stray"),
        ("--config=nowhere.py", r"=nowhere.py: there is no such file; .*There are digits_base, "),
        ("--config=configs/sd15.py", r"no such file; did you mean --config=sd15_dmpo\? There"),
        (
            "--config.objective=dpo",
            r"got 'dpo': did you mean .*'diffusion_dpo'",
        ),
        ("--config.optimizer.name=adamv", "did you mean 'adamw'"),
        ("--batch_size=3", r"no flag --batch_size; did you mean --config.train.batch_size or "),
        (
            "--config.data.source=pickapic:gs://b/x",
            "--config.data.source: gs://b/x needs a package",
        ),
        ("--config=sd15_dpmo", "no config of this name; did you mean --config=sd15_dmpo"),
        ("--config=what", "no config of this name; did you mean --config="),
        ("--config=published:sd15_dmop", "no published recipe .*; did you mean 'sd15_dmpo'"),
    ],
)
def test_a_wrong_flag_is_refused(flag, match):
    with pytest.raises(ValueError, match=match):
        parse(["x", *flag.split()], PLAIN)


def test_flags_come_in_any_order():
    line = "x --config.train.steps=5 --workdir there --config=sd15_dmpo:debug --config.log.keep=1"
    config, options = parse(line.split(), PLAIN)
    assert options == {"workdir": "there"}
    assert (config.train.steps, config.log.keep, config.debug.family) == (5, 1, "sd")


def test_a_short_name_is_the_leaf():
    config, options = parse("x --model=m --out=o --steps=3 --flip --count=2".split(), SHORT)
    assert (config.model.folder, config.sample.steps, config.data.flip) == ("m", 3, True)
    assert options == {"out": "o", "count": 2}
    both, _ = parse("x --model=m --out=o --steps=3 --config.sample.steps=4".split(), SHORT)
    assert both.sample.steps == 4  # the later one
    called, _ = from_keywords("f", None, {"model": "m", "out": "o", "steps": 3}, SHORT)
    assert called.sample.steps == 3
    with pytest.raises(ValueError, match="--out is required: folder to write"):
        parse("x --model=m".split(), SHORT)
    with pytest.raises(ValueError, match="--count must be at least 1, but got '0'"):
        parse("x --model=m --out=o --count=0".split(), SHORT)
    with pytest.raises(ValueError, match="model is required"):
        from_keywords("f", None, {"out": "o"}, SHORT)
    with pytest.raises(TypeError, match=r"f\(\) takes no 'stepz'; did you mean 'steps'"):
        from_keywords("f", None, {"stepz": 3}, SHORT)
    with pytest.raises(ValueError, match=r"sample\.steps must be at least 1, but got 0"):
        from_keywords("f", None, {"model": "m", "out": "o", "steps": 0}, SHORT)


def test_keywords_leave_the_config_as_it_is():
    given = load_config("sd15_dmpo")
    found, _ = from_keywords("f", given, {"model": "m", "out": "o"}, SHORT)
    assert (given.model.folder, found.model.folder) == ("", "m")


def test_the_package_brings_configs_by_name():
    assert {"digits_dmpo", "sdxl_dmpo"} <= set(shipped())
    assert load_config("sdxl_dmpo:lora").lora.rank == 64
    with pytest.raises(ValueError, match=r"sdxl_dmpo.py:\d+: this config has the variants"):
        load_config("sdxl_dmpo:foo")


def test_a_config_file_that_sets_an_unknown_leaf_is_refused_with_its_line(tmp_path):
    file = tmp_path / "c.py"
    file.write_text(
        "from dmpo_jax import config\n"
        "def get_config():\n"
        "    made = config.defaults()\n"
        "    made.train.stepz = 3\n"
        "    return made\n"
    )
    with pytest.raises(ValueError, match=r'c.py:4: Key "stepz" does not exist'):
        load_config(str(file))
    file.write_text("x = 1")
    with pytest.raises(ValueError, match=r"must define get_config\(\)"):
        load_config(str(file))
