"""`Scorer`, the protocol of all judges of images."""

import inspect
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8

from dmpo_jax.errors import UserError


class _Declared(type(Protocol)):
    """isinstance finds attributes without computing them: a version may hash gigabytes.

    Python's own does so from 3.12 on.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        names = ("name", "version", "temperature", "uses_prompt", "check", "__call__")
        missing = object()
        return all(inspect.getattr_static(instance, n, missing) is not missing for n in names)


@runtime_checkable
class Scorer(Protocol, metaclass=_Declared):
    """Scores images against their prompts, each image independently; higher is better.

    name, version: identify the scorer; scores are comparable only if both match.
    temperature: of Bradley-Terry, for preferences from differences of its scores; None if its
        scores are of no such model.
    uses_prompt: False if the image alone decides.

    One that embeds images may also have `features(images) -> float32 [N, D]` of length 1, from
    which others compute how much images differ.
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def temperature(self) -> float | None: ...
    @property
    def uses_prompt(self) -> bool: ...

    def check(self, prompts: Sequence[str]) -> None:
        """Raises ValueError if it cannot judge, or not one of the prompts.

        Called with all prompts before sampling.
        """
        ...

    def __call__(
        self, images: UInt8[np.ndarray, "N H W 3"], prompts: Sequence[str]
    ) -> Float32[np.ndarray, " N"]: ...


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
