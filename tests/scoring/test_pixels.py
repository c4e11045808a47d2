"""Preprocessing equals the published scorers': PIL's to the bit, HPSv2's to 1e-4."""

import numpy as np
import pytest
import torch
from PIL import Image

from dmpo_jax.scoring import pixels

SIZES = [(64, 64), (40, 57), (83, 31), (28, 28), (20, 26), (30, 39), (96, 200)]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


def pictures(height, width, channels=3):
    """Noise and gradients, which overshoot where a filter is too sharp."""
    rng = np.random.default_rng(height * width)
    noise = rng.integers(0, 256, (height, width, channels))
    steps = np.where(np.arange(width) % 9 < 4, 0, 255)[None, :, None] + 0 * noise
    smooth = np.linspace(0, 255, height)[:, None, None] + 0 * noise
    return np.stack([noise, steps, smooth]).astype(np.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_cropped_is_transformers_to_the_bit(size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = pictures(*size)
    crop = {"height": 28, "width": 28}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=crop)
    want = processor([Image.fromarray(x) for x in images], return_tensors="np")["pixel_values"]
    got = pixels.cropped(images, 28, odd="floor")
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.stack(want).transpose(0, 2, 3, 1))


def test_an_odd_border_is_halved_as_torchvision_does():
    """Of 3 pixels to cut, CenterCrop cuts round(1.5) = 2 above; of 1, round(0.5) = 0."""
    for extra, before in ((1, 0), (2, 1), (3, 2), (5, 2), (7, 4)):
        images = pictures(28, 28 + extra)
        want = images[:, :, before : before + 28]
        got = pixels.cropped(images, 28, odd="even")
        np.testing.assert_array_equal(got, pixels.cropped(want, 28, odd="even"))


@pytest.mark.parametrize("size", SIZES)
def test_padded_is_pytorchs_antialiased_bicubic(size):
    images = pictures(*size)
    scale = 28 / max(size)
    small = tuple(round(n * scale) for n in size)
    tensors = torch.tensor(images).permute(0, 3, 1, 2).float() / 255
    resized = torch.nn.functional.interpolate(tensors, small, mode="bicubic", antialias=True)
    want = torch.zeros(3, 3, 28, 28)
    top, left = ((28 - n) // 2 for n in small)
    want[:, :, top : top + small[0], left : left + small[1]] = resized
    want = (want.permute(0, 2, 3, 1) - MEAN) / STD
    got = pixels.padded(images, 28)
    assert got.shape == (3, 28, 28, 3)
    assert np.abs(got - want.numpy()).max() < 1e-4
    assert np.abs(got).max() > 1.5  # it is not all border


def test_transparency_is_dropped():
    images = pictures(40, 57, channels=4)
    for how in ("floor", "even", "padded"):
        want = pixels.prepare(np.ascontiguousarray(images[..., :3]), 28, how)
        np.testing.assert_array_equal(pixels.prepare(images, 28, how), want)
