"""A score that is not a number is an error that names its image, not a loss."""

import numpy as np
import pytest

from dmpo_jax.evaluation.judging import judge


class Blind:
    """A judge that cannot judge the sixth image."""

    name, version, temperature, uses_prompt = "blind", "1", 1.0, False

    def check(self, prompts):
        pass

    def __call__(self, images, prompts):
        return np.where(images[:, 0, 0, 0] == 5, np.nan, 1.0).astype(np.float32)


def test_a_judge_that_gives_nan_is_named_with_image_and_prompt():
    images = np.arange(8, dtype=np.uint8)[:, None, None, None] * np.ones((2, 2, 3), np.uint8)
    batches = (images[i : i + 4] for i in (0, 4))
    prompts = [f"prompt {i}" for i in range(8)]
    with pytest.raises(
        ValueError, match=r"judge 'blind' gave the score nan to image 5 \(prompt 'pr"
    ):
        judge(batches, prompts, {"blind": Blind()}, ())
