"""Collects preference pairs: samples two images per prompt and labels them by a scorer."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from dmpo_jax.config import arguments
from dmpo_jax.config.configs import Config
from dmpo_jax.data.prompt_files import Prompt, load_texts
from dmpo_jax.data.sources import encode_image, write_pick_a_pic
from dmpo_jax.diffusers_io import load_family
from dmpo_jax.parallel import processes
from dmpo_jax.sampling.given import check_given
from dmpo_jax.sampling.pairs import in_pairs
from dmpo_jax.sampling.sampler import open_sampler
from dmpo_jax.sampling.seeds import collected_seeds
from dmpo_jax.scoring import Scorer, make_scorer, rehearse
from dmpo_jax.scoring.labels import Labeller

LOG = logging.getLogger(__name__)


@processes.writes_out
def collect(
    config: Config, *, prompts: epath.PathLike | None = None, out: epath.PathLike
) -> epath.Path:
    """Writes `out/pairs.parquet`, in Pick-a-Pic's schema. Does nothing if it exists.

    Prompts are used in turn; runs with different seeds draw different images. Images are scored
    and written batch by batch.

    Args:
        prompts: a file of prompts, one per line; by default collect.prompts or sample.prompts.

    Returns:
        The parquet file.

    Raises:
        ValueError: the scorer is unknown or cannot judge a prompt, or a part of the model is
            missing; raised before sampling.
    """
    path = epath.Path(out) / "pairs.parquet"
    if path.exists():
        LOG.info("%s is collected already: delete it to collect anew", path)
        return path
    texts, scorer = check(config, prompts)
    sampler, params = open_sampler(
        config.model.folder, **arguments.pipeline(config), **arguments.sampling(config)
    )
    count = 2 * config.collect.pairs
    asked = [texts[i // 2 % len(texts)] for i in range(count)]
    rehearse(scorer, sampler.size, asked[: sampler.batch_size])
    batches = sampler.batches(params, asked, collected_seeds(config.seed, count), "collecting")
    label = Labeller(
        config.collect.labels,
        temperature=config.collect.temperature,
        tie_margin=config.collect.tie_margin,
        seed=config.seed,
    )

    def rows() -> Iterator[dict[str, Any]]:
        for images, captions in in_pairs(batches, asked):
            preferences = label(scorer(images, captions).reshape(-1, 2))
            for i, preference in enumerate(preferences):
                pair = slice(2 * i, 2 * i + 2)
                yield make_row(captions[2 * i], images[pair], preference, config.model.folder)

    write_pick_a_pic(path, rows())
    LOG.info("%s", label.described())
    LOG.info("the pairs are in %s", path)
    return path


def check(config: Config, prompts: epath.PathLike | None = None) -> tuple[list[str], Scorer]:
    """Returns the prompts and the scorer; ValueError if they do not fit each other or the model."""
    scorer = make_scorer(config.collect.scorer)
    texts = load_texts(prompts or config.collect.prompts or config.sample.prompts)
    scorer.check(texts)
    check_given([Prompt(text) for text in texts], load_family(config.model.folder)[1].given)
    return texts, scorer


def make_row(caption: str, images: np.ndarray, preference: float, model: str) -> dict[str, Any]:
    """Returns a row of `write_pick_a_pic`. preference: probability that image 0 wins."""
    row = {"caption": caption, "label_0": float(preference), "label_1": float(1 - preference)}
    for i, image in enumerate(images):
        row |= {f"jpg_{i}": encode_image(image), f"model_{i}": str(model)}
    return {**row, "has_label": True, "are_different": True}
