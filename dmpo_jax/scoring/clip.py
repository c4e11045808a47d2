"""Scorers by CLIP's embeddings: PickScore, HPSv2, CLIPScore, and the aesthetic predictor.

The image tower runs on each batch. The text tower runs on each distinct prompt once and is
dropped. Everything is float32.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, UInt8

from dmpo_jax.diffusers_io import reward_folders
from dmpo_jax.models import parameters
from dmpo_jax.scoring import pixels, texts
from dmpo_jax.scoring.batches import in_batches
from dmpo_jax.scoring.published import PUBLISHED, find, naming, version_of

LOG = logging.getLogger(__name__)
_LETTERS = {768: "b", 1024: "l", 1280: "h", 1408: "g", 1664: "bigg"}  # by the image tower's width


class ClipScorer:
    """Scores images by the cosine between an image's embedding and its prompt's.

    kind: a key of PUBLISHED. folder: of a complete CLIP model, or a hub id.
    """

    def __init__(self, kind: str, folder: str):
        self.kind, self.folder = kind, folder
        self._how = PUBLISHED[kind]
        self.temperature, self.uses_prompt = self._how.temperature, self._how.uses_prompt
        self._asked: dict[str, None] = {}  # distinct prompts, in order
        self._embedded: dict[str, np.ndarray] = {}

    @functools.cached_property
    def _found(self) -> reward_folders.RewardFolder:
        return find(self.kind, self.folder)

    @functools.cached_property
    def _configs(self) -> dict[str, Any]:
        """The config of each tower, checked against the headers of the weights."""
        with naming(self.kind):
            found = {"vision": reward_folders.load_vision_tower(self._found, abstract=True).config}
            if self.uses_prompt:
                text = reward_folders.load_text_tower(self._found, abstract=True)
                found["text"] = text.config
        return found

    @property
    def name(self) -> str:
        """The kind; of plain CLIP the variant, such as clip-vit-l-14."""
        if self.kind != "clip":
            return self.kind
        vision = self._configs["vision"]
        letter = _LETTERS.get(vision.hidden_size, vision.hidden_size)
        side = f"-{vision.image_size}" if vision.image_size != 224 else ""
        return f"clip-vit-{letter}-{vision.patch_size}{side}"

    @property
    def version(self) -> str:
        """Hashes of weights and settings, and the preprocessing."""
        keys = ("hidden_act", "layer_norm_eps", "num_attention_heads")
        settings = {side: [config[key] for key in keys] for side, config in self._configs.items()}
        return version_of(self._found, self.kind, settings)

    def check(self, prompts: Sequence[str]) -> None:
        """Raises ValueError if the folder is not such a scorer's; reads headers and configs."""
        distinct = dict.fromkeys(prompts)
        if "text" in self._configs:
            limit = self._configs["text"].max_position_embeddings
            texts.warn_of_long(self.kind, self._tokenizer, list(distinct), limit)
        _ = self._scale
        self._asked |= distinct

    @functools.cached_property
    def _tokenizer(self) -> Any:
        with naming(self.kind):
            return reward_folders.load_tokenizer(
                self._found.path, "clip", self._configs["text"].vocab_size
            )

    @functools.cached_property
    def _scale(self) -> np.float32:
        with naming(self.kind):
            scaled = self._how.scaled
            return np.float32(reward_folders.read_logit_scale(self._found) if scaled else 1)

    @functools.cached_property
    def _vision(self) -> tuple[Any, parameters.Params]:
        LOG.info("loading %s from %s", self.kind, self._found.path)
        return parameters.split(reward_folders.load_vision_tower(self._found))

    def features(self, images: UInt8[np.ndarray, "N H W C"]) -> Float32[np.ndarray, "N D"]:
        """Returns the images' embeddings, of length 1."""
        structure, params = self._vision
        side = self._configs["vision"].image_size

        def run(part: np.ndarray) -> jax.Array:
            return _embed_images(structure, params, pixels.prepare(part, side, self._how.pixels))

        return in_batches(run, images)

    def __call__(
        self, images: UInt8[np.ndarray, "N H W C"], prompts: Sequence[str]
    ) -> Float32[np.ndarray, " N"]:
        wanted = self._embed(prompts)
        return (self.features(images) * wanted).sum(-1) * self._scale

    def _embed(self, prompts: Sequence[str]) -> Float32[np.ndarray, "N D"]:
        """Returns the prompts' embeddings; computes those of all that were announced at once."""
        if not self._embedded.keys() >= set(prompts):
            self._asked |= dict.fromkeys(prompts)
            new = [prompt for prompt in self._asked if prompt not in self._embedded]
            structure, params = parameters.split(reward_folders.load_text_tower(self._found))
            limit = self._configs["text"].max_position_embeddings
            cleaned = [texts.cleaned(p) for p in new] if self._how.cleaned else new
            ids, _ = texts.tokens(self._tokenizer, cleaned, limit)
            found = in_batches(lambda part: _embed_texts(structure, params, part), ids)
            self._embedded |= dict(zip(new, found, strict=True))
        return np.stack([self._embedded[prompt] for prompt in prompts])


class AestheticScorer(ClipScorer):
    """LAION's aesthetic predictor: an affine map of the image's embedding."""

    @functools.cached_property
    def _head(self) -> tuple[np.ndarray, float]:
        with naming(self.kind):
            return reward_folders.read_head(self._found)

    def check(self, prompts: Sequence[str]) -> None:
        """Raises ValueError if the folder is not such a scorer's; reads its head."""
        super().check(prompts)
        _ = self._head

    def __call__(
        self, images: UInt8[np.ndarray, "N H W C"], prompts: Sequence[str]
    ) -> Float32[np.ndarray, " N"]:
        weights, bias = self._head
        return self.features(images) @ weights + np.float32(bias)


def _unit(x: Float[Array, "N D"]) -> Float[Array, "N D"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


# Parameters are arguments: constants would be compiled into the program.
@functools.partial(jax.jit, static_argnums=0)
def _embed_images(
    structure: Any, params: parameters.Params, images: Float32[Array, "N H W 3"]
) -> Float32[Array, "N D"]:
    return _unit(parameters.merge(structure, params)(images))


@functools.partial(jax.jit, static_argnums=0)
def _embed_texts(
    structure: Any, params: parameters.Params, ids: Int32[Array, "N S"]
) -> Float32[Array, "N D"]:
    return _unit(parameters.merge(structure, params)(ids).pooled)
