"""The scorers by CLIP's embeddings give transformers' scores, in both namings of the weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dmpo_jax.scoring import make_scorer, pixels
from tests.support import reward_folders

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
PROMPTS = ["a handwritten two", "a handwritten three, seven and nine of them", "zero"] * 3


def images(count=9, height=40, width=47):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def embeddings(model, folder, how="floor", prompts=PROMPTS):
    """(images' and texts' unit embeddings, exp(logit_scale)) by transformers."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(folder))
    seen = torch.tensor(pixels.prepare(images(), reward_folders.SIDE, how)).permute(0, 3, 1, 2)
    read = tokenizer(
        list(prompts), padding=True, truncation=True, max_length=12, return_tensors="pt"
    )
    with torch.no_grad():
        both = (
            model.get_image_features(seen).pooler_output,
            model.get_text_features(**read).pooler_output,
        )
        scale = model.logit_scale.exp()
    return *(torch.nn.functional.normalize(x).numpy() for x in both), float(scale)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    return path, reward_folders.write_clip(path)


@pytest.mark.parametrize(
    ("kind", "how", "scaled", "temperature"),
    [
        ("pickscore", "floor", True, 1.0),
        ("hpsv2", "padded", False, 0.01),
        ("hpsv21", "padded", False, 0.01),
        ("clip", "even", False, None),
    ],
)
def test_scores_are_transformers(kind, how, scaled, temperature, folder):
    path, model = folder
    seen, read, scale = embeddings(model, path, how)
    want = (seen * read).sum(-1) * (scale if scaled else 1)
    scorer = make_scorer(f"{kind}:{path}")
    scorer.check(PROMPTS)
    got = scorer(images(), PROMPTS)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)
    assert want.std() > 1e-2  # scores that differ
    np.testing.assert_allclose(scorer.features(images()), seen, atol=1e-5)
    assert scorer.temperature == temperature
    assert scorer.uses_prompt
    # An image's score is its own, whatever it is scored with.
    np.testing.assert_array_equal(scorer(images()[3:5], PROMPTS[3:5]), got[3:5])


def test_preprocessing_is_the_processors(folder):
    """From pictures to scores by transformers alone, as PickScore's own code goes."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    path, model = folder
    side = {"height": reward_folders.SIDE, "width": reward_folders.SIDE}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=side)
    seen = processor([Image.fromarray(x) for x in images()], return_tensors="pt")
    with torch.no_grad():
        seen = torch.nn.functional.normalize(model.get_image_features(**seen).pooler_output)
    _, read, scale = embeddings(model, path)
    got = make_scorer(f"pickscore:{path}")(images(), PROMPTS)
    np.testing.assert_allclose(got, scale * (seen.numpy() * read).sum(-1), atol=1e-5)


def test_aesthetic_is_its_layers_one_after_another(tmp_path):
    model = reward_folders.write_clip(tmp_path, act="quick_gelu")
    head = reward_folders.head_state()
    save_file(head, tmp_path / "sac+logos+ava1-l14-linearMSE.safetensors")
    seen, _, _ = embeddings(model, tmp_path, "even")
    want = reward_folders.apply_head(head, torch.tensor(seen))
    scorer = make_scorer(f"aesthetic:{tmp_path}")
    scorer.check(PROMPTS)
    np.testing.assert_allclose(scorer(images(), PROMPTS), want, atol=1e-5)
    assert scorer.temperature is None
    assert not scorer.uses_prompt


@pytest.mark.parametrize("config", [True, False])
def test_open_clips_naming(config, tmp_path):
    """Against a CLIP in open_clip's own layout, which PyTorch's fused attention computes."""
    model = reward_folders.clip_model()
    state = reward_folders.write_open_clip(tmp_path, model, config=config)
    if not config:
        model.config.save_pretrained(tmp_path)
    theirs = reward_folders.OpenClip(model.config.text_config.vocab_size).eval()
    theirs.load_state_dict(state)
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(tmp_path))
    ids = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=12)["input_ids"]
    # open_clip pads by 0 after the end token.
    ids = torch.tensor(ids)
    ends = (ids == tokenizer.eos_token_id).int().argmax(-1)
    ids = torch.where(torch.arange(12)[None] > ends[:, None], 0, ids)
    seen = torch.tensor(pixels.padded(images(), reward_folders.SIDE)).permute(0, 3, 1, 2)
    with torch.no_grad():
        both = (theirs.visual(seen), theirs.encode_text(ids))
    seen, read = (torch.nn.functional.normalize(x).numpy() for x in both)
    scorer = make_scorer(f"hpsv2:{tmp_path}")
    scorer.check(PROMPTS)
    got = scorer(images(), PROMPTS)
    np.testing.assert_allclose(got, (seen * read).sum(-1), atol=1e-5)
    assert got.std() > 1e-2


def test_a_prompt_is_embedded_once_and_all_announced_ones_together(folder, monkeypatch):
    from dmpo_jax.diffusers_io import reward_folders as io

    loads = []
    load = io.load_text_tower
    monkeypatch.setattr(
        io, "load_text_tower", lambda found, **kw: loads.append(kw) or load(found, **kw)
    )
    scorer = make_scorer(f"pickscore:{folder[0]}")
    scorer.check(PROMPTS)
    loads.clear()
    for i in range(3):
        scorer(images()[i : i + 1], PROMPTS[i : i + 1])
    assert len(loads) == 1
    scorer(images()[:1], ["a handwritten nine"])
    assert len(loads) == 2


def test_the_version_is_of_the_content(folder, tmp_path):
    path, model = folder
    version = make_scorer(f"pickscore:{path}").version
    model.save_pretrained(tmp_path / "moved")
    assert make_scorer(f"pickscore:{tmp_path / 'moved'}").version == version
    assert make_scorer(f"clip:{path}").version != version
    reward_folders.write_clip(tmp_path / "other", seed=1)
    assert make_scorer(f"pickscore:{tmp_path / 'other'}").version != version
    # Another activation is another scorer, though the weights are the same.
    config = (path / "config.json").read_text()
    (tmp_path / "moved" / "config.json").write_text(config.replace("gelu", "quick_gelu"))
    assert make_scorer(f"pickscore:{tmp_path / 'moved'}").version != version


def test_shards_are_read(tmp_path):
    model = reward_folders.write_clip(tmp_path / "one")
    reward_folders.write_clip(tmp_path / "more")
    (tmp_path / "more" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "more", max_shard_size="20KB")
    assert len(list((tmp_path / "more").glob("*.safetensors"))) > 1
    one, more = (make_scorer(f"pickscore:{tmp_path / name}") for name in ("one", "more"))
    more.check(PROMPTS)
    np.testing.assert_array_equal(one(images(), PROMPTS), more(images(), PROMPTS))


def test_a_folder_of_transformers_4_is_read(folder, tmp_path):
    """Its config states the towers twice, with generation's defaults; its weights hold buffers."""
    path, model = folder
    reward_folders.write_clip(tmp_path)
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    for tower, count in (("text_model", 12), ("vision_model", 17)):
        tensors[f"{tower}.embeddings.position_ids"] = torch.arange(count)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    junk = {"max_length": 20, "id2label": {"0": "LABEL_0"}, "top_k": 50, "typical_p": 1.0}
    for side in ("text", "vision"):
        own = config[f"{side}_config"]
        twice = ("hidden_size", "num_hidden_layers", "num_attention_heads")
        config[f"{side}_config_dict"] = {key: own.pop(key) for key in twice}
        own |= {**junk, "hidden_size": 4096, "dropout": 0.0, "torch_dtype": None}
    config |= {
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "torch_dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    old, new = make_scorer(f"pickscore:{tmp_path}"), make_scorer(f"pickscore:{path}")
    old.check(PROMPTS)
    np.testing.assert_array_equal(old(images(), PROMPTS), new(images(), PROMPTS))
