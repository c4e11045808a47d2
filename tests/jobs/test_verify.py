"""Tests for dmpo_jax/jobs/verify.py: every file that we write, damaged in turn, is named."""

import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dmpo_jax.jobs.run import run
from dmpo_jax.jobs.verify import verify
from tests.support import outside_family, tiny

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def _registered():
    with outside_family.registered():
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory, _registered):
    """The workdir of a LoRA run that encoded its pairs."""
    folder = tmp_path_factory.mktemp("verified")
    model, _ = tiny.write(folder, outside_family.write)
    config = tiny.make_config(
        model,
        "",
        data__source=f"pickapic:{folder / 'pairs.parquet'}",
        jobs=("encode", "train"),
        lora__rank=2,
        lora__targets=("proj_out",),
        train__steps=2,
        log__validate_every=0,
    )
    run(config, folder / "run")
    shutil.copy(folder / "pairs.parquet", folder / "run")  # as collect leaves it
    return folder / "run"


@pytest.fixture
def workdir(original, tmp_path):
    return pathlib.Path(shutil.copytree(original, tmp_path / "run"))


@pytest.mark.long
def test_what_a_run_wrote_is_valid_and_nothing_is_left_out(workdir):
    parts = {str(pathlib.Path(part).relative_to(workdir)) for part in verify(folder=workdir)}
    assert {"checkpoints/2", "encoded/encoded.json", "export", "pairs.parquet"} <= parts
    assert {"export/transformer", "export/vae", "export/text_encoder", "config.json"} <= parts
    assert "lora/pytorch_lora_weights.safetensors" in parts
    assert "encoded/prompts.array_record-00000" in parts


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(bytes(content))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.long
@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.parametrize(
    "pattern",
    [
        "encoded/encoded_pairs-train.array_record-00000",
        "encoded/prompts.array_record-00000",
        "checkpoints/2/state/d/*",
        "checkpoints/2/index/metadata",
        "pairs.parquet",
    ],
)
def test_damage_is_named(pattern, damage, workdir):
    file = max(workdir.glob(pattern), key=lambda path: path.stat().st_size)
    damage(file)
    with pytest.raises(ValueError, match=r"1 of \d+ parts of .* not valid") as error:
        verify(folder=workdir)
    inside, _, name = pattern.partition("/")
    assert str(workdir / inside) in str(error.value)
    assert inside != "encoded" or name in str(error.value)


@pytest.mark.parametrize("part", ["export/transformer", "export/vae", "lora"])
def test_weights_that_are_cut_or_not_finite_are_named(part, workdir):
    (file,) = (workdir / part).glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file({**tensors, name: np.full_like(tensors[name], np.nan)}, file)
    with pytest.raises(ValueError, match=rf"numbers of {name} are not finite"):
        verify(folder=workdir)
    cut(file)
    with pytest.raises(ValueError, match=r"cannot be read as safetensors"):
        verify(folder=workdir)


def test_what_did_not_finish_or_is_not_ours(workdir, tmp_path):
    (workdir / "encoded" / "encoded.json").unlink()
    with pytest.raises(ValueError, match=r"1 of (?s:.*)encoding did not finish"):
        verify(folder=workdir)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds nothing to verify"):
        verify(folder=tmp_path / "empty")
    with pytest.raises(ValueError, match="is no folder"):
        verify(folder=tmp_path / "none")
