"""Image grids that a training run draws on its way."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.sampling import images as image_files
from dmpo_jax.sampling.sampler import make_sampler

COLUMNS = 4  # images of each prompt


def make_draw(
    folder: epath.PathLike,
    model: Any,
    prompts: Sequence[str],
    out: epath.Path,
    *,
    pipeline: dict[str, Any],
    sampling: dict[str, Any],
) -> Callable[[Any, int], None]:
    """(all parameters of the model, update) -> OUT/UPDATE.png, a row a prompt.

    The seeds are the same at every update. The pipeline is loaded at the first one.

    Args:
        folder: of the pipeline. model: the trained component, without arrays.
        pipeline: further arguments of `diffusers_io.load_pipeline`.
        sampling: further arguments of `make_sampler`.
    """

    @functools.cache
    def sampler():
        return make_sampler(diffusers_io.load_pipeline(folder, **pipeline), model, **sampling)

    def draw(params: Any, number: int) -> None:
        asked = [prompt for prompt in prompts for _ in range(COLUMNS)]
        seeds = [2**30 + i for i in range(len(asked))]
        images = sampler()(params, asked, seeds, f"samples at step {number}")
        scale = max(1, 128 // images.shape[1])
        picture = image_files.image_grid(images, COLUMNS, labels=prompts, scale=scale)
        image_files.save_png(out / f"{number}.png", picture)

    return draw


def data_prompts(pairs: Any, count: int) -> list[str]:
    """The first captions of encoded pairs; prompt 0 is the empty one."""
    held = min(count, pairs.meta.counts["prompts"] - 1)
    return [pairs.prompts[i + 1].text for i in range(held)]
