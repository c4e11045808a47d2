"""The picture of a comparison: rows of images, the base's above the tuned model's."""

import itertools
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dmpo_jax.sampling.images import image_grid

ROWS = 12  # prompts on the picture
SIDE = 256  # pixels of the longer side of an image on it


def small(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Returns a copy of at most `SIDE` pixels a side."""
    copy = Image.fromarray(image.copy())
    copy.thumbnail((SIDE, SIDE))
    return np.asarray(copy)


def rows_shown(prompts: Sequence[str], columns: int) -> dict[str, list[int]]:
    """The images that the picture shows, by their numbers: rows of equal length, one a prompt.

    `columns` images of each prompt, or as many as half of the prompts have, of the first `ROWS`
    prompts that have so many.
    """
    numbers: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        numbers.setdefault(prompt, []).append(i)
    columns = min(columns, statistics.median_high(map(len, numbers.values())))
    shown = {prompt: held[:columns] for prompt, held in numbers.items() if len(held) >= columns}
    return dict(itertools.islice(shown.items(), ROWS))


def before_after(
    base: Mapping[int, UInt8[np.ndarray, "_ _ 3"]],
    policy: Mapping[int, UInt8[np.ndarray, "_ _ 3"]],
    rows: Mapping[str, Sequence[int]],
) -> Image.Image:
    """Of each of `rows_shown` a row of the base's images above one of the policy's, same seeds.

    All are shown at the size of the first. Small images are enlarged; large ones should be
    `small` copies.
    """
    images, labels = [], []
    height, width = base[next(iter(rows.values()))[0]].shape[:2]
    for prompt, held in rows.items():
        shown = [Image.fromarray(model[i]) for model in (base, policy) for i in held]
        images += [np.asarray(image.resize((width, height))) for image in shown]
        labels += [f"{prompt}: before", "after"]
    columns, scale = len(next(iter(rows.values()))), max(1, SIDE // (2 * images[0].shape[1]))
    return image_grid(np.stack(images), columns, labels=labels, scale=scale)
