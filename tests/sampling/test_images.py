"""Tests for dmpo_jax/sampling/images.py."""

import numpy as np
import pytest
from PIL import Image

from dmpo_jax.sampling import images as image_files


def test_grid_places_every_image_and_draws_captions():
    images = np.random.default_rng(0).integers(0, 200, (5, 8, 9, 3), np.uint8)
    plain = np.asarray(image_files.image_grid(images, 3, scale=2))
    big = images.repeat(2, 1).repeat(2, 2)
    gap = 4
    assert plain.shape == (gap + 2 * (16 + gap), gap + 3 * (18 + gap), 3)
    for i, image in enumerate(big):
        y, x = gap + i // 3 * (16 + gap), gap + i % 3 * (18 + gap)
        np.testing.assert_array_equal(plain[y : y + 16, x : x + 18], image)
    assert (plain[gap + 16 + gap :, gap + 2 * (18 + gap) :] == 255).all()
    told = np.asarray(image_files.image_grid(images, 3, labels=["one", "two"]))
    white = np.asarray(image_files.image_grid(images, 3, labels=["", ""]))
    assert told.shape == white.shape
    assert told.sum() < white.sum()
    with pytest.raises(ValueError, match="labels must have 2 texts, but got 1"):
        image_files.image_grid(images, 3, labels=["one"])


def test_captions_keep_inside_the_sheet():
    images = np.full((1, 32, 32, 3), 255, np.uint8)
    for caption in ("word " * 100, "x" * 500):
        sheet = np.asarray(image_files.image_grid(images, 1, labels=[caption]))
        assert (sheet < 255).any()
        assert (sheet[:, -4:] == 255).all()


def test_png_is_whole(tmp_path):
    image = image_files.image_grid(np.zeros((2, 4, 4, 3), np.uint8), 2)
    image_files.save_png(tmp_path / "samples" / "10.png", image)
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["10.png"]
    np.testing.assert_array_equal(Image.open(tmp_path / "samples" / "10.png"), image)
