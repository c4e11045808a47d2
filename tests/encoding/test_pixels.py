"""Tests for dmpo_jax/encoding/pixels.py: images to the pixels that are encoded."""

import numpy as np
import pytest
from PIL import Image

from dmpo_jax.data import sources
from dmpo_jax.data.encoded.pair import flip_sizes
from dmpo_jax.encoding import pixels
from tests.support.raw_pairs import png

SIDE = 32


def raw_pair(shape, name="x:0", **given):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*shape, 3), np.uint8)
    return sources.RawPair(name, "a", (png(image), png(255 - image)), 1.0, **given), image


def test_random_crops_are_of_the_id_alone():
    shape = (SIDE, 3 * SIDE)
    pairs = [raw_pair(shape, f"x:{i}")[0] for i in range(40)]
    lefts = [pixels.load_pixels(p, (), SIDE, "random").sizes[0, 3] for p in pairs]
    again = [pixels.load_pixels(p, (), SIDE, "random").sizes[0, 3] for p in reversed(pairs)]
    assert lefts == again[::-1]
    assert len(set(lefts)) > 15
    assert 0 <= min(lefts) < 10
    assert 54 < max(lefts) <= 2 * SIDE
    pair, image = raw_pair(shape)
    found = pixels.load_pixels(pair, (), SIDE, "random")
    left = found.sizes[0, 3]
    np.testing.assert_array_equal(found.images[0], image[:, left : left + SIDE])
    np.testing.assert_array_equal(found.images[1], 255 - found.images[0])
    np.testing.assert_array_equal(found.sizes, [[32, 96, 0, left, 32, 32]] * 2)
    assert pixels.load_pixels(pair, (), SIDE).sizes[0, 3] == 32


@pytest.mark.parametrize("shape", [(33, 50), (32, 47), (61, 40), (90, 64)])
def test_sizes_of_a_mirrored_crop(shape):
    """diffusers mirrors first and crops then: its crop's left is counted from the other side."""
    _, image = raw_pair(shape)
    crop, sizes = pixels.prepare(image, SIDE, place=(0.3, 0.9))
    mirrored_sizes = flip_sizes(np.array([sizes, sizes]))
    left = mirrored_sizes[0, 3]
    width = max(round(shape[1] * SIDE / min(shape)), SIDE)
    height = max(round(shape[0] * SIDE / min(shape)), SIDE)
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
    seen = resized[:, ::-1][sizes[2] : sizes[2] + SIDE, left : left + SIDE]
    np.testing.assert_array_equal(seen, crop[:, ::-1])
    np.testing.assert_array_equal(np.delete(mirrored_sizes[0], 3), np.delete(sizes, 3))
    np.testing.assert_array_equal(flip_sizes(mirrored_sizes)[1], sizes)
