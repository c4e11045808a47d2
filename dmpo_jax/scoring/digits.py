"""Judges of images against their captions: (images, prompts) -> one score each, higher better."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dmpo_jax.toy import digits

Scorer = Callable[[np.ndarray, Sequence[str]], np.ndarray]


@functools.cache
def _digit_judge(kind: str):
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


def _digits(kind: str) -> Scorer:
    def score(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        wanted = [digits.caption_digit(prompt) for prompt in prompts]
        ink = digits.to_ink(images).reshape(len(images), -1)
        return _digit_judge(kind).predict_proba(ink)[np.arange(len(images)), wanted]

    return score


# The two see different halves of the digits and are of different kinds, so that what
# pleases one by accident does not please the other.
SCORERS: dict[str, Scorer] = {
    "digits_svm": _digits("svm"),
    "digits_forest": _digits("forest"),
}


def get_scorer(name: str) -> Scorer:
    """The scorer of that name: probabilities in [0, 1] for the digits' judges.

    Raises:
        ValueError: listing the names there are.
    """
    if name not in SCORERS:
        raise ValueError(f"scorer {name!r} is unknown; there are {', '.join(sorted(SCORERS))}")
    return SCORERS[name]
