"""Folders of SD3 that cannot be what they say: one line each, before anything compiles."""

import json
import re
import shutil

import pytest
from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.families import SD3
from dmpo_jax.models import parameters
from dmpo_jax.toy import debug
from tests.support import tiny
from tests.support.model_folders import edit_json


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3") / "model"
    debug.write_tiny_pipeline(epath.Path(folder), SD3)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "model")
    return tmp_path / "model"


def load(folder):
    diffusers_io.load_pipeline(folder)
    diffusers_io.load_model(folder, abstract=True)


def test_a_whole_folder_loads(folder):
    load(folder)
    _, family = diffusers_io.load_family(folder)
    assert family is SD3


def cut_in_shards(folder):
    model = diffusers_io.load_model(folder)
    diffusers_io.save_model(model, folder / "transformer", shard_bytes=100_000)
    shards = sorted((folder / "transformer").glob("*-of-*.safetensors"))
    shards[1].unlink()


def swap_encoders(folder):
    shutil.rmtree(folder / "text_encoder_3")
    shutil.copytree(folder / "text_encoder", folder / "text_encoder_3")


def widen_t5(folder):
    edit_json(folder / "text_encoder_3" / "config.json", d_model=64)


def drop_projection(folder):
    edit_json(folder / "text_encoder_2" / "config.json", architectures=["CLIPTextModel"])


def widen_projection(folder):
    edit_json(folder / "text_encoder" / "config.json", projection_dim=20)


def add_key(folder):
    edit_json(folder / "transformer" / "config.json", context_refiner_layers=2)


def drop_scheduler_class(folder):
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    del config["_class_name"]
    file.write_text(json.dumps(config))


def drop_tokenizer(folder):
    (folder / "tokenizer_3" / "tokenizer.json").unlink()


BAD = [
    (cut_in_shards, r"index.json names 1 shards that are missing: diffusion_pytorch_model-00002"),
    (
        swap_encoders,
        r"text_encoder_3 should hold a T5EncoderModel, .*'CLIPTextModelWithProjection'",
    ),
    (widen_t5, r"attends to width 48 \(joint_attention_dim\), but text_encoder_3 gives 64"),
    (
        drop_projection,
        r"text_encoder_2 should hold a CLIPTextModelWithProjection, .*'CLIPTextModel'",
    ),
    (widen_projection, r"pooled embedding of width 40 .* project to 20 \+ 24 \(projection_dim\)"),
    (add_key, r"transformer/config.json .*context_refiner_layers=2"),
    (drop_scheduler_class, r"scheduler_config.json names None, whose noise is .* 'flow'"),
    (drop_tokenizer, r"tokenizer_3 holds no valid tokenizer"),
]


@pytest.mark.parametrize(("spoil", "says"), BAD, ids=[spoil.__name__ for spoil, _ in BAD])
def test_it_is_refused_in_one_line(spoil, says, folder):
    spoil(folder)
    with pytest.raises(ValueError) as error:
        load(folder)
    message = str(error.value)
    assert re.search(says, message), message
    assert "\n" not in message
    assert len(message) < 1000


def test_a_vae_of_other_channels_is_refused_before_encoding(folder, tmp_path):
    config = debug.vae_config(SD3) | {"latent_channels": 12}
    shutil.rmtree(folder / "vae")
    diffusers_io.save_vae(parameters.initialise(SD3.vae, config, 0), folder / "vae")
    with pytest.raises(ValueError, match="model takes 16 channels, but sd3 models take 12 of the"):
        tiny.encode("pickapic:nowhere.parquet", folder, tmp_path / "out")
