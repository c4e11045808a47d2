"""Images as the published reward models take them: float32 [N, side, side, 3], normalised.

Scores are comparable with published ones only if the pixels are the same, so each function is one
of the published preprocessings.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8
from PIL import Image

from dmpo_jax.diffusers_io.reward_folders import CLIP_MEAN, CLIP_STD

_MEAN, _STD = np.asarray(CLIP_MEAN, np.float32), np.asarray(CLIP_STD, np.float32)
# Normalised value of each grey level, by channel. Rounded where transformers rounds.
_NORMALISED = ((np.arange(256) * (1 / 255)).astype(np.float32)[:, None] - _MEAN) / _STD


def prepare(
    images: UInt8[np.ndarray, "N H W C"], side: int, how: str
) -> Float32[np.ndarray, "N side side 3"]:
    """Preprocesses images. how: "padded", or `odd` of `cropped`."""
    return padded(images, side) if how == "padded" else cropped(images, side, odd=how)


def cropped(
    images: UInt8[np.ndarray, "N H W C"], side: int, *, odd: str
) -> Float32[np.ndarray, "N side side 3"]:
    """Resizes the shorter side by PIL's bicubic filter on uint8 and crops the centre.

    Args:
        images: of 3 channels, or 4 whose last is dropped.
        odd: where the border is an odd number of pixels, what its half is rounded to: "floor" as
            transformers' CLIPImageProcessor does, "even" as torchvision's CenterCrop.
    """
    height, width = images.shape[1:3]
    short = min(height, width)
    size = [side if n == short else int(side * n / short) for n in (height, width)]
    borders = [(n - side) / 2 for n in size]
    top, left = (int(border) if odd == "floor" else round(border) for border in borders)
    resized = [
        np.asarray(Image.fromarray(image[..., :3]).resize(size[::-1], Image.Resampling.BICUBIC))
        for image in images
    ]
    cut = np.stack(resized)[:, top : top + side, left : left + side]
    return _NORMALISED[cut, np.arange(3)]


def padded(images: UInt8[np.ndarray, "N H W C"], side: int) -> Float32[np.ndarray, "N side side 3"]:
    """Resizes the longer side, bicubic with antialiasing on floats, and pads to a square.

    The border is black and equally wide on both sides, but for one pixel. This is HPSv2's
    preprocessing under torchvision 0.17 or newer; older ones did not antialias. The official
    code leaves an image whose longer side is `side` already unpadded, and cannot score it.

    Args:
        images: of 3 channels, or 4 whose last is dropped.
    """
    height, width = images.shape[1:3]
    scale = side / max(height, width)
    size = (round(height * scale), round(width * scale))
    return np.asarray(_padded(np.ascontiguousarray(images[..., :3]), size, side))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _padded(
    images: UInt8[Array, "N H W 3"], size: tuple[int, int], side: int
) -> Float32[Array, "N side side 3"]:
    pixels = images.astype(jnp.float32) / 255
    shape = (len(images), *size, 3)
    with jax.default_matmul_precision("highest"):
        pixels = jax.image.resize(pixels, shape, "cubic", antialias=True)
    before = [(side - n) // 2 for n in size]
    around = [(b, side - n - b) for b, n in zip(before, size, strict=True)]
    pixels = jnp.pad(pixels, ((0, 0), *around, (0, 0)))
    return (pixels - _MEAN[None, None, None]) / _STD[None, None, None]
