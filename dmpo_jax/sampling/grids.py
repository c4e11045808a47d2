"""Image grids of a training run."""

import functools
import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from dmpo_jax import diffusers_io
from dmpo_jax.data.encoded.prompt_store import PromptEmbedding, PromptStore
from dmpo_jax.families import Family
from dmpo_jax.families.family import Embedded
from dmpo_jax.sampling.images import image_grid, save_png
from dmpo_jax.sampling.sampler import Sampler
from dmpo_jax.sampling.seeds import GRIDS

LOG = logging.getLogger(__name__)
COLUMNS = 4


def why_no_grids(family: Family) -> str:
    """Returns the reason why a run of this family draws no grids; "" if it can."""
    if jax.process_count() > 1:
        return "image grids are drawn by single-process runs only"
    if family.given:
        return "no image grids are drawn: this model needs an image beside each prompt"
    return ""


def embed_texts(
    texts: Sequence[str],
    store: PromptStore,
    load_pipeline: Callable[[], diffusers_io.Pipeline],
) -> dict[str, Embedded]:
    """Returns {text: embedding}, on the host in float32, and holds no text encoder afterwards.

    From the store where it has all of them (`PromptStore.find`): as stored, which is how training
    sees them. Otherwise by text encoders, once.

    load_pipeline: called only for the latter.
    """
    found = store.find(texts)
    if found.keys() >= set(texts):
        return {text: _in_float32(prompt) for text, prompt in found.items()}
    distinct = list(dict.fromkeys(texts))
    LOG.info(
        "image grids: %d prompts are embedded now, and the text encoders then freed", len(distinct)
    )
    embedded = diffusers_io.embed_prompts(load_pipeline(), distinct)
    by_text = dict(zip(distinct, embedded, strict=True))
    del embedded
    gc.collect()  # modules form reference cycles that keep their arrays alive
    return by_text


def _in_float32(prompt: PromptEmbedding) -> Embedded:
    context: Any = prompt.context.astype(np.float32)
    pooled: Any = None if prompt.pooled is None else prompt.pooled.astype(np.float32)
    length: Any = prompt.length
    return Embedded(context, pooled, length)


def make_draw(
    open_sampler: Callable[[], Sampler], prompts: Sequence[str], out: epath.Path
) -> Callable[[Any, int], Callable[[], Image.Image]]:
    """Returns (all parameters of the model, step) -> a function that writes and returns the grid.

    It is out/<step>.png, one row per prompt. Seeds are the same at every step.
    open_sampler: called before the first grid only, since its models may never be needed.
    """
    opened = functools.cache(open_sampler)

    def draw(params: Any, number: int) -> Callable[[], Image.Image]:
        asked = [prompt for prompt in prompts for _ in range(COLUMNS)]
        seeds = [GRIDS + i for i in range(len(asked))]
        images = opened()(params, asked, seeds, f"samples at step {number}")
        scale = max(1, 128 // images.shape[1])

        def write() -> Image.Image:
            grid = image_grid(images, COLUMNS, labels=prompts, scale=scale)
            save_png(out / f"{number}.png", grid)
            return grid

        return write

    return draw
