"""Image grids that a training run draws on its way."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax

from dmpo_jax import diffusers_io
from dmpo_jax.sampling import images as image_files
from dmpo_jax.sampling.sampler import load_prompts, make_sampler

LOG = logging.getLogger(__name__)


def make_draw(run: Any, policy: Callable[[Any], Any]) -> Callable[[Any, int], None]:
    """(params, step) -> samples/<step>.png, a row a prompt, the same seeds at every step.

    Args:
        run: a `train.Run`. policy: a state's parameters, or adapters -> the whole model's.
    """
    config = run.config
    if not config.log.sample_every:
        return lambda params, number: None
    if jax.process_count() > 1:
        LOG.warning("image grids are drawn by single-process runs only")
        return lambda params, number: None
    if run.pairs.meta["image_kind"]:
        LOG.warning("no image grids are drawn: this model needs an image beside each prompt")
        return lambda params, number: None
    prompts = run_prompts(run)
    columns = 4

    @functools.cache
    def sampler():
        return make_sampler(
            diffusers_io.load_pipeline(
                config.model.folder,
                vae=config.model.vae,
                variant=config.model.variant or None,
                dtype=config.model.compute_dtype,
            ),
            run.unet,
            steps=config.sample.steps,
            guidance_scale=config.sample.guidance_scale,
            batch_size=config.sample.batch_size,
            devices=run.devices,
        )

    def draw(params: Any, number: int) -> None:
        asked = [prompt for prompt in prompts for _ in range(columns)]
        seeds = [2**30 + i for i in range(len(asked))]
        images = sampler()(policy(params), asked, seeds, f"samples at step {number}")
        scale = max(1, 128 // images.shape[1])
        picture = image_files.image_grid(images, columns, labels=prompts, scale=scale)
        image_files.save_png(run.workdir / "samples" / f"{number}.png", picture)

    return draw


def run_prompts(run: Any) -> list[str]:
    """The prompts of image grids: the config's, else the first captions of the data."""
    count = run.config.sample.count
    if run.config.sample.prompts:
        return load_prompts(run.config.sample.prompts)[:count]
    held = min(count, run.pairs.meta["counts"]["prompts"] - 1)
    return [run.pairs.prompts[i + 1].text for i in range(held)]
