"""PickScore at its full size, 986 million random weights: ours equals transformers'.

    pytest -m slow tests/scoring/test_full_size_clip.py -s

One side at a time is in memory; -s shows the errors, seconds and gigabytes.
"""

import gc
import json
import shutil
import time

import numpy as np
import pytest
import torch

from dmpo_jax.scoring import make_scorer, pixels
from dmpo_jax.scoring.published import VIT_H_14
from tests.support import full_size, reward_folders

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
PROMPTS = ["a handwritten two", "a handwritten three, seven and nine of them"]
COUNT = 986_109_441


def images():
    """Smooth pictures that differ: noise alone would look alike to a patch of random weights."""
    ramp = np.linspace(0, 255, 300)[None, :, None] * np.array([[[1.0, 0.6, 0.2]]])
    one = np.broadcast_to(ramp, (260, 300, 3))
    return np.stack([one, 255 - one[:, ::-1] / 2]).astype(np.uint8)


def theirs(folder):
    """Writes the folder; returns transformers' unit embeddings and scores."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    words = json.loads((reward_folders.TOKENIZER / "vocab.json").read_text())
    text = {**VIT_H_14["text_config"], "eos_token_id": words["<|endoftext|>"]}
    config = CLIPConfig(**{**VIT_H_14, "text_config": text, "architectures": None})
    with torch.no_grad():
        model = CLIPModel(config).eval()
        full_size.draw(model, torch.Generator().manual_seed(0))
        model.logit_scale.fill_(np.log(100))
        assert sum(x.numel() for x in model.parameters()) == COUNT
        shutil.copytree(reward_folders.TOKENIZER, folder, dirs_exist_ok=True)
        read = CLIPTokenizer.from_pretrained(str(folder))(
            PROMPTS, padding=True, return_tensors="pt"
        )
        seen = torch.tensor(pixels.cropped(images(), 224, odd="floor")).permute(0, 3, 1, 2)
        both = (model.get_image_features(seen), model.get_text_features(**read))
        both = [torch.nn.functional.normalize(x.pooler_output).numpy() for x in both]
    model.save_pretrained(folder)
    return both[0], 100 * (both[0] * both[1]).sum(-1)


def test_full_size(tmp_path):
    start = time.monotonic()
    try:
        features, want = theirs(tmp_path)
        gc.collect()
        drawn = time.monotonic()
        scorer = make_scorer(f"pickscore:{tmp_path}")
        scorer.check(PROMPTS)
        got = scorer(images(), PROMPTS)
        scored = time.monotonic()
        again = scorer(images(), PROMPTS)
        ended = time.monotonic()
    finally:
        shutil.rmtree(tmp_path)
    errors = {
        "features": float(np.abs(scorer.features(images()) - features).max()),
        "scores": float(np.abs(got - want).max()),
    }
    print(
        f"\nViT-H: errors {errors}, scores {want}; transformers {drawn - start:.0f} s, ours "
        f"{scored - drawn:.0f} s, warm {ended - scored:.1f} s; peak "
        f"{full_size.peak_gigabytes():.1f} GB"
    )
    np.testing.assert_array_equal(again, got)
    assert np.abs(want[0] - want[1]) > 0.1
    assert errors["features"] < 1e-5
    assert errors["scores"] < 1e-3  # of about 100 times the features' error
