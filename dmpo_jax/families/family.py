"""`Family`: how one kind of pipeline differs from the others. Arrays only: no files."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from dmpo_jax.types import Condition


class TextPart(NamedTuple):
    """One text encoder of a pipeline, and how prompts reach it.

    name: its folder. Its tokenizer's folder is named alike (`tokenizer_2`, ...).
    tokens: prompts are padded to so many; None is what tokenizer and encoder take.
    template: wraps a prompt, as `str.format` does.
    masked: the encoder is told which tokens are padding.
    layers: of a deep encoder, how many are loaded; None is all.
    """

    name: str
    tokens: int | None = None
    template: str = "{}"
    masked: bool = False
    layers: int | None = None

    @property
    def tokenizer(self) -> str:
        return self.name.replace("text_encoder", "tokenizer")


class Embedded(NamedTuple):
    """Prompts as the model takes them; lengths where the model is told them."""

    context: Float[Array, "N S D"]
    pooled: Float[Array, "N P"] | None = None
    lengths: Int[Array, " N"] | None = None


class Facts(NamedTuple):
    """What a model's config.json says of the arrays that it takes.

    latent_size: height and width that it was trained at; None: its VAE's config says.
    pooled_width: 0 where it takes no pooled embedding.
    splits: counts (heads, groups of channels) that `mesh.tensor` must divide.
    """

    in_channels: int
    latent_size: tuple[int, int] | None
    context_width: int
    pooled_width: int
    splits: frozenset[int]


class Given(NamedTuple):
    """The image that a pair is given beside its prompt, and what the model sees of it.

    kind: stands in encoded.json. fields: of RawPair and of prompt files that hold it.
    width: latent channels -> channels beside the latents.
    channels: (encode, images, masks, scaling_factor) -> `Condition.image`.
    optional: the image is dropped in training as prompts are, and guided by when sampling.
    """

    kind: str
    fields: tuple[str, ...]
    width: Callable[[int], int]
    channels: Callable[..., Float[Array, "N h w E"]]
    optional: bool = False


class Tiny(NamedTuple):
    """Configs of a random pipeline of some 100,000 parameters, for tests and debug runs.

    model: changes to the toy's model config. text: part -> changes to the toy's text config.
    parts: other entries of model_index.json. scheduler: changes to the toy's, or a whole one.
    """

    model: Mapping[str, Any]
    text: Mapping[str, Mapping[str, Any]]
    scheduler: Mapping[str, Any] = {}


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """The whole answer to "how does this kind of pipeline differ".

    name: ours, short. pipeline: the class in model_index.json.
    text: its text encoders, in order. embed: (outputs of the encoders, their masks) -> Embedded.
    model: class of the trained component; component: its folder, and the prefix in LoRA files.
    predict: (model, latents [N H W C], times [N], Condition) -> prediction [N H W C].
    facts: the model's config.json, with defaults -> Facts.
    vae: class. pack: latents are packed pack x pack before they are scaled and noised.
    noise: "ddpm" or "flow": which kind of scheduler_config.json it must have.
    told_sizes: whether `Condition.time_ids` are given.
    given: the image given beside a prompt; None where there is none.
    stored: dtype of prompt embeddings on disk.
    guidance: scale -> weights of the conditional and of the unconditional prediction.
    zero_negative: without a negative prompt, guide by zeros unless model_index.json declines.
    scheduler_overrides: what the pipeline class puts in place of scheduler_config.json's values.
    torch_class: diffusers' class of the trained component. torch_inputs: (latents [N H W C],
        times, Condition) in NumPy -> the keyword arguments of its call, NumPy where arrays.
    tiny: a small one, for debug runs.
    """

    name: str
    pipeline: str
    text: tuple[TextPart, ...]
    embed: Callable[[Sequence[Any], Sequence[Any]], Embedded]
    model: type
    component: str
    predict: Callable[[Any, Any, Any, Condition], Any]
    facts: Callable[[Mapping[str, Any]], Facts]
    vae: type
    torch_class: str
    torch_inputs: Callable[[Any, Any, Condition], dict[str, Any]]
    tiny: Tiny
    pack: int = 1
    noise: str = "ddpm"
    told_sizes: bool = False
    given: Given | None = None
    stored: str = "float16"
    guidance: Callable[[float], tuple[float, float]] = lambda scale: (scale, 1 - scale)
    zero_negative: bool = False
    scheduler_overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def given_fields(self) -> tuple[str, ...]:
        """Fields of RawPair that every pair must have."""
        return self.given.fields if self.given else ()

    @property
    def given_kind(self) -> str:
        """`Given.kind`; "" where nothing is given."""
        return self.given.kind if self.given else ""

    def make_predict(self, merge: Callable[[Any], Any]) -> Callable[..., Any]:
        """`predict(params, latents, times, condition)`; merge: parameters -> model."""

        def predict(params: Any, latents: Any, times: Any, condition: Condition) -> Any:
            return self.predict(merge(params), latents, times, condition)

        return predict

    def factor(self, vae: Mapping[str, Any]) -> int:
        """Pixels a latent, along a side. vae: its config.json."""
        return 2 ** (len(vae["block_out_channels"]) - 1)

    def trained_latents(self, model: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width of the latents that the model was trained at, by the two configs."""
        return self.facts(model).latent_size or (vae["sample_size"] // self.factor(vae),) * 2

    def condition(self, context: Any, pooled: Any, size: tuple[int, int]) -> Condition:
        """A prompt's `Condition` in NumPy, for an uncropped image of (height, width) pixels."""
        sizes: Any = np.asarray([[*size, 0, 0, *size]], np.float32) if self.told_sizes else None
        return Condition(context, pooled=pooled, time_ids=sizes)

    def random_inputs(
        self, model: Mapping[str, Any], *, largest: int, tokens: int
    ) -> tuple[np.ndarray, np.ndarray, Condition]:
        """(latents, times, condition) of two images, in NumPy, always the same.

        Latents are as the model's config.json has them, up to `largest` a side, the given
        image's channels among them.
        """
        facts, rng = self.facts(model), np.random.default_rng(0)

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32)

        height, width = (min(n, largest) for n in facts.latent_size or (largest, largest))
        latents = normal(2, height, width, facts.in_channels)
        context = normal(2, tokens, facts.context_width)
        pooled = normal(2, facts.pooled_width) if facts.pooled_width else None
        one = self.condition(context, pooled, (1024, 768))
        sizes = one.time_ids
        if sizes is not None:
            sizes = np.stack([sizes, sizes + np.float32(12)])
        return latents, np.array([37, 901]), one._replace(time_ids=sizes)

    def check_model(self, model: Mapping[str, Any], latent_channels: int) -> None:
        """ValueError where a model, by its config.json, does not take these latents."""
        self.check_channels(self.facts(model).in_channels, latent_channels)

    def check_channels(self, in_channels: int, latent_channels: int) -> None:
        """ValueError where the model does not take the latents and the given image's channels."""
        beside = self.given.width(latent_channels) if self.given else 0
        if in_channels == latent_channels + beside:
            return
        if len(self.given_fields) > 1 and in_channels == latent_channels:
            raise ValueError(
                f"the model of this {self.name} pipeline takes {in_channels} channels, the latents "
                f"alone, and sees neither {' nor '.join(reversed(self.given_fields))}: train it as "
                "its text-to-image class (_class_name in model_index.json), or take one of "
                f"{latent_channels + beside} channels"
            )
        raise ValueError(
            f"the model takes {in_channels} channels, but {self.name} models take "
            f"{latent_channels} of the latents and {beside} of a given image, "
            f"{latent_channels + beside} in all: take the VAE, and the pairs encoded with it, that "
            "belong to this model"
        )


class Published(NamedTuple):
    """A published model's shapes, to plan for without its files.

    model: config.json of the trained component. factor: pixels a latent, along a side.
    """

    family: Family
    model: Mapping[str, Any]
    scaling_factor: float
    scheduler: Mapping[str, Any]
    latent_channels: int = 4
    factor: int = 8
    tokens: int = 77
