"""Judges of the digits: classifiers that score an image for the digit that its caption names."""

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
    """Scores images by a classifier's probability, in [0, 1], of the caption's digit."""

    name: str
    kind: Literal["svm", "forest"]
    temperature: float = 0.25
    uses_prompt: bool = True

    @property
    def version(self) -> str:
        """Version of the library that fits the classifier; the data and the seed are fixed."""
        return f"scikit-learn {importlib.metadata.version('scikit-learn')}"

    def check(self, prompts: Sequence[str]) -> None:
        """Raises ValueError for the first caption that does not name one digit."""
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
    """Returns a classifier of 8 x 8 ink, fitted on one half of the real digits in seconds."""
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.ensemble import ExtraTreesClassifier
    from sklearn.svm import SVC

    ink, labels = digits.load_digits()
    if kind == "svm":
        rows = digits.half(0)
        # scikit-learn's type hints are too narrow for both settings.
        width: Any = 0.5
        together: Any = False
        model = CalibratedClassifierCV(SVC(C=10.0, gamma=width), ensemble=together)
    else:
        rows = digits.half(1)
        model = ExtraTreesClassifier(300, random_state=0)
    # Fitted on a judge's input: the large image, reduced to 8 x 8.
    seen = digits.to_ink(digits.to_images(ink[rows]))
    return model.fit(seen.reshape(len(rows), -1), labels[rows])
