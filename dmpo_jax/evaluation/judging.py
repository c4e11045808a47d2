"""Draws and scores the images of all models of an evaluation, one model after another."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from dmpo_jax.evaluation.comparing import Compared
from dmpo_jax.evaluation.drawing import Asked, Drawer, image_files
from dmpo_jax.evaluation.given_scores import GivenScores
from dmpo_jax.evaluation.models import Model
from dmpo_jax.evaluation.scores import score_model
from dmpo_jax.scoring import Scorer, rehearse


def judge(
    models: Sequence[Model],
    drawer: Drawer,
    asked: Asked,
    scorers: Mapping[str, Scorer],
    given: Sequence[GivenScores],
    out: epath.Path,
) -> tuple[Compared, dict[str, Any]]:
    """Returns all images with their scores, and what determines each model's images.

    Args:
        models: the baseline first.
        given: scores of another program, beside the scorers'.

    Raises:
        UserError: as `store.draw`, `score_model` and `GivenScores.of`; and before anything is
            drawn, if a scorer cannot judge images of this size.
    """
    texts = [prompt.text for prompt in asked.prompts]
    files, scores, about = {}, {}, {}
    for model in models:
        if model.drawn and not about:
            size = drawer.open(model).size
            for scorer in scorers.values():
                rehearse(scorer, size, texts[: drawer.batch_size])
        files[model.name], made = image_files(model, drawer, asked, out)
        about |= {model.name: made} if made else {}
    for model in models:
        scores[model.name] = score_model(out, model.name, files[model.name], texts, scorers)
    compared = Compared(out, asked, files, scores)
    for each in given:
        for name in files:
            scores[name][each.name] = each.of(compared.images(name))
    return compared, about
