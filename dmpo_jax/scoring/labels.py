"""Scores of two images -> the preference between them, as a person would state it."""

import numpy as np
from jaxtyping import Float

LABELS = ("drawn", "probability")


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


class Labeller:
    """Maps scores `[n, 2]` of the next pairs to the preference for image 0 of each.

    labels: "drawn" uses `draw_labels`, "probability" the `win_probability` itself.
    """

    def __init__(
        self, labels: str, *, temperature: float | int, tie_margin: float | int, seed: int
    ):
        self._drawn = labels == "drawn"
        self._temperature, self._tie_margin = temperature, tie_margin
        self._draws = np.random.default_rng(seed)
        self._scores, self._preferences = [np.empty((0, 2))], [np.empty(0)]

    def __call__(self, scores: Float[np.ndarray, "N 2"]) -> Float[np.ndarray, " N"]:
        if self._drawn:
            found = draw_labels(
                scores,
                temperature=self._temperature,
                tie_margin=self._tie_margin,
                draws=self._draws,
            )
        else:
            found = win_probability(scores, self._temperature)
        self._scores.append(scores)
        self._preferences.append(found)
        return found

    def described(self) -> str:
        """Describes the labels so far: ties, agreement with the scores, and the mean score."""
        scores, preferences = np.concatenate(self._scores), np.concatenate(self._preferences)
        decided = (preferences != 0.5) & (scores[:, 0] != scores[:, 1])
        agree = ((preferences > 0.5) == (scores[:, 0] > scores[:, 1]))[decided]
        return (
            f"{len(scores)} pairs, {100 * (preferences == 0.5).mean():.0f} % ties; of the others "
            f"{100 * agree.mean() if decided.any() else 0:.0f} % name the image that scores "
            f"higher; mean score {scores.mean():.3f}"
        )
