"""`Family`: everything specific to one kind of pipeline. Arrays only: no files."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from dmpo_jax.diffusion.noise import Factor
from dmpo_jax.errors import UserError
from dmpo_jax.types import Condition


class TextPart(NamedTuple):
    """One text encoder of a pipeline and its tokenization.

    name: its folder. Its tokenizer's folder is named alike (`tokenizer_2`, ...).
    tokens: prompts are padded to this length; None is the limit of tokenizer and encoder.
    template: wraps a prompt, as `str.format` does.
    masked: the encoder receives the attention mask.
    layers: number of layers to load of a deep encoder; None loads all.
    optional: a pipeline may lack it (null in model_index.json). `tokens` zeros as wide as the
        model's context then stand for its states.
    """

    name: str
    tokens: int | None = None
    template: str = "{}"
    masked: bool = False
    layers: int | None = None
    optional: bool = False

    @property
    def tokenizer(self) -> str:
        return self.name.replace("text_encoder", "tokenizer")


class Embedded(NamedTuple):
    """Prompt embeddings, one prompt a row; lengths only if the model takes them."""

    context: Float[Array, "N S D"]
    pooled: Float[Array, "N P"] | None = None
    lengths: Int[Array, " N"] | None = None

    def rows(self, count: int) -> list["Embedded"]:
        """Returns the first `count` prompts on the host, each without the batch axis."""
        arrays = jax.device_get(self)
        return [jax.tree.map(lambda x, i=i: np.asarray(x[i]), arrays) for i in range(count)]


class Facts(NamedTuple):
    """Shapes of a model's inputs, from its config.json.

    latent_size: height and width of the VAE's latents that it was trained at; None: see its
        VAE's config.
    pooled_width: 0 if it takes no pooled embedding.
    splits: counts (heads, groups of channels) that `mesh.tensor` must divide.
    patch: side of a transformer's patches, in packed latents; one patch is one token.
    lengths: the model takes the number of text positions (`Condition.lengths`).
    """

    in_channels: int
    latent_size: tuple[int, int] | None
    context_width: int
    pooled_width: int
    splits: frozenset[int]
    patch: int = 1
    lengths: bool = False


class Given(NamedTuple):
    """The input image of a pair besides its prompt, and the model's channels for it.

    kind: written to encoded.json. fields: of RawPair and of prompt files that hold it.
    width: latent channels -> channels beside the latents.
    channels: (encode, images, masks, scaling_factor) -> `Condition.image`.
    optional: training drops the image as it drops prompts, and sampling guides by it.
    """

    kind: str
    fields: tuple[str, ...]
    width: Callable[[int], int]
    channels: Callable[..., Float[Array, "N h w E"]]
    optional: bool = False


class Tiny(NamedTuple):
    """Configs of a random pipeline of about 100,000 parameters, for tests and debug runs.

    model: changes to the toy's UNet config, or all of another model's. text: part -> changes to
    the toy's text config. vae, scheduler: changes to the toy's.
    """

    model: Mapping[str, Any]
    text: Mapping[str, Mapping[str, Any]]
    scheduler: Mapping[str, Any] = {}
    vae: Mapping[str, Any] = {}


def config_factors(vae: Any) -> tuple[Factor, Factor]:
    """Returns (scaling_factor, shift_factor) of a VAE's config."""
    return vae.config.scaling_factor, vae.config.shift_factor or 0.0


def from_channels_first(predicted: Any, shape: Sequence[int]) -> Any:
    """Returns PyTorch's prediction [N C H W] as [N H W C]."""
    return predicted.transpose(0, 2, 3, 1)


def no_check(folder: Any, facts: Facts, texts: Mapping[str, Mapping[str, Any]]) -> None:
    """Accepts any text encoders."""


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """Everything in which one kind of pipeline differs from the others.

    name: our short name. pipeline: the class in model_index.json.
    text: its text encoders, in order, optional ones last. absent: optional ones that a pipeline
        lacks (`without`). embed: (outputs of both in that order, their masks) -> Embedded.
    model: class of the trained component; component: its folder, and the prefix in LoRA files.
    sensitive: parts of the paths of layers that are never quantised (`models.quantised`): the
        first and the last ones, and those of the time and the text.
    predict: (model, latents [N H W C], times [N], Condition) -> prediction [N H W C].
    facts: the model's config.json -> Facts, with defaults filled in.
    vae: class. pack: latents are packed pack x pack before they are scaled and noised.
    factors: VAE -> (scaling factor, shift factor), each a number or one per packed channel.
    noise: "ddpm" or "flow", the kind that scheduler_config.json must have.
    sizes: (height, width) in pixels -> `Condition.sizes` of an uncropped image; None if the
        model takes no sizes.
    check_text: (pipeline folder, Facts, text part -> its config.json); raises ValueError if
        the text encoders do not fit the model.
    given: the input image besides the prompt; None if there is none.
    stored: dtype of prompt embeddings on disk.
    guidance: scale -> weights of the conditional and of the unconditional prediction.
    zero_negative: without a negative prompt, guide by zeros unless model_index.json declines.
    scheduler_overrides: values that the pipeline class sets in place of
        scheduler_config.json's, or passes to its sampler besides (`Solver.given`).
    torch_class: diffusers' class of the trained component. torch_inputs: (latents [N H W C],
        times, Condition) in NumPy -> keyword arguments of its call, with arrays in NumPy.
        torch_output: (what the call returns, in NumPy, shape of the latents) -> [N H W C].
    tiny: configs of a small pipeline, for debug runs.
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
    torch_output: Callable[[Any, Sequence[int]], Any] = from_channels_first
    absent: tuple[TextPart, ...] = ()
    pack: int = 1
    factors: Callable[[Any], tuple[Factor, Factor]] = config_factors
    noise: str = "ddpm"
    sizes: Callable[[int, int], Sequence[int]] | None = None
    check_text: Callable[[Any, Facts, Mapping[str, Mapping[str, Any]]], None] = no_check
    given: Given | None = None
    sensitive: tuple[str, ...] = ()
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
        """`Given.kind`; "" if there is no input image."""
        return self.given.kind if self.given else ""

    @property
    def told_sizes(self) -> bool:
        """True if the model takes `Condition.sizes`."""
        return self.sizes is not None

    def condition(self, prompt: Embedded, size: tuple[int, int]) -> Condition:
        """Returns the Condition of one prompt and an image of (height, width) pixels."""
        told: dict[str, Any] = prompt._asdict()
        if self.sizes is not None:
            told["sizes"] = np.asarray([self.sizes(*size)], np.float32)
        return Condition(**told)

    def make_predict(self, merge: Callable[[Any], Any]) -> Callable[..., Any]:
        """Returns `predict(params, latents, times, condition)`; merge: parameters -> model."""

        def predict(params: Any, latents: Any, times: Any, condition: Condition) -> Any:
            return self.predict(merge(params), latents, times, condition)

        return predict

    def check_size(self, size: tuple[int, int], facts: Facts, vae: Any) -> None:
        """Raises ValueError unless (height, width) in pixels are multiples of a patch.

        Args:
            vae: its config.
        """
        unit = self.factor(vae) * self.pack * facts.patch
        if size[0] % unit or size[1] % unit:
            raise UserError(f"height and width must be multiples of {unit} pixels, got {size}")

    def tokens(self, facts: Facts, latents: Sequence[int]) -> int:
        """Number of tokens of an image, from the height and width of its packed latents."""
        return (latents[0] // facts.patch) * (latents[1] // facts.patch)

    def factor(self, vae: Mapping[str, Any]) -> int:
        """Pixels per latent along a side. vae: its config.json."""
        return 2 ** (len(vae["block_out_channels"]) - 1)

    def trained_latents(self, model: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width of the latents that the model was trained at, by the two configs."""
        side = vae["sample_size"] // self.factor(vae)
        return self.facts(model).latent_size or (side, side)

    def random_inputs(
        self, model: Mapping[str, Any], *, largest: int, tokens: int
    ) -> tuple[np.ndarray, np.ndarray, Condition]:
        """Returns random (latents, times, condition) of two images, in NumPy, always the same.

        Latents have the size in the model's config.json, at most `largest` a side, and include
        the input image's channels.
        """
        facts, rng = self.facts(model), np.random.default_rng(0)

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32)

        sides = facts.latent_size or (largest, largest)
        height, width = (min(n // self.pack, largest) for n in sides)
        latents = normal(2, height, width, facts.in_channels)
        context = normal(2, tokens, facts.context_width)
        pooled = normal(2, facts.pooled_width) if facts.pooled_width else None
        lengths = np.array([tokens, tokens // 2 + 1], np.int32) if facts.lengths else None
        embedded: Any = (context, pooled, lengths)  # NumPy arrays, which the call accepts
        one = self.condition(Embedded(*embedded), (1024, 768))
        sizes = one.sizes
        if sizes is not None:
            sizes = np.stack([sizes, sizes + np.float32(12)])
        return latents, np.array([37, 901]), one._replace(sizes=sizes)

    def check_model(self, model: Mapping[str, Any], latent_channels: int) -> None:
        """Raises ValueError if a model, by its config.json, does not take these latents."""
        self.check_takes(self.facts(model), latent_channels)

    def check_takes(self, facts: Facts, latent_channels: int) -> None:
        """Raises ValueError if a model with these facts does not take these latents."""
        self.check_channels(facts.in_channels, latent_channels)

    def check_channels(self, in_channels: int, latent_channels: int) -> None:
        """Raises ValueError unless the model takes the latents' and the input image's channels.

        Args:
            latent_channels: of the VAE's latents, before they are packed.
        """
        beside = self.given.width(latent_channels) if self.given else 0
        latent_channels *= self.pack**2
        if in_channels == latent_channels + beside:
            return
        if len(self.given_fields) > 1 and in_channels == latent_channels:
            raise UserError(
                f"the model of this {self.name} pipeline takes {in_channels} channels, the latents "
                f"alone, and sees neither {' nor '.join(reversed(self.given_fields))}: train it as "
                "its text-to-image class (_class_name in model_index.json), or take one of "
                f"{latent_channels + beside} channels"
            )
        raise UserError(
            f"the model takes {in_channels} channels, but {self.name} models take "
            f"{latent_channels} of the latents and {beside} of a given image, "
            f"{latent_channels + beside} in all: take the VAE, and the pairs encoded with it, that "
            "belong to this model"
        )


@functools.cache
def unguided(family: Family) -> Family:
    """Returns the family of a distilled model, which is sampled without guidance."""
    return dataclasses.replace(family, guidance=lambda scale: (1.0, 0.0))


@functools.cache
def without(family: Family, names: frozenset[str]) -> Family:
    """Returns the family of a pipeline that lacks these optional text encoders."""
    if not names:
        return family
    here = tuple(part for part in family.text if part.name not in names)
    gone = tuple(part for part in family.text if part.name in names)
    return dataclasses.replace(family, text=here, absent=gone)


class Published(NamedTuple):
    """Shapes of a published model, to plan without its files.

    model: config.json of the trained component. factor: pixels per latent along a side.
    """

    family: Family
    model: Mapping[str, Any]
    scaling_factor: float
    scheduler: Mapping[str, Any]
    latent_channels: int = 4
    factor: int = 8
    tokens: int = 77
    shift_factor: float = 0.0
