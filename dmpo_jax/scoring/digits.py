"""The digits' judges: classifiers that say how much an image is the digit its caption names."""

import dataclasses
import functools
import importlib.metadata
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, UInt8

from dmpo_jax.toy import digits


@dataclasses.dataclass(frozen=True)
class DigitJudge:
    """The probability, in [0, 1], that a classifier gives the digit of the caption."""

    name: str
    kind: Literal["svm", "forest"]
    temperature: float = 0.25
    uses_prompt: bool = True

    @property
    def version(self) -> str:
        """Of the library that fits it: the data and the seed are fixed."""
        return f"scikit-learn {importlib.metadata.version('scikit-learn')}"

    def check(self, prompts: Sequence[str]) -> None:
        """ValueError for the first caption that does not name one digit."""
        for prompt in prompts:
            digits.caption_digit(prompt)

    def __call__(
        self, images: UInt8[np.ndarray, "N H W 3"], prompts: Sequence[str]
    ) -> Float32[np.ndarray, " N"]:
        wanted = [digits.caption_digit(prompt) for prompt in prompts]
        ink = digits.to_ink(images).reshape(len(images), -1)
        found = _fitted(self.kind).predict_proba(ink)[np.arange(len(images)), wanted]
        return found.astype(np.float32)


@functools.cache
def _fitted(kind: str) -> Any:
    """A classifier of 8 x 8 ink, fitted on one half of the real digits; seconds."""
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.ensemble import ExtraTreesClassifier
    from sklearn.svm import SVC

    ink, labels = digits.load_digits()
    if kind == "svm":
        rows = digits.half(0)
        # scikit-learn's hints know neither setting's full range of types.
        width: Any = 0.5
        together: Any = False
        model = CalibratedClassifierCV(SVC(C=10.0, gamma=width), ensemble=together)
    else:
        rows = digits.half(1)
        model = ExtraTreesClassifier(300, random_state=0)
    # Fitted on what a judge will see: the large image, brought back to 8 x 8.
    seen = digits.to_ink(digits.to_images(ink[rows]))
    return model.fit(seen.reshape(len(rows), -1), labels[rows])
