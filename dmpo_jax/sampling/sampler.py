"""Images from a pipeline folder: prompts and seeds in, uint8 images and PNG files out."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import UInt8
from PIL import Image

from dmpo_jax import diffusers_io
from dmpo_jax.data import prompt_files
from dmpo_jax.data import raw as sources
from dmpo_jax.data.prompt_files import Prompt
from dmpo_jax.diffusion import samplers
from dmpo_jax.families.family import Given
from dmpo_jax.families.sdxl import size_ids
from dmpo_jax.models import parameters
from dmpo_jax.parallel import mesh, placement
from dmpo_jax.progress import Progress
from dmpo_jax.sampling.images import image_grid, save_png
from dmpo_jax.types import Condition

LOG = logging.getLogger(__name__)
GRID_IMAGES = 256  # on one sheet; more would fill the memory, and nobody's screen
EMBED_AHEAD = 256  # prompts; a text encoder is compiled anew for each such part


@dataclasses.dataclass
class Sampler:
    """What `make_sampler` makes: call it, or take its `batches` as they are done.

    name: of the sampler, one of `samplers.SAMPLERS`; size: height and width in pixels.
    """

    pipeline: diffusers_io.Pipeline
    name: str
    size: tuple[int, int]
    batch_size: int
    negative_prompt: str | None
    guided: bool
    run: Callable[..., jax.Array]
    embedded: dict[str | None, Condition] = dataclasses.field(default_factory=dict)

    def __call__(
        self,
        params: Any,
        prompts: Sequence[str | Prompt],
        seeds: Sequence[int],
        describe: str = "",
    ) -> UInt8[np.ndarray, "N H W 3"]:
        """All images at once."""
        return np.concatenate(list(self.batches(params, prompts, seeds, describe)))

    def batches(
        self,
        params: Any,
        prompts: Sequence[str | Prompt],
        seeds: Sequence[int],
        describe: str = "",
    ) -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
        """The images in order, a batch at a time. A prompt's own seed is not looked at.

        Raises:
            ValueError: a prompt lacks an image or mask that the model needs.
        """
        asked = [Prompt(p) if isinstance(p, str) else p for p in prompts]
        check_images(asked, self._given)
        ahead = max(EMBED_AHEAD // self.batch_size, 1) * self.batch_size
        with Progress(len(asked), description=describe or "sampling") as progress:
            for start in range(0, len(asked), self.batch_size):
                if start % ahead == 0:
                    self._embed(asked[start : start + ahead])
                part = asked[start : start + self.batch_size]
                padding = self.batch_size - len(part)
                numbers = [*seeds[start : start + self.batch_size], *[0] * padding]
                inputs = (*self._inputs(part + part[:1] * padding), np.asarray(numbers, np.uint32))
                images = np.asarray(self.run(params, *inputs))[: len(part)]
                progress.advance(len(part))
                yield images

    @property
    def _given(self) -> Given | None:
        return self.pipeline.family.given

    def negative_of(self, prompt: Prompt) -> str | None:
        """What guidance leads away from: the prompt's own, else the run's; None is zeros."""
        own = prompt.negative_prompt
        negative = self.negative_prompt if own is None else own
        return "" if negative is None and not self.pipeline.zero_negative else negative

    def _inputs(self, part: Sequence[Prompt]) -> tuple[Any, ...]:
        """Condition, negative, source images and masks of a batch, where there are any."""
        told = self._stack([prompt.text for prompt in part])
        negative = self._stack([self.negative_of(p) for p in part]) if self.guided else None
        images = masks = None
        fields = self.pipeline.family.given_fields
        if "source" in fields:
            images = np.stack([read_image(str(prompt.image), self.size) for prompt in part])
        if "mask" in fields:
            masks = np.stack([read_mask(str(prompt.mask), self.size) for prompt in part])
        return told, negative, images, masks

    def _stack(self, texts: Sequence[str | None]) -> Condition:
        return jax.tree.map(lambda *x: np.stack(x), *[self.embedded[text] for text in texts])

    def _embed(self, prompts: Sequence[Prompt]) -> None:
        """Fills `embedded` for these prompts; what was there for others is forgotten."""
        negatives = [self.negative_of(p) for p in prompts] if self.guided else []
        texts = dict.fromkeys([*(prompt.text for prompt in prompts), *negatives])
        if texts.keys() <= self.embedded.keys():
            return
        words = [text for text in texts if text is not None]
        self.embedded = {}
        for text, (context, pooled) in zip(
            words, diffusers_io.embed_prompts(self.pipeline, words), strict=True
        ):
            ids = None
            if self.pipeline.family.told_sizes:
                ids = np.asarray([size_ids(*self.size)], np.float32)
            arrays: Any = {"context": context, "pooled": pooled, "time_ids": ids}  # numpy for now
            self.embedded[text] = Condition(**arrays)
        if None in texts:
            some = self.embedded[words[0]]
            pooled = None if some.pooled is None else np.zeros_like(some.pooled)
            self.embedded[None] = some._replace(context=np.zeros_like(some.context), pooled=pooled)


def make_sampler(
    pipeline: diffusers_io.Pipeline,
    unet: Any,
    *,
    steps: int,
    guidance_scale: float,
    batch_size: int,
    negative_prompt: str | None = None,
    sampler: str = "auto",
    image_guidance_scale: float = 1.5,
    height: int | None = None,
    width: int | None = None,
    devices: Mesh | None = None,
) -> Sampler:
    """`sample(params, prompts, seeds, describe="") -> uint8 [N, H, W, 3]`, batch by batch.

    Args:
        unet: gives structure and size; its parameters are not used.
        batch_size: images at a time, rounded up to a multiple of the devices.
        negative_prompt: where a prompt has none of its own. None is the empty prompt or, as
            SDXL's pipelines ask, embeddings of zeros.
        sampler: one of `samplers.SAMPLERS`, or auto, the one that the folder names.
        image_guidance_scale: of editing models alone; 1 is none.
        height, width: pixels; by default those that the UNet was trained at.
        devices: the mesh that `params` lie on; by default one over all devices.

    An image is a function of its prompt, its seed and the parameters alone, whatever
    shares its batch. Compiled once; `params` may be any UNet's of the same structure.

    Raises:
        ValueError: naming the size, step count or scheduler key that cannot be honoured.
    """
    devices = devices or mesh.make_mesh()
    shares = mesh.batch_shares(devices)
    batch_size = -(-batch_size // shares) * shares
    vae = pipeline.vae.config
    size, shape = _sizes(unet, pipeline, height, width)
    name = pipeline.sampling.resolve(sampler)
    settings = {"schedule": pipeline.schedule, "num_steps": steps}
    settings |= pipeline.sampling.settings(name)
    solve = samplers.SAMPLERS[name]
    # The table is built in this dry run: what is wrong with it is said before anything compiles.
    jax.eval_shape(lambda x: solve(lambda x, _: x, x, **settings), jnp.zeros((1, *shape)))
    given = pipeline.family.given
    image_scale = image_guidance_scale if given and given.optional else None
    structure, _ = parameters.split(unet)
    predict = pipeline.family.make_predict(lambda params: parameters.merge(structure, params))
    predict = placement.over_rows(predict, devices)
    vae_structure, vae_params = parameters.split(pipeline.vae)

    @jax.jit
    def run(params, vae_params, told, negative, images, masks, seeds):
        vae_model = parameters.merge(vae_structure, vae_params)
        if given is not None:
            channels = encode_source(given, vae_model, images, masks, vae.scaling_factor)
            told, negative = (c and c._replace(image=channels) for c in (told, negative))
        noise = jax.vmap(lambda s: jax.random.normal(jax.random.key(s), shape))(seeds)
        parts = guidance_parts(told, negative, scale=guidance_scale, image_scale=image_scale)
        guided = samplers.guide(lambda x, t, c: predict(params, x, t, c), *parts)
        latents = solve(guided, noise, **settings)
        return to_uint8(vae_model.decode(latents / vae.scaling_factor + (vae.shift_factor or 0.0)))

    vae_params = jax.device_put(vae_params, mesh.replicated(devices))
    rows = mesh.batch_sharding(devices)
    return Sampler(
        pipeline,
        name,
        size,
        batch_size,
        negative_prompt,
        guidance_scale != 1 or image_scale not in (None, 1),
        lambda params, *inputs: run(params, vae_params, *jax.device_put(inputs, rows)),
    )


def _sizes(
    unet: Any, pipeline: diffusers_io.Pipeline, height: int | None, width: int | None
) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """(height and width in pixels, an image's latents' shape); the UNet's own where None."""
    vae = pipeline.vae.config
    factor = 2 ** (len(vae.block_out_channels) - 1)
    native = latent_size(unet, pipeline)
    size = (height or native[0] * factor, width or native[1] * factor)
    if size[0] % factor or size[1] % factor:
        raise ValueError(f"height and width must be multiples of {factor} pixels, got {size}")
    return size, (size[0] // factor, size[1] // factor, vae.latent_channels)


def guidance_parts(
    told: Condition,
    negative: Condition | None,
    *,
    scale: float | int,
    image_scale: float | int | None = None,
) -> tuple[tuple[Condition, ...], tuple[float | int, ...]]:
    """(parts, weights) of `samplers.guide`, without those of weight 0.

    Args:
        negative: where a scale is not 1; sees the same image.
        image_scale: of editing models, which are also led away from seeing no image.

    Source: arXiv 2207.12598; InstructPix2Pix, arXiv 2211.09800, equation 3.
    """
    pairs: list[Any] = [(told, scale), (negative, 1 - scale)]
    if image_scale is not None and negative is not None and negative.image is not None:
        blind = negative._replace(image=jnp.zeros_like(negative.image))
        pairs = [(told, scale), (negative, image_scale - scale), (blind, 1 - image_scale)]
    parts, weights = zip(*[pair for pair in pairs if pair[1] != 0], strict=True)
    return parts, weights


def encode_source(
    given: Given, vae: Any, images: jax.Array, masks: jax.Array | None, scaling_factor: float
) -> jax.Array:
    """`Condition.image` of uint8 images `[N, H, W, 3]` and masks `[N, H, W, 1]` of 0 and 1."""
    return given.channels(
        vae.encode,
        images.astype(jnp.float32) / 127.5 - 1,
        None if masks is None else masks.astype(jnp.float32),
        scaling_factor=scaling_factor,
    )


_COLUMN = {"source": "image", "mask": "mask"}  # field of RawPair -> of Prompt


def check_images(prompts: Sequence[Prompt], given: Given | None) -> None:
    """ValueError for the first prompt without a file that its model needs."""
    needed = [_COLUMN[field] for field in given.fields] if given else []
    for prompt in prompts:
        for part in needed:
            article = "an" if part == "image" else "a"
            if not getattr(prompt, part):
                raise ValueError(
                    f"this model needs {article} {part} beside each prompt, but {prompt.text!r} "
                    f"has none: give a table or JSON of prompts with {' and '.join(needed)}"
                )
    if not needed and any(prompt.image or prompt.mask for prompt in prompts):
        LOG.warning("this model draws from text alone: the prompts' images are not looked at")


def read_image(path: epath.PathLike, size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """A picture's pixels, resized to (height, width), as diffusers resizes it."""
    try:
        image = sources.decode_image(epath.Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from error
    resized = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.asarray(resized)


def read_mask(path: epath.PathLike, size: tuple[int, int]) -> UInt8[np.ndarray, "H W 1"]:
    """1 where a picture is nearer to white, to be painted anew; 0 elsewhere."""
    grey = np.asarray(Image.fromarray(read_image(path, size)).convert("L"))
    return (grey >= 128).astype(np.uint8)[..., None]


def latent_size(unet: Any, pipeline: diffusers_io.Pipeline) -> tuple[int, int]:
    """Height and width of the latents that the UNet was trained at."""
    facts = pipeline.family.facts(unet.config)
    if facts.latent_size:
        return facts.latent_size
    factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    return (pipeline.vae.config.sample_size // factor,) * 2


def to_uint8(images: jax.Array) -> jax.Array:
    """Images in [-1, 1], clipped, to 0..255 as PyTorch pipelines round them."""
    return jnp.round(jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)


def load_prompts(path: epath.PathLike) -> list[str]:
    """The texts of `data.prompts.load_prompts`."""
    return [prompt.text for prompt in prompt_files.load_prompts(path)]


def sample(
    *,
    model: str,
    prompts: epath.PathLike,
    out: epath.PathLike,
    variant: str | None = None,
    seed: int = 0,
    images_per_prompt: int = 1,
    steps: int = 50,
    guidance_scale: float = 7.5,
    negative_prompt: str | None = None,
    sampler: str = "auto",
    image_guidance_scale: float = 1.5,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 8,
    dtype: Any = jnp.float32,
) -> None:
    """Writes one PNG an image with its settings inside, and `out/grid.png`, a row a prompt.

    PNGs come as their batches are done. Seeds count up from `seed` over all images, or for a
    prompt that names its own from that.
    """
    asked = prompt_files.load_prompts(prompts)
    pipeline = diffusers_io.load_pipeline(model, variant=variant, dtype=dtype)
    given = pipeline.family.given
    check_images(asked, given)
    unet = diffusers_io.load_unet(pipeline.folder, variant=variant, dtype=dtype)
    draw = make_sampler(
        pipeline,
        unet,
        steps=steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        negative_prompt=negative_prompt,
        sampler=sampler,
        image_guidance_scale=image_guidance_scale,
        height=height,
        width=width,
    )
    params = jax.device_put(parameters.split(unet)[1], mesh.replicated(mesh.make_mesh()))
    settings = {"model": str(model), "steps": steps, "guidance_scale": guidance_scale}
    if given and given.optional:
        settings["image_guidance_scale"] = image_guidance_scale
    seeds = image_seeds(asked, images_per_prompt, seed)
    _write(draw, params, asked, seeds, settings, epath.Path(out))


def _write(
    draw: Sampler,
    params: Any,
    asked: Sequence[Prompt],
    seeds: Sequence[int],
    settings: dict[str, Any],
    out: epath.Path,
) -> None:
    """Draws and writes every image, as many of each prompt as there are seeds for it."""
    columns, first, kept = len(seeds) // len(asked), 0, []
    each = [prompt for prompt in asked for _ in range(columns)]
    rows = max(GRID_IMAGES // columns, 1)
    settings |= {"sampler": draw.name, "height": draw.size[0], "width": draw.size[1]}
    for images in draw.batches(params, each, seeds):
        for i, image in enumerate(images, first):
            prompt = each[i]
            about = {"prompt": prompt.text, "negative_prompt": draw.negative_of(prompt)}
            about |= {k: v for k, v in prompt._asdict().items() if k in ("image", "mask") and v}
            about = {**settings, **about, "seed": seeds[i]}
            save_png(out / f"{i:05}.png", Image.fromarray(image), about)
        kept += list(images[: max(rows * columns - first, 0)])
        first += len(images)
    if rows < len(asked):
        LOG.info("grid.png shows the first %d of %d prompts", rows, len(asked))
    labels = [prompt.text for prompt in asked[:rows]]
    save_png(out / "grid.png", image_grid(np.stack(kept), columns, labels=labels))


def image_seeds(prompts: Sequence[Prompt], images_per_prompt: int, first: int) -> list[int]:
    """A seed an image: the prompt's own and the next ones, else counted from `first` over all."""
    seeds = []
    for i, prompt in enumerate(prompts):
        start = first + i * images_per_prompt if prompt.seed is None else prompt.seed
        seeds += [(start + j) % 2**32 for j in range(images_per_prompt)]
    return seeds
