"""Drawn images -> labelled pairs, kept in a parquet file a part until all are there."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from etils import epath
from jaxtyping import Float

from dmpo_jax import storage
from dmpo_jax.data.prompt_files import Prompt
from dmpo_jax.data.sources import encode_image, write_pick_a_pic
from dmpo_jax.sampling.given import given_columns
from dmpo_jax.sampling.store import Drawing
from dmpo_jax.scoring import Scorer
from dmpo_jax.scoring.labels import Labels

PARTS = "pairs.parts"  # folder of the parts, beside the pairs


class Parts(NamedTuple):
    """Keeps each part's images as labelled pairs in a parquet file: `store.Keeper`."""

    folder: epath.Path
    drawing: Drawing
    scorer: Scorer
    labels: Labels
    model: str

    def names(self, images: range) -> list[str]:
        return [f"{images.start // 2:07}.parquet"]

    def write(self, numbers: range, images: np.ndarray) -> None:
        asked = [self.drawing.prompts[i] for i in numbers]
        scores = self.scorer(images, [prompt.text for prompt in asked]).reshape(-1, 2)
        preferences = self.labels(scores, numbers.start // 2)
        rows = [
            {
                **make_row(asked[2 * i], images[2 * i : 2 * i + 2], preference, self.model),
                **given_columns(asked[2 * i], self.drawing.sampler.size),
                "score_0": float(scores[i, 0]),
                "score_1": float(scores[i, 1]),
                "scorer": self.scorer.name,
            }
            for i, preference in enumerate(preferences)
        ]
        write_pick_a_pic(self.folder / self.names(numbers)[0], rows)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields the rows of all parts, in order."""
        for part in self.drawing.parts(even=True):
            with storage.local_file(self.folder / self.names(part)[0]) as file:
                yield from pq.read_table(file).to_pylist()


def make_row(prompt: Prompt, images: np.ndarray, preference: float, model: str) -> dict[str, Any]:
    """Returns a row of `write_pick_a_pic`. preference: probability that image 0 wins."""
    row = {"caption": prompt.text, "label_0": float(preference), "label_1": float(1 - preference)}
    for i, image in enumerate(images):
        row |= {f"jpg_{i}": encode_image(image), f"model_{i}": str(model)}
    return {**row, "has_label": True, "are_different": True}


def read_scores(
    path: epath.Path,
) -> tuple[Float[np.ndarray, "N 2"], Float[np.ndarray, " N"]]:
    """Returns the scores of collected pairs and the preferences for their image 0."""
    with storage.local_file(path) as file:
        found = pq.read_table(file, columns=["score_0", "score_1", "label_0"])
    first, second, preferences = (np.asarray(column) for column in found.columns)
    return np.stack([first, second], 1), preferences
