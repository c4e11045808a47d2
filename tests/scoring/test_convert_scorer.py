"""A published pickle becomes a scorer's folder; one that would run code is refused."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dmpo_jax.jobs.convert_scorer import convert_scorer
from dmpo_jax.scoring import convert, make_scorer, published
from tests.support import reward_folders

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
PROMPTS = ["a handwritten two", "zero", "nine"]


def images():
    return np.random.default_rng(0).integers(0, 256, (3, 40, 47, 3), np.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    return path, reward_folders.write_clip(path)


@pytest.fixture
def small(clip, monkeypatch):
    """The published kinds, at the sizes of the tests."""
    config = json.loads((clip[0] / "config.json").read_text())
    kinds = {
        kind: how._replace(config=config) if how.config else how
        for kind, how in published.PUBLISHED.items()
    }
    monkeypatch.setattr(published, "PUBLISHED", kinds)
    monkeypatch.setattr(convert, "PUBLISHED", kinds)
    monkeypatch.setattr(convert.blip, "KEYS", {**convert.blip.KEYS, **reward_folders.REWARD})
    return clip


def scores(spec):
    scorer = make_scorer(spec)
    scorer.check(PROMPTS)
    return scorer(images(), PROMPTS)


def test_hpsv2_as_it_is_published(small, tmp_path):
    """A dict with `state_dict`, in open_clip's names and half precision."""
    path, model = small
    state = {k: v.half() for k, v in reward_folders.open_clip_state(model).items()}
    torch.save({"epoch": 3, "state_dict": state, "name": "x"}, tmp_path / "HPS.pt")
    convert_scorer(scorer=f"hpsv2:{tmp_path / 'HPS.pt'}", out=tmp_path / "out", like=str(path))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[k], state[k]) for k in state)
    half = reward_folders.write_open_clip(tmp_path / "half", model)
    save_file(
        {k: v.half().contiguous() for k, v in half.items()}, tmp_path / "half" / "model.safetensors"
    )
    got, want = scores(f"hpsv2:{tmp_path / 'out'}"), scores(f"hpsv2:{tmp_path / 'half'}")
    np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match="holds weights already"):
        convert_scorer(scorer=f"hpsv2:{tmp_path / 'HPS.pt'}", out=tmp_path / "out", like=str(path))


def test_bfloat16_and_the_format_before_zip(small, tmp_path):
    path, model = small
    state = {k: v.bfloat16() for k, v in model.state_dict().items()}
    torch.save(state, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    convert_scorer(scorer=f"pickscore:{tmp_path / 'a.bin'}", out=tmp_path / "out", like=str(path))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[k], state[k]) for k in state)
    assert np.isfinite(scores(f"pickscore:{tmp_path / 'out'}")).all()


def test_image_reward_as_it_is_published(small, tmp_path):
    parts = reward_folders.write_image_reward(tmp_path / "own")
    state = reward_folders.image_reward_state(*parts)
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(state, tmp_path / "ImageReward.pt")
    convert_scorer(
        scorer=f"imagereward:{tmp_path / 'ImageReward.pt'}",
        out=tmp_path / "out",
        like=str(tmp_path / "own"),
    )
    got, want = (scores(f"imagereward:{tmp_path / name}") for name in ("out", "own"))
    np.testing.assert_array_equal(got, want)


def test_the_aesthetic_head_comes_to_its_clip_model(small, tmp_path):
    path, _ = small
    torch.save(reward_folders.head_state(), tmp_path / "head.pth")
    spec = f"aesthetic:{tmp_path / 'head.pth'}"
    convert_scorer(scorer=spec, out=tmp_path / "out", like=str(path))
    shutil.copytree(path, tmp_path / "by_hand")
    save_file(reward_folders.head_state(), tmp_path / "by_hand" / "head.safetensors")
    got, want = (scores(f"aesthetic:{tmp_path / name}") for name in ("out", "by_hand"))
    np.testing.assert_array_equal(got, want)


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("plain", [True, False])
def test_a_malicious_pickle_is_refused_and_runs_nothing(plain, clip, tmp_path):
    path, _ = clip
    evil = {"state_dict": Malicious(tmp_path / "ran"), "x": torch.zeros(2)}
    if plain:
        (tmp_path / "a.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    else:
        torch.save(evil, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"without running code.*published as HPSv2 in") as e:
        convert_scorer(scorer=f"hpsv2:{tmp_path / 'a.pt'}", out=tmp_path / "out", like=str(path))
    assert "\n" not in str(e.value)
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "out").glob("*.*"))


def test_what_is_no_such_scorer_is_refused_and_leaves_nothing(small, tmp_path):
    path, model = small
    state = reward_folders.open_clip_state(model)
    del state["visual.ln_post.bias"]
    torch.save(state, tmp_path / "a.pt")
    spec = f"hpsv2:{tmp_path / 'a.pt'}"
    with pytest.raises(ValueError, match=r"1 missing: vision_model\.post_layernorm\.bias"):
        convert_scorer(scorer=spec, out=tmp_path / "out", like=str(path))
    assert not list((tmp_path / "out").glob("*.*"))
    # Nor does it take anything: what lies there before is refused, not replaced.
    (tmp_path / "own").mkdir()
    shutil.copy(path / "vocab.json", tmp_path / "own")
    shutil.copy(path / "merges.txt", tmp_path / "own")
    with pytest.raises(ValueError, match=r"own holds .*vocab\.json.* already: choose another"):
        convert_scorer(scorer=spec, out=tmp_path / "own", like=str(tmp_path / "own"))
    assert {"vocab.json", "merges.txt"} <= {x.name for x in (tmp_path / "own").iterdir()}
    torch.save({"state_dict": {"a": 3}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds no state dict: a"):
        convert_scorer(scorer=spec, out=tmp_path / "out", like=str(path))
    with pytest.raises(ValueError, match="--like is needed"):
        convert_scorer(scorer=spec, out=tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"lacks its tokenizer: tokenizer\.json, or vocab\.json"):
        convert_scorer(scorer=spec, out=tmp_path / "out", like=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="does not exist"):
        convert_scorer(scorer="hpsv2:nowhere.pt", out=tmp_path / "out", like=str(path))
    with pytest.raises(ValueError, match="KIND:FILE with a kind of pickscore, hpsv2"):
        convert_scorer(scorer="mps:a.pt", out=tmp_path / "out", like=str(path))
