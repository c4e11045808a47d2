"""Scores of the compared models -> the content of result.json, and a row for each image."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float

from dmpo_jax import storage
from dmpo_jax.evaluation import statistics
from dmpo_jax.evaluation.drawing import Asked
from dmpo_jax.evaluation.scores import DIVERSITY

ROWS = "images.jsonl"
Scores = Mapping[str, Float[np.ndarray, " N"]]  # scorer -> a score an image


class Compared(NamedTuple):
    """Images of all models with their scores; the first model is the baseline.

    files: model -> its images. scores: model -> scorer -> scores, and `DIVERSITY` of each prompt.
    """

    out: epath.Path
    asked: Asked
    files: Mapping[str, Sequence[epath.Path]]
    scores: Mapping[str, Scores]

    def images(self, model: str) -> list[str]:
        """Paths of a model's images, relative to `out` where that can be."""
        return [_relative(file, self.out) for file in self.files[model]]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each prompt and seed: images and scores of every model."""
        images = {model: self.images(model) for model in self.files}
        scorers = [name for name in next(iter(self.scores.values()), {}) if name != DIVERSITY]
        return [
            {
                "number": i,
                "prompt": prompt.text,
                "category": prompt.category,
                "seed": self.asked.seeds[i],
                "images": {model: paths[i] for model, paths in images.items()},
                "scores": {
                    name: {model: float(self.scores[model][name][i]) for model in images}
                    for name in scorers
                },
            }
            for i, prompt in enumerate(self.asked.every)
        ]


def _relative(file: epath.Path, out: epath.Path) -> str:
    if storage.is_remote(file) or storage.is_remote(out):
        text = os.fspath(file)
        return text.removeprefix(f"{os.fspath(out)}/")
    return os.path.relpath(file, out)


def compare_all(compared: Compared, *, estimand: str) -> dict[str, Any]:
    """Returns the comparisons of result.json.

    {"comparisons": {MODEL: {"overall": {SCORER: entry}, "categories": {CATEGORY: {SCORER:
    entry}}}}, "agreement": [...], "diversity": {MODEL: {...}}}. An entry is that of
    `statistics.compare` and `statistics.correct`, which corrects over a model's scorers and
    categories.

    Args:
        estimand: "like_these" or "these", of `statistics.compare`.
    """
    asked, (base, *others) = compared.asked, compared.files
    texts = [prompt.text for prompt in asked.every]
    numbers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    # A text that is asked twice is one prompt: its images are not independent.
    prompts = np.array([numbers[text] for text in texts])
    categories = np.array([prompt.category or "" for prompt in asked.every])
    named = sorted(set(categories) - {""})
    names = [name for name in compared.scores[base] if name != DIVERSITY]
    found: dict[str, Any] = {}
    for model in others:

        def entries(rows: np.ndarray, model: str = model) -> dict[str, Any]:
            return {
                name: statistics.compare(
                    compared.scores[base][name][rows],
                    compared.scores[model][name][rows],
                    prompts[rows],
                    estimand=estimand,
                )
                for name in names
            }

        overall = entries(np.ones(len(prompts), bool))
        by_category = {name: entries(categories == name) for name in named}
        statistics.correct(
            [*overall.values(), *(e for part in by_category.values() for e in part.values())]
        )
        found[model] = {"overall": overall, "categories": by_category}
    together = {
        name: np.concatenate([compared.scores[model][name] for model in compared.files])
        for name in names
    }
    return {
        "comparisons": found,
        "agreement": statistics.agreement(together),
        "diversity": {
            model: {"mean": float(np.mean(scores[DIVERSITY])), "prompts": len(asked.prompts)}
            for model, scores in compared.scores.items()
            if DIVERSITY in scores
        },
    }


def write_rows(compared: Compared) -> None:
    """Writes `out/images.jsonl`, a line for each prompt and seed."""
    lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in compared.rows())
    storage.write_bytes(compared.out / ROWS, lines.encode())
