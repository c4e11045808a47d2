"""Image grids of a training run."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath

from dmpo_jax.families import Family
from dmpo_jax.sampling.images import image_grid, save_png
from dmpo_jax.sampling.sampler import Sampler
from dmpo_jax.sampling.seeds import GRIDS

COLUMNS = 4


def why_no_grids(family: Family) -> str:
    """Returns the reason why a run of this family draws no grids; "" if it can."""
    if jax.process_count() > 1:
        return "image grids are drawn by single-process runs only"
    if family.given:
        return "no image grids are drawn: this model needs an image beside each prompt"
    return ""


def make_draw(
    open_sampler: Callable[[], Sampler], prompts: Sequence[str], out: epath.Path
) -> Callable[[Any, int], Callable[[], None]]:
    """Returns (all parameters of the model, step) -> a function that writes the grid.

    It is out/<step>.png, one row per prompt. Seeds are the same at every step.
    open_sampler: called before the first grid only, since its models may never be needed.
    """
    opened = functools.cache(open_sampler)

    def draw(params: Any, number: int) -> Callable[[], None]:
        asked = [prompt for prompt in prompts for _ in range(COLUMNS)]
        seeds = [GRIDS + i for i in range(len(asked))]
        images = opened()(params, asked, seeds, f"samples at step {number}")
        scale = max(1, 128 // images.shape[1])

        def write() -> None:
            grid = image_grid(images, COLUMNS, labels=prompts, scale=scale)
            save_png(out / f"{number}.png", grid)

        return write

    return draw
