"""Tests for dmpo_jax.jobs.convert: what leaves a LoRA run, averaged or not, merged or not."""

import hashlib
import json
import pathlib

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from dmpo_jax import diffusers_io
from dmpo_jax.data.encoded.records import open_pairs
from dmpo_jax.export.pipeline import Trained, check_keys
from dmpo_jax.jobs import train
from dmpo_jax.jobs.convert import convert
from dmpo_jax.jobs.run import run
from dmpo_jax.toy import digits
from tests.support import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
LORA = {
    "lora__rank": 2,
    "lora__alpha": 4.0,
    "lora__dropout": 0.1,
    "lora__targets": ("to_q", "to_out.0", "ff.net.2", "conv1"),
    "train__ema_decay": 0.9,
    "train__steps": 4,
    "log__validate_every": 0,
    "model__compute_dtype": "bfloat16",
    "model__frozen_dtype": "int8",  # in training alone: what leaves has the folder's own numbers
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("tiny"))


def digests(folder) -> dict[str, str]:
    files = sorted(p for p in pathlib.Path(folder).rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def lora_run(made, tmp_path_factory):
    """(workdir of a LoRA run of four steps, the base's files before it)."""
    before = digests(made[0])
    workdir = tmp_path_factory.mktemp("lora")
    run(tiny.make_config(*made, **LORA), workdir)
    return workdir, before


def unet(folder) -> dict[str, np.ndarray]:
    return diffusers_io.state_dict(diffusers_io.load_unet(folder))


def relative(a: dict, b: dict) -> float:
    names = sorted(a)
    assert names == sorted(b)
    flat = [np.concatenate([x[n].ravel() for n in names]) for x in (a, b)]
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1]))


@pytest.mark.long
def test_a_lora_run_leaves_the_base_and_writes_both_forms(made, lora_run):
    workdir, before = lora_run
    assert digests(made[0]) == before
    tuned, base = unet(workdir / "export"), unet(made[0])
    changed = {name for name in base if not np.array_equal(tuned[name], base[name])}
    kernels = (".to_q.weight", ".to_out.0.weight", ".ff.net.2.weight", ".conv1.weight")
    assert changed == {name for name in base if name.endswith(kernels)}
    adapters = diffusers_io.load_lora(workdir / "lora")
    assert len(adapters) == 2 * len(changed)
    others = digests(workdir / "export")
    for name, digest in before.items():  # carried over unchanged
        if not name.startswith("unet/") and name != "model_index.json":
            assert others[name] == digest, name
    index = json.loads((workdir / "checkpoints" / "4" / "index" / "metadata").read_text())
    saved = [name for name, leaf in index["leaves"].items() if leaf["shape"]]
    assert len(saved) == 4 * len(adapters)  # parameters, their average, and two moments
    assert all(".lora_" in name for name in saved)


@pytest.mark.long
def test_adapters_and_merged_are_the_same_model_in_pytorch(lora_run, tmp_path):
    workdir, _ = lora_run
    convert(workdir=workdir, out=tmp_path / "lora", verify=True)
    assert not (tmp_path / "lora" / "unet").exists()
    convert(workdir=workdir, out=tmp_path / "merged", merge=True, verify=True)
    assert relative(unet(tmp_path / "merged"), unet(workdir / "export")) == 0
    with pytest.raises(ValueError, match=r"holds \[2, 4\]|there are \[2, 4\]"):
        convert(workdir=workdir, out=tmp_path / "five", at=5)


@pytest.mark.long
def test_kohya_keys_are_the_same_adapters(made, lora_run, tmp_path):
    workdir, _ = lora_run
    convert(workdir=workdir, out=tmp_path / "lora", lora_keys="kohya", verify=True)
    names = load_file(tmp_path / "lora" / diffusers_io.LORA_FILE)
    assert all(name.startswith("lora_unet_") for name in names)
    got = diffusers_io.load_lora(tmp_path / "lora", model=diffusers_io.load_unet(made[0]))
    assert relative(got, diffusers_io.load_lora(workdir / "lora")) == 0
    config = tiny.make_config(*made, **LORA, model__start=str(tmp_path / "lora"))
    _, params = train.prepare(config, epath.Path(tmp_path / "nowhere"))  # trained on from this file
    scale = {path: 2 if ".lora_B." in path else 1 for path in got}  # lora.alpha / lora.rank
    assert relative({path: scale[path] * np.asarray(x) for path, x in params.items()}, got) == 0
    with pytest.raises(ValueError, match="names what a LoRA file holds, but a pipeline is"):
        convert(workdir=workdir, out=tmp_path / "x", lora_keys="kohya", merge=True)


def test_kohya_keys_are_of_unets():
    trained = Trained(str(digits.FLOW_PIPELINE), None, None)
    check_keys(trained, "diffusers")
    with pytest.raises(ValueError, match=r"written for UNets .*of the family sd3 .StableDiff"):
        check_keys(trained, "kohya")


@pytest.mark.long
def test_policy_and_average_are_both_at_hand(lora_run, tmp_path):
    workdir, _ = lora_run
    found = {}
    for weights in ("policy", "ema", "auto"):
        convert(workdir=workdir, out=tmp_path / weights, weights=weights)
        found[weights] = diffusers_io.load_lora(tmp_path / weights)
    assert relative(found["auto"], found["ema"]) == 0
    assert 0 < relative(found["policy"], found["ema"]) < 1


@pytest.mark.long
def test_dtype_shards_and_card(made, lora_run, tmp_path):
    workdir, _ = lora_run
    out = tmp_path / "out"
    convert(workdir=workdir, out=out, merge=True, dtype="float16", shard_bytes=30_000, verify=True)
    shards = sorted((out / "unet").glob("*.safetensors"))
    assert len(shards) > 1
    assert max(p.stat().st_size for p in shards) < 50_000
    assert {x.dtype.name for p in shards for x in load_file(p).values()} == {"float16"}
    card = (out / "README.md").read_text()
    front = card.split("---")[1]
    for line in ("library_name: diffusers", "- dmpo", "- lora"):
        assert line in front
    for words in (
        "after 4 updates",
        f"{open_pairs(made[1]).meta.counts['train']} distinct preference pairs",
        "| lora.rank | 2 |",
        "| loss |",
    ):
        assert words in card


@pytest.mark.long
def test_what_differs_is_not_verified(lora_run, tmp_path, monkeypatch):
    workdir, _ = lora_run
    from dmpo_jax.export import verify

    def spoilt(*args, **kw):
        loaded = original(*args, **kw)
        return {path: 2 * x for path, x in loaded.items()}

    original = diffusers_io.load_lora
    monkeypatch.setattr(verify.diffusers_io, "load_lora", spoilt)
    with pytest.raises(ValueError, match="do not use what was exported"):
        convert(workdir=workdir, out=tmp_path / "out", verify=True)


@pytest.mark.long
def test_refusals(made, lora_run, tmp_path):
    config = json.loads((lora_run[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "train.ema_decay": 0.0}))
    with pytest.raises(ValueError, match="kept no moving average"):
        convert(workdir=tmp_path, out=tmp_path / "x", weights="ema")
    with pytest.raises(ValueError, match="there are no checkpoints in"):
        convert(workdir=tmp_path, out=tmp_path / "x")
    with pytest.raises(ValueError, match=r"pytorch_lora_weights\.safetensors is missing"):
        diffusers_io.load_lora(tmp_path)
    save_file({"text_encoder.q.lora_A.weight": np.zeros(2)}, tmp_path / diffusers_io.LORA_FILE)
    with pytest.raises(ValueError, match=r"'text_encoder\.q\.lora_A.*only adapters of its unet"):
        diffusers_io.load_lora(tmp_path)
