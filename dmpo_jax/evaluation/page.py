"""A comparison for people: an HTML page, the picture on it, and a line a judge."""

import itertools
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dmpo_jax.sampling.images import image_grid

TEMPLATE = pathlib.Path(__file__).with_name("page.html.j2")
ROWS = 12  # prompts on the picture
SIDE = 256  # pixels of the longer side of an image on it


def small(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Returns a copy of at most `SIDE` pixels a side."""
    copy = Image.fromarray(image.copy())
    copy.thumbnail((SIDE, SIDE))
    return np.asarray(copy)


def render(result: Mapping[str, Any]) -> str:
    """The page of what result.json holds; its picture is samples/before_after.png beside it."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text()).render(result) + "\n"


def summary(result: Mapping[str, Any]) -> str:
    """A line a judge."""
    lines = []
    for name, judged in result["judges"].items():
        low, high = judged["win_rate_ci95"]
        lines.append(
            f"{name}: win rate {judged['win_rate']:.1%} [{low:.1%}, {high:.1%}], "
            f"score {judged['score_base']:.3f} -> {judged['score_policy']:.3f}"
        )
    return "\n".join(lines)


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
    base: Mapping[int, UInt8[np.ndarray, "H W 3"]],
    policy: Mapping[int, UInt8[np.ndarray, "H W 3"]],
    rows: Mapping[str, Sequence[int]],
) -> Image.Image:
    """Of each of `rows_shown` a row of the base's images above one of the policy's, same seeds.

    Small images are enlarged; large ones should be `judging.Judged`'s small copies.
    """
    images, labels = [], []
    for prompt, held in rows.items():
        images += [model[i] for model in (base, policy) for i in held]
        labels += [f"{prompt}: before", "after"]
    columns, scale = len(next(iter(rows.values()))), max(1, SIDE // (2 * images[0].shape[1]))
    return image_grid(np.stack(images), columns, labels=labels, scale=scale)
