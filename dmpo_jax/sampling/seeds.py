"""Seeds of images: evaluation has a range of its own, and so never repeats collected images."""

from collections.abc import Sequence

from dmpo_jax.data.prompt_files import Prompt
from dmpo_jax.errors import UserError

GRIDS = 2**30  # first seed of image grids, the same at every step
EVALUATED = 2**31  # first seed of evaluations, above all collected ones
EACH = 2**20  # images per run


def collected_seeds(seed: int, count: int) -> list[int]:
    """Returns the seeds of a run's collected images; no two runs overlap.

    Raises:
        ValueError: `count` or the run's seed exceeds the range of seeds.
    """
    return _seeds(0, seed, count)


def evaluated_seeds(seed: int, count: int) -> list[int]:
    """Returns the seeds of an evaluation's images, held out from every collection.

    Raises:
        ValueError: as `collected_seeds`.
    """
    return _seeds(EVALUATED, seed, count)


def _seeds(first: int, seed: int, count: int) -> list[int]:
    if count > EACH or not 0 <= seed < EVALUATED // EACH:
        raise UserError(
            f"seeds are given out for 2**20 images a run and runs 0 to 2047, but got {count} "
            f"images and seed {seed}"
        )
    return [first + seed * EACH + i for i in range(count)]


def prompt_seeds(prompts: Sequence[Prompt], images_per_prompt: int, first: int) -> list[int]:
    """Returns one seed per image, counted from the prompt's own, else from `first` over all."""
    seeds = []
    for i, prompt in enumerate(prompts):
        start = first + i * images_per_prompt if prompt.seed is None else prompt.seed
        seeds += [(start + j) % 2**32 for j in range(images_per_prompt)]
    return seeds
