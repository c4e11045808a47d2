"""Images as they are drawn -> every judge's scores, and the few images that are kept."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from dmpo_jax.errors import UserError
from dmpo_jax.scoring import Scorer

SIDE = 256  # pixels of the longer side of an image that is kept to be shown


class Judged(NamedTuple):
    """scores: of all images, by judge. kept: small copies of some images, by their number."""

    scores: dict[str, Float32[np.ndarray, " N"]]
    kept: dict[int, UInt8[np.ndarray, "H W 3"]]


def judge(
    batches: Iterable[np.ndarray],
    prompts: Sequence[str],
    judges: Mapping[str, Scorer],
    keep: Collection[int],
) -> Judged:
    """Scores every batch and lets it go.

    Args:
        batches: uint8 `[n, H, W, 3]`; together as many images as there are prompts.
        keep: numbers of the images to keep.

    Raises:
        UserError: a score is not finite; names the judge, the image and its prompt.
    """
    scores: dict[str, list[np.ndarray]] = {name: [] for name in judges}
    kept, first, wanted = {}, 0, set(keep)
    for images in batches:
        own = prompts[first : first + len(images)]
        for name, scorer in judges.items():
            found = scorer(images, own)
            if not np.isfinite(found).all():
                bad = int(np.flatnonzero(~np.isfinite(found))[0])
                raise UserError(
                    f"judge {name!r} gave the score {found[bad]} to image {first + bad} (prompt "
                    f"{own[bad]!r}), which is neither a win nor a loss: look at that image, or "
                    "leave the judge out of evaluate.judges"
                )
            scores[name].append(found)
        kept |= {i: small(x) for i, x in enumerate(images, first) if i in wanted}
        first += len(images)
    return Judged({name: np.concatenate(parts) for name, parts in scores.items()}, kept)


def small(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Returns a copy of at most `SIDE` pixels a side."""
    copy = Image.fromarray(image.copy())
    copy.thumbnail((SIDE, SIDE))
    return np.asarray(copy)
