"""Scores that another program gave to the images of an evaluation, from a file."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float

from dmpo_jax import storage
from dmpo_jax.errors import UserError


class GivenScores(NamedTuple):
    """name: of the scorer. by_image: path of an image, as images.jsonl has it -> its score."""

    name: str
    version: str
    by_image: Mapping[str, float]

    def of(self, images: Sequence[str]) -> Float[np.ndarray, " N"]:
        """Returns the scores of these images; UserError names one without a score."""
        if lost := next((image for image in images if image not in self.by_image), None):
            raise UserError(
                f"--scores={self.name} has no score of {lost}: score every image that "
                "images.jsonl of the evaluation lists, under the path that it has there"
            )
        return np.array([self.by_image[image] for image in images], float)


def load_scores(spec: str) -> GivenScores:
    """Reads NAME:FILE.jsonl, whose lines are {"image": "images/base/00000.png", "score": 0.5}.

    Raises:
        UserError: no such file, or a line is not of this form, repeats an image, or its score is
            not a finite number; names the row.
    """
    name, colon, file = spec.partition(":")
    path = epath.Path(file)
    if not (name and colon and file):
        raise UserError(f"--scores must be NAME:FILE.jsonl, but got {spec!r}")
    if not path.is_file():
        raise UserError(f"--scores={spec}: there is no file {path}")
    found: dict[str, float] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            image, score = row["image"], row["score"]
            fits = isinstance(image, str) and type(score) in (int, float) and math.isfinite(score)
        except (ValueError, KeyError, TypeError, RecursionError):
            fits, image = False, ""
        if not fits or image in found:
            twice = ", each image once" if image in found else ""
            raise UserError(
                f"{path}, row {number} should be "
                f'{{"image": PATH, "score": NUMBER}}{twice}, but is {line[:80]!r}'
            )
        found[image] = score
    return GivenScores(name, storage.hash_file(path), found)
