"""Statistics of an image that need no weights and no prompt. They are no judgement of quality.

They tell what a tuned model changed: brighter, more saturated, sharper images.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Float32, UInt8

# Rec. 601, of red, green and blue.
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def _grey(images: Float32[np.ndarray, "N H W 3"]) -> Float32[np.ndarray, "N H W"]:
    return images @ _LUMA


def brightness(images: Float32[np.ndarray, "N H W 3"]) -> Float[np.ndarray, " N"]:
    """Mean luma, 0 black to 1 white."""
    return _grey(images).mean((1, 2))


def contrast(images: Float32[np.ndarray, "N H W 3"]) -> Float[np.ndarray, " N"]:
    """Standard deviation of the luma, 0 to 0.5."""
    return _grey(images).std((1, 2))


def saturation(images: Float32[np.ndarray, "N H W 3"]) -> Float[np.ndarray, " N"]:
    """Mean saturation of HSV, 0 grey to 1."""
    high, low = images.max(-1), images.min(-1)
    return ((high - low) / np.maximum(high, 1e-6)).mean((1, 2))


def sharpness(images: Float32[np.ndarray, "N H W 3"]) -> Float[np.ndarray, " N"]:
    """Root mean square of the luma's Laplacian; noise is sharp too. 0 for images below 3 x 3."""
    grey = _grey(images)
    inside = grey[:, 1:-1, 1:-1]
    if not inside.size:
        return np.zeros(len(images), np.float32)
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return np.sqrt(np.square(around - 4 * inside).mean((1, 2)))


@dataclasses.dataclass(frozen=True)
class ImageStatistic:
    """One of the statistics as a scorer: without a prompt, and without a temperature."""

    statistic: Callable[[np.ndarray], np.ndarray]
    version: str = "1"
    temperature: float | None = None
    uses_prompt: bool = False

    @property
    def name(self) -> str:
        return self.statistic.__name__

    def check(self, prompts: Sequence[str]) -> None:
        """Takes any prompt."""

    def __call__(
        self, images: UInt8[np.ndarray, "N H W C"], prompts: Sequence[str]
    ) -> Float32[np.ndarray, " N"]:
        # One image at a time: a batch in float32 is four times its bytes.
        each = [self.statistic(x[None, ..., :3].astype(np.float32) / 255) for x in images]
        return np.concatenate(each).astype(np.float32)
