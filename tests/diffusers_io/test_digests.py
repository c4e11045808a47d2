"""Tests for dmpo_jax/diffusers_io/digests.py and the samples of storage.py behind it."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dmpo_jax import diffusers_io, storage
from tests.support import tiny


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digests") / "model"
    tiny.write_model(folder)
    return folder


@pytest.fixture
def model(original, tmp_path):
    return shutil.copytree(original, tmp_path / "elsewhere")


def digests(folder) -> dict[str, str]:
    return {"unet": diffusers_io.digest_model(folder), **diffusers_io.digest_encoders(folder)}


def test_a_copy_has_the_same_digests(original, model):
    config = json.loads((model / "unet" / "config.json").read_text())
    config |= {"_diffusers_version": "9", "_name_or_path": "elsewhere"}
    (model / "unet" / "config.json").write_text(json.dumps(config))
    assert digests(model) == digests(original)
    assert digests(model).keys() == {"unet", "vae", "text_encoder"}


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_other_weights_or_settings_of_a_part_change_its_digest_alone(part, original, model):
    before = digests(original)
    (file,) = (model / part).glob("*.safetensors")
    tensors = load_file(file)
    noise = np.random.default_rng(0)
    save_file({k: x + noise.normal(size=x.shape).astype(x.dtype) for k, x in tensors.items()}, file)
    after = digests(model)
    assert {name for name in before if after[name] != before[name]} == {part}
    save_file(tensors, file)
    config = json.loads((model / part / "config.json").read_text())
    (model / part / "config.json").write_text(json.dumps({**config, "another": 1}))
    assert {name for name in before if digests(model)[name] != before[name]} == {part}


def test_another_vae_and_the_variants_of_a_part(original, model, tmp_path):
    (file,) = (model / "vae").glob("*.safetensors")
    halves = {k: x.astype(np.float16) for k, x in load_file(file).items()}
    save_file(halves, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    found = diffusers_io.digest_variants(model, {"vae", "text_encoder"}, vae="", variant=None)
    assert {name: len(digests) for name, digests in found.items()} == {"vae": 2, "text_encoder": 1}
    assert not diffusers_io.digest_variants(model, {"prompts"}, vae="", variant=None)
    file.unlink()
    shutil.move(model / "vae", tmp_path / "fix")
    (tmp_path / "fix" / "diffusion_pytorch_model.fp16.safetensors").rename(
        tmp_path / "fix" / "diffusion_pytorch_model.safetensors"
    )
    fixed = diffusers_io.digest_encoders(original, vae=tmp_path / "fix")
    assert fixed["vae"] in found["vae"]
    assert fixed["text_encoder"] == digests(original)["text_encoder"]


def test_a_sample_sees_what_changes_a_file(tmp_path):
    """Small files to the last bit; of larger ones the size, both ends, and any change of 1/64."""
    rng, file = np.random.default_rng(0), tmp_path / "x"
    for size in (0, 1, storage.BLOCK, 5 * storage.BLOCK + 7):
        content = bytearray(rng.bytes(size))
        file.write_bytes(content)
        before = storage.sample_file(file)
        for at in {0, size // 2, size - 1} if size else ():
            content[at] ^= 1
            file.write_bytes(content)
            assert storage.sample_file(file) != before
            content[at] ^= 1
    size = 3 * storage.BLOCKS * storage.BLOCK
    content = bytearray(rng.bytes(size))
    file.write_bytes(content)
    before = storage.sample_file(file)
    for start in range(0, size, size // 50):
        changed = bytearray(content)
        changed[start : start + size // 50] = rng.bytes(len(changed[start : start + size // 50]))
        file.write_bytes(changed)
        assert storage.sample_file(file) != before, start
    file.write_bytes(content + b"x")
    assert storage.sample_file(file) != before
