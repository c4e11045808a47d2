"""Samples uint8 images from prompts and seeds, one batch at a time."""

import dataclasses
import functools
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext as nothing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import UInt8

from dmpo_jax import diffusers_io
from dmpo_jax.data.prompt_files import Prompt
from dmpo_jax.diffusion import samplers
from dmpo_jax.diffusion.noise import Factor, restore_latents
from dmpo_jax.families.family import Embedded, Given
from dmpo_jax.models import parameters
from dmpo_jax.models.execution import AUTO, Execution
from dmpo_jax.parallel import meshes, placement
from dmpo_jax.progress import Progress
from dmpo_jax.sampling.given import check_given, read_mask, read_source
from dmpo_jax.types import Condition

EMBED_AHEAD = 256  # prompts embedded together; a text encoder is compiled anew for each such part


@dataclasses.dataclass
class Sampler:
    """Samples images: call it for all at once, or iterate over its `batches`.

    name: of the sampler, one of `samplers.SAMPLERS`; size: height and width in pixels.
    attention: its kernel.
    embed: prompts -> their embeddings, float32.
    """

    pipeline: diffusers_io.Pipeline
    name: str
    size: tuple[int, int]
    attention: str
    batch_size: int
    negative_prompt: str | None
    guided: bool
    run: Callable[..., jax.Array]
    embed: Callable[[Sequence[str]], Iterable[Embedded]]
    embedded: dict[str | None, Condition] = dataclasses.field(default_factory=dict)

    def __call__(
        self,
        params: Any,
        prompts: Sequence[str | Prompt],
        seeds: Sequence[int],
        describe: str = "",
    ) -> UInt8[np.ndarray, "N H W 3"]:
        """Returns all images at once."""
        return np.concatenate(list(self.batches(params, prompts, seeds, describe)))

    def batches(
        self,
        params: Any,
        prompts: Sequence[str | Prompt],
        seeds: Sequence[int],
        describe: str = "",
    ) -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
        """Yields the images in order, one batch at a time. A prompt's own seed is ignored.

        Raises:
            ValueError: a prompt lacks an image or mask that the model needs.
        """
        asked = [Prompt(p) if isinstance(p, str) else p for p in prompts]
        check_given(asked, self.pipeline.family.given)
        ahead = max(EMBED_AHEAD // self.batch_size, 1) * self.batch_size
        with Progress(len(asked), description=describe or "sampling") as progress:
            for start in range(0, len(asked), self.batch_size):
                if start % ahead == 0:
                    self._embed(asked[start : start + ahead])
                part = asked[start : start + self.batch_size]
                padding = self.batch_size - len(part)
                numbers = [*seeds[start : start + self.batch_size], *[0] * padding]
                inputs = (*self._inputs(part + part[:1] * padding), np.asarray(numbers, np.uint32))
                # The first batch compiles, for minutes where the model is large.
                with progress.doing("first batch, compiling") if not start else nothing():
                    images = np.asarray(self.run(params, *inputs))[: len(part)]
                progress.advance(len(part))
                yield images

    def negative_of(self, prompt: Prompt) -> str | None:
        """Returns the negative prompt: the prompt's own, else the run's; None is zeros."""
        own = prompt.negative_prompt
        negative = self.negative_prompt if own is None else own
        return "" if negative is None and not self.pipeline.zero_negative else negative

    def _inputs(self, part: Sequence[Prompt]) -> tuple[Any, ...]:
        """Returns condition, negative, source images and masks of a batch; None if absent."""
        told = self._stack([prompt.text for prompt in part])
        negative = self._stack([self.negative_of(p) for p in part]) if self.guided else None
        images = masks = None
        fields = self.pipeline.family.given_fields
        if "source" in fields:
            images = np.stack([read_source(str(prompt.image), self.size) for prompt in part])
        if "mask" in fields:
            masks = np.stack([read_mask(str(prompt.mask), self.size) for prompt in part])
        return told, negative, images, masks

    def _stack(self, texts: Sequence[str | None]) -> Condition:
        return jax.tree.map(lambda *x: np.stack(x), *[self.embedded[text] for text in texts])

    def _embed(self, prompts: Sequence[Prompt]) -> None:
        """Fills `embedded` for these prompts; drops earlier entries if any is new."""
        negatives = [self.negative_of(p) for p in prompts] if self.guided else []
        texts = dict.fromkeys([*(prompt.text for prompt in prompts), *negatives])
        if texts.keys() <= self.embedded.keys():
            return
        words = [text for text in texts if text is not None]
        self.embedded = {}
        for text, embedded in zip(words, self.embed(words), strict=True):
            self.embedded[text] = self.pipeline.family.condition(embedded, self.size)
        if None in texts:
            some = self.embedded[words[0]]
            pooled = None if some.pooled is None else np.zeros_like(some.pooled)
            self.embedded[None] = some._replace(context=np.zeros_like(some.context), pooled=pooled)


def open_sampler(
    folder: epath.PathLike,
    *,
    vae: str,
    variant: str | None,
    dtype: Any,
    vae_dtype: Any = None,
    attention: str = AUTO,
    loras: Sequence[diffusers_io.Lora] = (),
    **settings: Any,
) -> tuple[Sampler, Callable[[], parameters.Params]]:
    """Returns the sampler of a pipeline folder, and a function that loads its parameters.

    Sampler and parameters are on this process's devices alone.

    Args:
        vae: another VAE's folder, in place of the pipeline's own; "" is its own.
        variant: of the weight files. dtype: of the computation; vae_dtype: of the VAE's, by
            default the same. attention: of `Execution`.
        loras: files merged into the model.
        settings: of `make_sampler`.
    """
    pipeline = diffusers_io.load_pipeline(
        folder, vae=vae, variant=variant, dtype=dtype, vae_dtype=vae_dtype
    )
    model = diffusers_io.load_model(pipeline.folder, abstract=True, variant=variant, dtype=dtype)
    diffusers_io.check_loras(loras, model, pipeline.folder)
    devices = meshes.make_mesh(devices=jax.local_devices())
    model.execution = Execution(attention).on(devices)
    weights = {"variant": variant, "dtype": dtype, "loras": loras}
    load = functools.partial(load_params, pipeline.folder, **weights)
    return make_sampler(pipeline, model, devices=devices, **settings), load


def load_params(
    folder: epath.PathLike,
    *,
    variant: str | None,
    dtype: Any,
    loras: Sequence[diffusers_io.Lora] = (),
) -> parameters.Params:
    """Loads the parameters of a pipeline folder's model on each of this process's devices.

    loras: files merged into them.
    """
    model = diffusers_io.load_model(folder, variant=variant, dtype=dtype)
    devices = meshes.make_mesh(devices=jax.local_devices())
    _, params = parameters.split(model)
    if loras:
        model = parameters.without_arrays(model)
        gc.collect()  # modules form reference cycles that keep their arrays alive
        diffusers_io.merge_loras(loras, params, model, folder)
    return jax.device_put(params, meshes.replicated(devices))


def make_sampler(
    pipeline: diffusers_io.Pipeline,
    unet: Any,
    *,
    steps: int,
    guidance_scale: float,
    batch_size: int,
    negative_prompt: str | None = None,
    sampler: str = "auto",
    image_guidance_scale: float | int = 1,
    height: int | None = None,
    width: int | None = None,
    devices: Mesh | None = None,
    embed: Callable[[Sequence[str]], Iterable[Embedded]] | None = None,
) -> Sampler:
    """Returns a sampler, (params, prompts, seeds, describe="") -> uint8 [N, H, W, 3].

    Args:
        unet: gives structure, execution and size; its parameters are not used.
        batch_size: images at a time, rounded up to a multiple of the devices.
        negative_prompt: for prompts without their own. None is the empty prompt or, if the
            pipeline requests it as SDXL's do, embeddings of zeros.
        sampler: one of `samplers.SAMPLERS`, or auto, the one that the folder names.
        image_guidance_scale: of editing models only; 1 is none.
        height, width: pixels; by default those that the UNet was trained at.
        devices: the mesh of `params`; by default one over all devices.
        embed: prompts -> their embeddings, float32; by default the pipeline's text encoders'.

    An image depends only on its prompt, its seed and the parameters, not on the rest of its
    batch. Compiled once; `params` may be any UNet's of the same structure.

    Raises:
        ValueError: names the size, step count or scheduler key that is not supported.
    """
    devices = devices or meshes.make_mesh()
    shares = meshes.batch_shares(devices)
    batch_size = -(-batch_size // shares) * shares
    family = pipeline.family
    size, shape = _sizes(unet, pipeline, height, width)
    name = pipeline.sampling.resolve(sampler)
    settings = {"schedule": pipeline.schedule, "num_steps": steps}
    settings |= pipeline.sampling.settings(
        name, tokens=family.tokens(family.facts(unet.config), shape)
    )
    solve = samplers.SAMPLERS[name]
    # This dry run builds the sampler's table, and raises its errors before anything compiles.
    jax.eval_shape(lambda x: solve(lambda x, _: x, x, **settings), jnp.zeros((1, *shape)))
    given = family.given
    image_scale = image_guidance_scale if given and given.optional else None
    run = make_run(
        pipeline,
        unet,
        shape,
        lambda guided, noise: solve(guided, noise, **settings),
        guidance_scale=guidance_scale,
        image_scale=image_scale,
        devices=devices,
    )
    _, vae_params = parameters.split(pipeline.vae)
    vae_params = jax.device_put(vae_params, meshes.replicated(devices))
    rows = meshes.batch_sharding(devices)
    return Sampler(
        pipeline,
        name,
        size,
        unet.execution.attention,
        batch_size,
        negative_prompt,
        family.guidance(guidance_scale)[1] != 0 or image_scale not in (None, 1),
        lambda params, *inputs: run(params, vae_params, *jax.device_put(inputs, rows)),
        embed or functools.partial(diffusers_io.embed_prompts, pipeline),
    )


def make_run(
    pipeline: diffusers_io.Pipeline,
    unet: Any,
    shape: tuple[int, int, int],
    solve: Callable[..., jax.Array],
    *,
    guidance_scale: float,
    image_scale: float | int | None,
    devices: Mesh,
) -> Callable[..., Any]:
    """Returns the jitted program of a batch: noise, every step, the VAE's decoder.

    `run(params, VAE's parameters, condition, negative, source images, masks, seeds [N])` returns
    uint8 images [N, H, W, 3]. Needs no array of `pipeline` or `unet`.

    Args:
        shape: of an image's packed latents. solve: (guided model, noise) -> latents.
        image_scale: of `guidance_parts`.
    """
    family = pipeline.family
    given, (scaling, shift) = family.given, family.factors(pipeline.vae)
    structure, _ = parameters.split(unet)
    predict = family.make_predict(lambda params: parameters.merge(structure, params))
    predict = placement.over_rows(predict, devices)
    vae_structure, _ = parameters.split(pipeline.vae)

    @jax.jit
    def run(params, vae_params, told, negative, images, masks, seeds):
        vae_model = parameters.merge(vae_structure, vae_params)
        if given is not None:
            channels = encode_source(given, vae_model, images, masks, scaling)
            told, negative = (c and c._replace(image=channels) for c in (told, negative))
        noise = jax.vmap(lambda s: jax.random.normal(jax.random.key(s), shape))(seeds)
        parts = guidance_parts(
            told, negative, weights=family.guidance(guidance_scale), image_scale=image_scale
        )
        guided = samplers.guide(lambda x, t, c: predict(params, x, t, c), *parts)
        latents = solve(guided, noise)
        latents = restore_latents(
            latents, scaling_factor=scaling, shift_factor=shift, pack=family.pack
        )
        return to_uint8(vae_model.decode(latents))

    return run


def _sizes(
    unet: Any, pipeline: diffusers_io.Pipeline, height: int | None, width: int | None
) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Returns (height and width in pixels, shape of an image's packed latents).

    A height or width of None is the model's.
    """
    vae, family = pipeline.vae.config, pipeline.family
    factor, native = family.factor(vae), family.trained_latents(unet.config, vae)
    size = (height or native[0] * factor, width or native[1] * factor)
    family.check_size(size, family.facts(unet.config), vae)
    side = factor * family.pack
    return size, (size[0] // side, size[1] // side, vae.latent_channels * family.pack**2)


def guidance_parts(
    told: Condition,
    negative: Condition | None,
    *,
    weights: tuple[float | int, float | int],
    image_scale: float | int | None = None,
) -> tuple[tuple[Condition, ...], tuple[float | int, ...]]:
    """Returns (parts, weights) of `samplers.guide`, without those of weight 0.

    Args:
        negative: needed for any guidance; has the same image.
        weights: of `Family.guidance`.
        image_scale: of editing models, which are also guided away from having no image.

    Source: arXiv 2207.12598; InstructPix2Pix, arXiv 2211.09800, equation 3.
    """
    scale, _ = weights
    pairs: list[Any] = [(told, scale), (negative, weights[1])]
    if image_scale is not None and negative is not None and negative.image is not None:
        blind = negative._replace(image=jnp.zeros_like(negative.image))
        pairs = [(told, scale), (negative, image_scale - scale), (blind, 1 - image_scale)]
    parts, kept = zip(*[pair for pair in pairs if pair[1] != 0], strict=True)
    return parts, kept


def encode_source(
    given: Given, vae: Any, images: jax.Array, masks: jax.Array | None, scaling_factor: Factor
) -> jax.Array:
    """Returns `Condition.image` of uint8 images `[N, H, W, 3]` and 0/1 masks `[N, H, W, 1]`."""
    return given.channels(
        vae.encode,
        images.astype(jnp.float32) / 127.5 - 1,
        None if masks is None else masks.astype(jnp.float32),
        scaling_factor=scaling_factor,
    )


def to_uint8(images: jax.Array) -> jax.Array:
    """Converts images in [-1, 1] to 0..255, clipped, and rounded like in PyTorch pipelines."""
    return jnp.round(jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)
