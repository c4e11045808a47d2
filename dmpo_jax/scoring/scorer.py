"""`Scorer`, the protocol of all judges of images, and the scorers by name."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8

from dmpo_jax.errors import UserError
from dmpo_jax.scoring.digits import DigitJudge


@runtime_checkable
class Scorer(Protocol):
    """Scores images against their prompts, higher is better; each image by itself.

    name, version: of what gives the scores: only scores of the same two can be compared.
    temperature: of Bradley-Terry, for preferences from differences of its scores.
    uses_prompt: False where the image alone decides.
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
        """ValueError for the first prompt that it cannot judge by; asked before sampling."""
        ...

    def __call__(
        self, images: UInt8[np.ndarray, "N H W 3"], prompts: Sequence[str]
    ) -> Float32[np.ndarray, " N"]: ...


# The digits' two judges see different halves of the digits and are of different kinds, so that
# what pleases one by accident does not please the other.
SCORERS: dict[str, Callable[[], Scorer]] = {
    "digits_svm": lambda: DigitJudge("digits_svm", "svm"),
    "digits_forest": lambda: DigitJudge("digits_forest", "forest"),
}


def make_scorer(name: str) -> Scorer:
    """The scorer of that name; loads nothing before it is first called.

    Raises:
        ValueError: listing the names there are.
    """
    if name not in SCORERS:
        raise UserError(f"scorer {name!r} is unknown; there are {', '.join(sorted(SCORERS))}")
    return SCORERS[name]()
