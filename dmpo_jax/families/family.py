"""`Family`: how one kind of pipeline differs from the others. Arrays only: no files."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from dmpo_jax.diffusion.noise import Factor
from dmpo_jax.errors import UserError
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
    """Prompts as the model takes them, one a row; lengths where the model is told them."""

    context: Float[Array, "N S D"]
    pooled: Float[Array, "N P"] | None = None
    lengths: Int[Array, " N"] | None = None

    def rows(self, count: int) -> list["Embedded"]:
        """The first `count` prompts, each without the axis of prompts, on the host."""
        arrays = jax.device_get(self)
        return [jax.tree.map(lambda x, i=i: np.asarray(x[i]), arrays) for i in range(count)]


class Facts(NamedTuple):
    """What a model's config.json says of the arrays that it takes.

    latent_size: height and width that it was trained at, of the VAE's latents; None: its VAE's
        config says.
    pooled_width: 0 where it takes no pooled embedding.
    splits: counts (heads, groups of channels) that `mesh.tensor` must divide.
    patch: side of the patches, of packed latents, that a transformer's tokens are.
    """

    in_channels: int
    latent_size: tuple[int, int] | None
    context_width: int
    pooled_width: int
    splits: frozenset[int]
    patch: int = 1


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


def config_factors(vae: Any) -> tuple[Factor, Factor]:
    """(scaling_factor, shift_factor) of a VAE's config."""
    return vae.config.scaling_factor, vae.config.shift_factor or 0.0


def no_check(folder: Any, facts: Facts, texts: Mapping[str, Mapping[str, Any]]) -> None:
    """Accepts any text encoders."""


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """The whole answer to "how does this kind of pipeline differ".

    name: ours, short. pipeline: the class in model_index.json.
    text: its text encoders, in order. embed: (outputs of the encoders, their masks) -> Embedded.
    model: class of the trained component; component: its folder, and the prefix in LoRA files.
    predict: (model, latents [N H W C], times [N], Condition) -> prediction [N H W C].
    facts: the model's config.json, with defaults -> Facts.
    vae: class. pack: latents are packed pack x pack before they are scaled and noised.
    factors: VAE -> (scaling factor, shift factor), each a number or one a packed channel.
    noise: "ddpm" or "flow": which kind of scheduler_config.json it must have.
    sizes: (height, width) in pixels -> `Condition.sizes` of an uncropped image; None where
        the model is told no sizes.
    check_text: (pipeline folder, Facts, text part -> its config.json); raises ValueError where
        the text encoders are not the model's.
    given: the image given beside a prompt; None where there is none.
    stored: dtype of prompt embeddings on disk.
    guidance: scale -> weights of the conditional and of the unconditional prediction.
    zero_negative: without a negative prompt, guide by zeros unless model_index.json declines.
    scheduler_overrides: what the pipeline class puts in place of scheduler_config.json's values,
        or hands its sampler beside them (`Solver.given`).
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
    factors: Callable[[Any], tuple[Factor, Factor]] = config_factors
    noise: str = "ddpm"
    sizes: Callable[[int, int], Sequence[int]] | None = None
    check_text: Callable[[Any, Facts, Mapping[str, Mapping[str, Any]]], None] = no_check
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

    @property
    def told_sizes(self) -> bool:
        """Whether `Condition.sizes` are given."""
        return self.sizes is not None

    def condition(self, prompt: Embedded, size: tuple[int, int]) -> Condition:
        """What the model is told of one prompt and an image of (height, width) pixels."""
        told: dict[str, Any] = prompt._asdict()
        if self.sizes is not None:
            told["sizes"] = np.asarray([self.sizes(*size)], np.float32)
        return Condition(**told)

    def make_predict(self, merge: Callable[[Any], Any]) -> Callable[..., Any]:
        """`predict(params, latents, times, condition)`; merge: parameters -> model."""

        def predict(params: Any, latents: Any, times: Any, condition: Condition) -> Any:
            return self.predict(merge(params), latents, times, condition)

        return predict

    def check_size(self, size: tuple[int, int], facts: Facts, vae: Any) -> None:
        """ValueError where (height, width) in pixels are not whole patches of packed latents.

        Args:
            vae: its config.
        """
        unit = self.factor(vae) * self.pack * facts.patch
        if size[0] % unit or size[1] % unit:
            raise UserError(f"height and width must be multiples of {unit} pixels, got {size}")

    def tokens(self, facts: Facts, latents: Sequence[int]) -> int:
        """Tokens of an image, by the height and width of its packed latents."""
        return (latents[0] // facts.patch) * (latents[1] // facts.patch)

    def factor(self, vae: Mapping[str, Any]) -> int:
        """Pixels a latent, along a side. vae: its config.json."""
        return 2 ** (len(vae["block_out_channels"]) - 1)

    def trained_latents(self, model: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width of the latents that the model was trained at, by the two configs."""
        side = vae["sample_size"] // self.factor(vae)
        return self.facts(model).latent_size or (side, side)

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

        sides = facts.latent_size or (largest, largest)
        height, width = (min(n // self.pack, largest) for n in sides)
        latents = normal(2, height, width, facts.in_channels)
        context = normal(2, tokens, facts.context_width)
        pooled = normal(2, facts.pooled_width) if facts.pooled_width else None
        embedded: Any = (context, pooled)  # numpy, which the call takes as it is
        one = self.condition(Embedded(*embedded), (1024, 768))
        sizes = one.sizes
        if sizes is not None:
            sizes = np.stack([sizes, sizes + np.float32(12)])
        return latents, np.array([37, 901]), one._replace(sizes=sizes)

    def check_model(self, model: Mapping[str, Any], latent_channels: int) -> None:
        """ValueError where a model, by its config.json, does not take these latents."""
        self.check_takes(self.facts(model), latent_channels)

    def check_takes(self, facts: Facts, latent_channels: int) -> None:
        """As `check_model`, by the model's facts."""
        self.check_channels(facts.in_channels, latent_channels)

    def check_channels(self, in_channels: int, latent_channels: int) -> None:
        """ValueError where the model does not take the latents and the given image's channels.

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
