"""ImageReward gives the scores of transformers' BLIP parts and the published head."""

import numpy as np
import pytest
import torch

from dmpo_jax.scoring import make_scorer, pixels
from tests.support import reward_folders

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
PROMPTS = ["a handwritten two", "a cat", "of " * 60, "[ENC] three", ""]


def images():
    return np.random.default_rng(0).integers(0, 256, (5, 40, 47, 3), np.uint8)


def test_scores_are_transformers_blip(tmp_path):
    from transformers import BertTokenizer

    seen, read, head = reward_folders.write_image_reward(tmp_path)
    tokenizer = BertTokenizer.from_pretrained(str(tmp_path))
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids("[ENC]") == len(reward_folders.WORDS) + 1
    tokens = tokenizer(
        PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    given = torch.tensor(pixels.cropped(images(), reward_folders.SIDE, odd="even"))
    with torch.no_grad():
        states = seen(given.permute(0, 3, 1, 2)).last_hidden_state
        out = read(
            tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=states,
            encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.long),
        ).last_hidden_state[:, 0]
    raw = reward_folders.apply_head(head, out)
    want = (raw - 0.16717362830052426) / 1.0333394966054072
    scorer = make_scorer(f"imagereward:{tmp_path}")
    scorer.check(PROMPTS)
    got = scorer(images(), PROMPTS)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)
    assert want.std() > 1e-2
    np.testing.assert_allclose(scorer.temperature, 1 / 1.0333394966054072)
    np.testing.assert_array_equal(scorer(images()[1:2], PROMPTS[1:2]), got[1:2])


def test_the_prompts_end_is_said_not_to_count(tmp_path, caplog):
    reward_folders.write_image_reward(tmp_path)
    make_scorer(f"imagereward:{tmp_path}").check(PROMPTS)
    assert "the ends of 1 of 5 prompts do not count" in caplog.text
