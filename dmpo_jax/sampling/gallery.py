"""Writes a folder of sampled images: one PNG each, with embedded settings, and a grid of all."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from dmpo_jax.data.prompt_files import Prompt
from dmpo_jax.sampling.images import image_grid, save_png
from dmpo_jax.sampling.sampler import Sampler

LOG = logging.getLogger(__name__)
GRID_IMAGES = 256  # on one grid; more would exhaust memory and fit on no screen


def write_gallery(
    out: epath.Path,
    sampler: Sampler,
    params: Any,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
) -> int:
    """Samples and writes `out/NNNNN.png`, batch by batch, and `out/grid.png`, one row per prompt.

    Args:
        seeds: the same number for each prompt, prompt after prompt.
        settings: written into every PNG, with the prompt, the seed and the sampler's name.

    Returns:
        The number of images.
    """
    columns, first, kept = len(seeds) // len(prompts), 0, []
    each = [prompt for prompt in prompts for _ in range(columns)]
    rows = max(GRID_IMAGES // columns, 1)
    settings = {**settings, "sampler": sampler.name}
    settings |= {"height": sampler.size[0], "width": sampler.size[1]}
    for images in sampler.batches(params, each, seeds):
        for i, image in enumerate(images, first):
            prompt = each[i]
            about = {"prompt": prompt.text, "negative_prompt": sampler.negative_of(prompt)}
            about |= {k: v for k, v in prompt._asdict().items() if k in ("image", "mask") and v}
            about = {**settings, **about, "seed": seeds[i]}
            save_png(out / f"{i:05}.png", Image.fromarray(image), about)
        kept += list(images[: max(rows * columns - first, 0)])
        first += len(images)
    if rows < len(prompts):
        LOG.info("grid.png shows the first %d of %d prompts", rows, len(prompts))
    labels = [prompt.text for prompt in prompts[:rows]]
    save_png(out / "grid.png", image_grid(np.stack(kept), columns, labels=labels))
    return first
