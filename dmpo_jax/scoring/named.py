"""Scorers by name."""

import difflib
import functools
from collections.abc import Callable

from dmpo_jax.errors import UserError
from dmpo_jax.scoring import image_statistics
from dmpo_jax.scoring.clip import AestheticScorer, ClipScorer
from dmpo_jax.scoring.digits import DigitJudge
from dmpo_jax.scoring.image_reward import ImageRewardScorer
from dmpo_jax.scoring.image_statistics import ImageStatistic
from dmpo_jax.scoring.own import load_own
from dmpo_jax.scoring.scorer import Scorer

# Judges without weights. The two digit judges are of different kinds and fitted on different
# halves of the digits, so that an image that fools one does not also fool the other.
SCORERS: dict[str, Callable[[], Scorer]] = {
    "digits_svm": lambda: DigitJudge("digits_svm", "svm"),
    "digits_forest": lambda: DigitJudge("digits_forest", "forest"),
}
# What an image looks like, which is no judgement of its quality.
STATISTICS: dict[str, Callable[[], Scorer]] = {
    statistic.__name__: functools.partial(ImageStatistic, statistic)
    for statistic in (
        image_statistics.brightness,
        image_statistics.contrast,
        image_statistics.saturation,
        image_statistics.sharpness,
    )
}
# Published reward models, by KIND:FOLDER.
KINDS: dict[str, Callable[[str], Scorer]] = {
    "pickscore": functools.partial(ClipScorer, "pickscore"),
    "hpsv2": functools.partial(ClipScorer, "hpsv2"),
    "hpsv21": functools.partial(ClipScorer, "hpsv21"),
    "clip": functools.partial(ClipScorer, "clip"),
    "aesthetic": functools.partial(AestheticScorer, "aesthetic"),
    "imagereward": ImageRewardScorer,
}


def make_scorer(name: str) -> Scorer:
    """Returns a scorer: a name, `KIND:FOLDER`, or `path.py:function`.

    No weights are loaded before its first call; its `check` finds what is wrong with a folder. A
    user's own file is run here.

    Raises:
        ValueError: the name is unknown; lists what there is.
    """
    kind, _, rest = name.partition(":")
    if kind in KINDS:
        return KINDS[kind](rest)
    if ".py:" in name:
        return load_own(name)
    built_in = SCORERS | STATISTICS
    if name in built_in:
        return built_in[name]()
    known = ", ".join([*sorted(built_in), *(f"{kind}:FOLDER" for kind in KINDS)])
    near = difflib.get_close_matches(kind, [*built_in, *KINDS], n=1, cutoff=0.7)
    hint = f" (did you mean {near[0]}{':FOLDER' * (near[0] in KINDS)}?)" if near else ""
    raise UserError(
        f"scorer {name!r} is unknown{hint}; there are {known}, and PATH.py:FUNCTION of your own"
    )
