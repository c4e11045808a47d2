"""Tests for the picture of a comparison."""

import numpy as np

from dmpo_jax.evaluation.picture import before_after, rows_shown, small


def test_the_picture_shows_whole_rows():
    prompts = ["a", "b", "a", "a", "b", "c"]
    rows = rows_shown(prompts, 2)
    assert rows == {"a": [0, 2], "b": [1, 4]}
    assert rows_shown(prompts, 8) == rows  # as many as half of the prompts have
    few = rows_shown([str(i) for i in range(256)], 8)
    assert few == {str(i): [i] for i in range(12)}  # each with its prompt, and not all
    assert len(rows_shown([str(i % 40) for i in range(400)], 8)) == 12
    model = {i: np.full((64, 64, 3), i, np.uint8) for i in range(6)}
    picture = before_after(model, model, rows)
    assert picture.size[0] > 2 * 128
    assert picture.size[1] > 4 * 128


def test_the_picture_of_large_images_is_small():
    image = np.zeros((512, 768, 3), np.uint8)
    prompts = [f"prompt {i % 3}" for i in range(24)]
    rows = rows_shown(prompts, 8)
    shown = {i for row in rows.values() for i in row}
    kept = {i: small(image) for i in shown}
    assert kept[0].shape == (171, 256, 3)
    width, height = before_after(kept, kept, rows).size
    assert 8 * 256 < width < 8 * 300
    assert 6 * 171 < height < 6 * 230


def test_the_picture_takes_images_of_different_sizes():
    """Folders of other programs may hold any."""
    base = {0: np.zeros((32, 32, 3), np.uint8), 1: np.zeros((16, 24, 3), np.uint8)}
    policy = {0: np.full((8, 8, 3), 255, np.uint8), 1: np.full((64, 32, 3), 255, np.uint8)}
    picture = np.asarray(before_after(base, policy, {"a": [0, 1]}))
    same = {i: np.zeros((32, 32, 3), np.uint8) for i in (0, 1)}
    assert picture.shape == np.asarray(before_after(same, same, {"a": [0, 1]})).shape
