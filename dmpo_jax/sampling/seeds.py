"""Seeds of images. Each use has a range of its own, so that none is judged on what it saw."""

from collections.abc import Sequence

from dmpo_jax.data.prompt_files import Prompt
from dmpo_jax.errors import UserError

GRIDS = 2**30  # of a training run's image grids, the same at every step
EVALUATED = 2**31  # the first of evaluation's, above all that are collected
EACH = 2**20  # images a run


def collected_seeds(seed: int, count: int) -> list[int]:
    """Seeds of a run's collected images; no two runs' overlap.

    Raises:
        ValueError: more images, or a higher seed of the run, than there are seeds for.
    """
    if count > EACH or not 0 <= seed < EVALUATED // EACH:
        raise UserError(
            f"seeds are given out for 2**20 images a run and runs 0 to 2047, but got {count} "
            f"images and seed {seed}"
        )
    return [seed * EACH + i for i in range(count)]


def evaluated_seeds(seed: int, count: int) -> list[int]:
    """Seeds of an evaluation's images, held out from every collection."""
    return [EVALUATED + seed * EACH + i for i in range(count)]


def prompt_seeds(prompts: Sequence[Prompt], images_per_prompt: int, first: int) -> list[int]:
    """A seed an image: the prompt's own and the next ones, else counted from `first` over all."""
    seeds = []
    for i, prompt in enumerate(prompts):
        start = first + i * images_per_prompt if prompt.seed is None else prompt.seed
        seeds += [(start + j) % 2**32 for j in range(images_per_prompt)]
    return seeds
