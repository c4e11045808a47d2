"""Seeds of images: evaluation has a range of its own, and so never repeats collected images."""

from collections.abc import Sequence

import numpy as np

from dmpo_jax.data.prompt_files import Prompt
from dmpo_jax.errors import UserError

SEEDS = 2**31  # seeds of runs, from 0
GRIDS = 2**30  # first seed of image grids, the same at every step
EVALUATED = 2**31  # first seed of evaluations, above all collected ones
EACH = 2**20  # images per run


def collected_seeds(seed: int, count: int) -> list[int]:
    """Returns the seeds of a run's collected images.

    Runs of seeds 0 to 2047 never share an image. Others begin at a random place.

    Raises:
        ValueError: `count` or the run's seed exceeds its range.
    """
    return _seeds(0, seed, count)


def evaluated_seeds(seed: int, count: int) -> list[int]:
    """Returns the seeds of an evaluation's images, held out from every collection.

    Raises:
        ValueError: as `collected_seeds`.
    """
    return _seeds(EVALUATED, seed, count)


def _seeds(first: int, seed: int, count: int) -> list[int]:
    if count > EACH or not 0 <= seed < SEEDS:
        raise UserError(
            f"a run draws at most {EACH} images and its seed is in [0, {SEEDS}), but got {count} "
            f"images and seed {seed}"
        )
    blocks = EVALUATED // EACH
    if seed < blocks:
        start = seed * EACH
    else:
        start = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]) % (
            EVALUATED - EACH
        )
    return [first + start + i for i in range(count)]


def prompt_seeds(prompts: Sequence[Prompt], images_per_prompt: int, first: int) -> list[int]:
    """Returns one seed per image, counted from the prompt's own, else from `first` over all."""
    seeds = []
    for i, prompt in enumerate(prompts):
        start = first + i * images_per_prompt if prompt.seed is None else prompt.seed
        seeds += [(start + j) % 2**32 for j in range(images_per_prompt)]
    return seeds
