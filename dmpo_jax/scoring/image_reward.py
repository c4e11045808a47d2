"""ImageReward: BLIP reads the image and the prompt together, so each pair is one pass."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt8

from dmpo_jax.diffusers_io import reward_folders
from dmpo_jax.models import parameters
from dmpo_jax.scoring import pixels, texts
from dmpo_jax.scoring.batches import in_batches
from dmpo_jax.scoring.published import PUBLISHED, find, naming, version_of

LOG = logging.getLogger(__name__)
TOKENS = 35  # of a prompt


class ImageRewardScorer:
    """folder: of ImageReward's weights and BERT's tokenizer, or a hub id."""

    name, uses_prompt = "imagereward", True

    def __init__(self, folder: str):
        self.folder = folder
        self._how = PUBLISHED[self.name]
        self.temperature = self._how.temperature

    @functools.cached_property
    def _found(self) -> reward_folders.RewardFolder:
        return find(self.name, self.folder)

    @functools.cached_property
    def _config(self) -> Any:
        """The model's config, checked against the headers of the weights."""
        with naming(self.name):
            return reward_folders.load_image_reward(self._found, abstract=True).config

    @functools.cached_property
    def _tokenizer(self) -> Any:
        with naming(self.name):
            path, known = self._found.path, self._config.vocab_size
            return reward_folders.load_tokenizer(path, "bert", known)

    @property
    def version(self) -> str:
        """Hashes of weights and settings, and the preprocessing."""
        heads = [self._config.vision_heads, self._config.text_heads]
        return version_of(self._found, self.name, heads)

    def check(self, prompts: Sequence[str]) -> None:
        """Raises ValueError if the folder is not ImageReward's; reads headers and configs."""
        texts.warn_of_long(self.name, self._tokenizer, list(dict.fromkeys(prompts)), TOKENS)

    @functools.cached_property
    def _model(self) -> tuple[Any, parameters.Params]:
        LOG.info("loading %s from %s", self.name, self._found.path)
        return parameters.split(reward_folders.load_image_reward(self._found))

    def __call__(
        self, images: UInt8[np.ndarray, "N H W C"], prompts: Sequence[str]
    ) -> Float32[np.ndarray, " N"]:
        structure, params = self._model
        ids, mask = texts.tokens(self._tokenizer, prompts, TOKENS)
        side = self._config.image_size

        def run(part: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> jax.Array:
            seen = pixels.prepare(part, side, self._how.pixels)
            return _score(structure, params, seen, ids, mask)

        return in_batches(run, images, ids, mask)


@functools.partial(jax.jit, static_argnums=0)
def _score(
    structure: Any,
    params: parameters.Params,
    images: Float32[Array, "N H W 3"],
    ids: Int32[Array, "N S"],
    mask: Int32[Array, "N S"],
) -> Float32[Array, " N"]:
    return parameters.merge(structure, params)(images, ids, mask)
