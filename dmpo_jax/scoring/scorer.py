"""`Scorer`, the protocol of all judges of images, and the scorers by name."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8

from dmpo_jax.errors import UserError
from dmpo_jax.scoring.digits import DigitJudge


@runtime_checkable
class Scorer(Protocol):
    """Scores images against their prompts, each image independently; higher is better.

    name, version: identify the scorer; scores are comparable only if both match.
    temperature: of Bradley-Terry, for preferences from differences of its scores.
    uses_prompt: False if the image alone decides.
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def temperature(self) -> float: ...
    @property
    def uses_prompt(self) -> bool: ...

    def check(self, prompts: Sequence[str]) -> None:
        """Raises ValueError for the first prompt that it cannot judge; called before sampling."""
        ...

    def __call__(
        self, images: UInt8[np.ndarray, "N H W 3"], prompts: Sequence[str]
    ) -> Float32[np.ndarray, " N"]: ...


# The two digit judges are of different kinds and fitted on different halves of the digits, so
# that an image that fools one does not also fool the other.
SCORERS: dict[str, Callable[[], Scorer]] = {
    "digits_svm": lambda: DigitJudge("digits_svm", "svm"),
    "digits_forest": lambda: DigitJudge("digits_forest", "forest"),
}


def make_scorer(name: str) -> Scorer:
    """Returns the scorer of that name; loads nothing before its first call.

    Raises:
        ValueError: the name is unknown; lists the known names.
    """
    if name not in SCORERS:
        raise UserError(f"scorer {name!r} is unknown; there are {', '.join(sorted(SCORERS))}")
    return SCORERS[name]()


def rehearse(scorer: Scorer, size: tuple[int, int], prompts: Sequence[str]) -> None:
    """Has a scorer judge blank images, one a prompt, so that one that cannot fails at once.

    size: height and width in pixels. Call it before sampling, with as many prompts as a batch has.

    Raises:
        ValueError: it cannot judge images of this size, or does not give each a finite number.
    """
    try:
        scores = scorer(np.zeros((len(prompts), *size, 3), np.uint8), prompts)
    except ValueError as error:
        raise UserError(
            f"scorer {scorer.name} cannot judge images of {size[0]} x {size[1]} pixels: {error}"
        ) from error
    if scores.shape != (len(prompts),) or not np.isfinite(scores).all():
        raise UserError(
            f"scorer {scorer.name} should give one finite number an image, but gave {scores!r}"
        )
