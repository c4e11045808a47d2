"""The embedded default data: scikit-learn's 1,797 handwritten digits as captioned images.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, shipped with
scikit-learn; 8 x 8 pixels of 0..16, ink high.
"""

import functools
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from dmpo_jax.errors import UserError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = tuple(f"a handwritten {word}" for word in WORDS)
# Pipeline folders that generate the digits, shipped with the package.
PIPELINE = epath.Path(__file__).parent / "pipeline"
FLOW_PIPELINE = epath.Path(__file__).parent / "flow_pipeline"
PIPELINES = {"sd": PIPELINE, "sd3": FLOW_PIPELINE}  # by the name of the family
SIZE = 32  # pixels a side of the images that the VAE sees


@functools.cache
def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns ink `[1797, 8, 8]` float32 in [0, 1], and labels `[1797]`."""
    from sklearn.datasets import load_digits as load

    bunch: Any = load()
    return bunch.images.astype(np.float32) / 16, bunch.target.astype(np.int32)


def to_images(ink: np.ndarray) -> np.ndarray:
    """Converts ink `[N, 8, 8]` in [0, 1] to uint8 `[N, 32, 32, 3]`, dark ink on white paper."""
    paper = np.round(255 * (1 - ink)).astype(np.uint8)
    large = [
        np.asarray(Image.fromarray(p).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for p in paper
    ]
    return np.repeat(np.stack(large)[..., None], 3, axis=-1)


def to_ink(images: np.ndarray) -> np.ndarray:
    """Averages uint8 `[N, H, W, 3]`, H and W multiples of 8, to ink `[N, 8, 8]` in [0, 1]."""
    n, h, w, _ = images.shape
    gray = images.astype(np.float32).mean(-1).reshape(n, 8, h // 8, 8, w // 8).mean((2, 4))
    return 1 - gray / 255


def half(index: int) -> np.ndarray:
    """Returns row numbers of one half of the digits: 0 for the first judge, 1 for the second."""
    order = np.random.default_rng(0).permutation(len(load_digits()[1]))
    return np.sort(order[index::2])


def caption_digit(caption: str) -> int:
    """Returns the digit that a caption names; raises ValueError if it names none or several."""
    named = [i for i, word in enumerate(WORDS) if word in caption.lower().split()]
    if len(named) != 1:
        raise UserError(f"{caption!r} names {len(named)} digits; say one of {', '.join(WORDS)}")
    return named[0]
