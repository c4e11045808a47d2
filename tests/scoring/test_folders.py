"""A folder that is no such scorer's is refused by `check`, in one line, before its weights."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from dmpo_jax.diffusers_io import reward_folders as io
from dmpo_jax.scoring import make_scorer
from tests.support import reward_folders

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    reward_folders.write_clip(path / "clip")
    reward_folders.write_image_reward(path / "reward")
    return path


def fault(kind, folder, prompts=("a handwritten two",)) -> str:
    with pytest.raises(ValueError) as found:
        make_scorer(f"{kind}:{folder}").check(list(prompts))
    message = str(found.value)
    assert message.startswith(f"scorer {kind}: ")
    assert "\n" not in message
    return message


def edit(folder, side, **changes):
    config = json.loads((folder / "config.json").read_text())
    config[f"{side}_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def without(name):
    return lambda folder: (folder / name).unlink()


def pickles_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def bert(folder):
    config = {"architectures": ["BertModel"], "model_type": "bert"}
    (folder / "config.json").write_text(json.dumps(config))


def pipeline(folder):
    (folder / "model_index.json").write_text("{}")


def one_tower(folder):
    tensors = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if not k.startswith("vision")}
    save_file(kept, folder / "model.safetensors")


def no_scale(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["logit_scale"]
    save_file(tensors, folder / "model.safetensors")


def cut(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def two_files(folder):
    shutil.copy(folder / "model.safetensors", folder / "a.safetensors")
    (folder / "model.safetensors").rename(folder / "b.safetensors")


def other_pixels(folder):
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')


FAULTS = {
    "no weights": (without("model.safetensors"), "should hold model.safetensors, but holds"),
    "pickles": (
        pickles_only,
        r"pytorch_model\.bin, a pickle.*yuvalkir.*convert --scorer=pick",
    ),
    "no tokenizer": (without("vocab.json"), r"lacks its tokenizer: copy tokenizer\.json, or vocab"),
    "architecture": (bert, r"holds a \['BertModel'\], where a complete CLIPModel is needed"),
    "pipeline": (pipeline, "is a diffusers pipeline"),
    "text alone": (one_tower, "missing: vision_model"),
    "no scale": (no_scale, "have no logit_scale"),
    "cut": (cut, "cannot be read as safetensors"),
    "two files": (two_files, "holds 2 safetensors files"),
    "pixels": (other_pixels, r"image_mean=\[0\.5"),
    "text width": (
        lambda folder: edit(folder, "text", hidden_size=32),
        r"misshapen: text_model.* config\.json says",
    ),
    "vision depth": (
        lambda folder: edit(folder, "vision", num_hidden_layers=3),
        r"missing: vision_model\.encoder\.layers\.2",
    ),
    "activation": (lambda folder: edit(folder, "vision", hidden_act="tanh"), "hidden_act='tanh'"),
    "vocabulary": (lambda folder: edit(folder, "text", vocab_size=9), "it is another|misshapen"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_folder_is_refused_in_a_line(name, source, tmp_path, monkeypatch):
    folder = tmp_path / "clip"
    shutil.copytree(source / "clip", folder)
    spoil, words = FAULTS[name]
    spoil(folder)
    reads = []
    monkeypatch.setattr(io, "load_vision_tower", spy(reads, io.load_vision_tower))
    message = fault("pickscore", folder)
    assert re.search(words, message), message
    assert all(reads)  # abstract: not one of its tensors


def spy(reads, load):
    return lambda found, *, abstract=False: reads.append(abstract) or load(found, abstract=abstract)


def test_the_folder_must_be_there(tmp_path):
    assert "does not exist" in fault("pickscore", tmp_path / "nowhere")
    assert "needs a folder, hpsv2:FOLDER; its weights are published as" in fault("hpsv2", "")
    (tmp_path / "file").write_text("")
    assert "is a file" in fault("clip", tmp_path / "file")


def test_open_clips_other_architectures_are_named(tmp_path):
    model = reward_folders.clip_model()
    reward_folders.write_open_clip(tmp_path, model)
    path = tmp_path / "open_clip_config.json"
    given = json.loads(path.read_text())
    given["model_cfg"]["vision_cfg"]["attentional_pool"] = True
    path.write_text(json.dumps(given))
    assert "asks for attentional_pool" in fault("hpsv2", tmp_path)
    given["model_cfg"]["vision_cfg"] = {"layers": [3, 4, 6, 3], "width": 64}
    path.write_text(json.dumps(given))
    assert "supported: CLIP of two plain transformers" in fault("hpsv2", tmp_path)
    path.unlink()
    assert "neither config.json nor open_clip_config.json" in fault("clip", tmp_path)
    # Of HPSv2 the architecture is known, and this is not it.
    assert "misshapen" in fault("hpsv2", tmp_path)


def test_the_aesthetic_head_must_fit(source, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(source / "clip", folder)
    assert "lacks the head's safetensors file" in fault("aesthetic", folder)
    save_file(reward_folders.head_state(width=24), folder / "head.safetensors")
    assert "layers.0 takes 24 features, but gets 20" in fault("aesthetic", folder)


def test_image_rewards_folder(source, tmp_path):
    assert "not ImageReward" in fault("imagereward", source / "clip")
    folder = tmp_path / "reward"
    shutil.copytree(source / "reward", folder)
    (folder / "config.json").unlink()  # then it should be ImageReward 1.0
    assert "misshapen" in fault("imagereward", folder)
    (folder / "ImageReward.safetensors").rename(folder / "ImageReward.pt")
    assert "convert --scorer=imagereward:FILE" in fault("imagereward", folder)
    shutil.copytree(source / "reward", folder, dirs_exist_ok=True)
    (folder / "vocab.txt").unlink()
    assert "vocab.txt into it, as of bert-base-uncased" in fault("imagereward", folder)


def test_a_check_reads_no_weights(source, monkeypatch):
    """Of gigabytes: a scorer's folder is checked before each run."""
    monkeypatch.setattr(
        io.tensor_files.TensorFile,
        "read",
        lambda self, name, bounds: np.zeros(()) if name == "logit_scale" else 1 / 0,
    )
    make_scorer(f"pickscore:{source / 'clip'}").check(["a handwritten two"])
    make_scorer(f"imagereward:{source / 'reward'}").check(["a handwritten two"])
