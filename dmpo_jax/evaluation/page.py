"""A comparison for people: an HTML page, the picture on it, and a line a judge."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dmpo_jax.sampling.images import image_grid

TEMPLATE = pathlib.Path(__file__).with_name("page.html.j2")


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
    """The images that the picture shows: each prompt's first `columns`, by their numbers.

    Prompts of fewer images are left out; where all are, the first images stand in one row.
    """
    numbers: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        numbers.setdefault(prompt, []).append(i)
    shown = {prompt: held[:columns] for prompt, held in numbers.items() if len(held) >= columns}
    return shown or {"": list(range(min(columns, len(prompts))))}


def before_after(
    base: Mapping[int, UInt8[np.ndarray, "H W 3"]],
    policy: Mapping[int, UInt8[np.ndarray, "H W 3"]],
    rows: Mapping[str, Sequence[int]],
) -> Image.Image:
    """Of each of `rows_shown` a row of the base's images above one of the policy's, same seeds."""
    images, labels = [], []
    for prompt, held in rows.items():
        images += [model[i] for model in (base, policy) for i in held]
        labels += [f"{prompt}: before" if prompt else "before", "after"]
    columns = len(next(iter(rows.values())))
    return image_grid(np.stack(images), columns, labels=labels, scale=2)
