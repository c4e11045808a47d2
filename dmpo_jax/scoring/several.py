"""Several scorers together: by their names, and described for a result."""

from collections.abc import Iterable, Sequence
from typing import Any

from dmpo_jax.errors import UserError
from dmpo_jax.scoring.named import make_scorer
from dmpo_jax.scoring.scorer import Scorer


def make_scorers(specs: Iterable[str]) -> dict[str, Scorer]:
    """Returns {name: scorer} of `make_scorer`'s specs.

    Raises:
        UserError: one is unknown, or two have the same name.
    """
    found: dict[str, Scorer] = {}
    for spec in specs:
        scorer = make_scorer(spec)
        if scorer.name in found:
            raise UserError(f"two scorers are called {scorer.name!r}: take one of them")
        found[scorer.name] = scorer
    return found


def describe_scorers(scorers: Sequence[Any], labelled_by: str) -> dict[str, dict[str, Any]]:
    """Returns what a result says of its scorers.

    Args:
        scorers: with a name and a version; the first is the primary one, named beforehand.
        labelled_by: spec of the scorer that labelled the training pairs, or "". It is no
            independent judge of a model that was trained on them.
    """
    labelled = make_scorer(labelled_by).name if labelled_by else ""
    return {
        scorer.name: {
            "version": scorer.version,
            "temperature": getattr(scorer, "temperature", None),
            "uses_prompt": getattr(scorer, "uses_prompt", None),
            "independent": scorer.name != labelled,
            "primary": i == 0,
        }
        for i, scorer in enumerate(scorers)
    }
