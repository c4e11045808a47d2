"""Scores of two images -> the preference between them, as a person would state it."""

import dataclasses

import numpy as np
from jaxtyping import Float

from dmpo_jax.errors import UserError
from dmpo_jax.scoring.scorer import Scorer

LABELS = ("drawn", "probability")


def temperature_of(scorer: Scorer, given: float | None) -> float:
    """Returns the temperature of a scorer's preferences: the given one, or the scorer's own.

    Raises:
        ValueError: none is given and the scorer has none.
    """
    found = scorer.temperature if given is None else given
    if found is None:
        raise UserError(
            f"scorer {scorer.name} was not trained on preferences and has no temperature of its "
            "own: set collect.temperature (--temperature), about the difference of two images' "
            "scores at which the better one wins 73 of 100 times"
        )
    return found


def win_probability(
    scores: Float[np.ndarray, "N 2"], temperature: float | int
) -> Float[np.ndarray, " N"]:
    """Bradley-Terry probability that image 0 wins: sigmoid((s_0 - s_1) / temperature)."""
    scores = scores.astype(np.float64)
    with np.errstate(over="ignore"):  # 1 / (1 + inf) is 0
        return 1 / (1 + np.exp((scores[:, 1] - scores[:, 0]) / temperature))


def draw_labels(
    scores: Float[np.ndarray, "N 2"],
    *,
    temperature: float | int,
    tie_margin: float | int,
    draws: np.random.Generator,
) -> Float[np.ndarray, " N"]:
    """Draws labels for image 0: 0, 1, or 0.5 for a tie.

    Image 0 wins with its `win_probability`, so a higher temperature gives noisier labels. Scores
    closer than tie_margin tie. Each pair takes one draw, so that scores in consecutive parts, with
    one generator, get the same labels as all at once.
    """
    wins = draws.random(len(scores)) < win_probability(scores, temperature)
    return np.where(np.abs(scores[:, 0] - scores[:, 1]) < tie_margin, 0.5, wins.astype(float))


@dataclasses.dataclass(frozen=True)
class Labels:
    """Labels pairs by their scores, each pair independently of how the pairs come.

    kind: "drawn" by `draw_labels`, or "probability", the `win_probability` itself.
    """

    kind: str
    temperature: float | int
    tie_margin: float | int
    seed: int

    def __call__(self, scores: Float[np.ndarray, "N 2"], first: int) -> Float[np.ndarray, " N"]:
        """Returns the preference for image 0 of each pair. first: number of the first pair."""
        if self.kind == "probability":
            return win_probability(scores, self.temperature)
        return draw_labels(
            scores,
            temperature=self.temperature,
            tie_margin=self.tie_margin,
            # A draw a pair: the generator as it is after `first` of them.
            draws=np.random.Generator(np.random.PCG64(self.seed).advance(first)),
        )


def described(scores: Float[np.ndarray, "N 2"], preferences: Float[np.ndarray, " N"]) -> str:
    """Describes labels: ties, agreement with the scores, and the mean score."""
    decided = (preferences != 0.5) & (scores[:, 0] != scores[:, 1])
    agree = ((preferences > 0.5) == (scores[:, 0] > scores[:, 1]))[decided]
    return (
        f"{len(scores)} pairs, {100 * (preferences == 0.5).mean():.0f} % ties; of the others "
        f"{100 * agree.mean() if decided.any() else 0:.0f} % name the image that scores "
        f"higher; mean score {scores.mean():.3f}"
    )
