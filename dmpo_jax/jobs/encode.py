"""Raw pairs -> encoded pairs: VAE moments of both images, and each distinct prompt once."""

import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image

from dmpo_jax import diffusers_io, mesh
from dmpo_jax.data import records, sources
from dmpo_jax.models import families, parameters
from dmpo_jax.writers import Progress

LOG = logging.getLogger(__name__)
MAX_BAD = 0.01  # share of pairs that may be unreadable before the job gives up
NEEDS = {"": (), "edit": ("source",), "inpaint": ("source", "mask")}  # fields of RawPair


class Pixels(NamedTuple):
    """A raw pair at the model's resolution R; source and mask where its family needs them."""

    pair: sources.RawPair
    images: np.ndarray  # [2, R, R, 3] uint8
    sizes: np.ndarray  # [2, 6] int32
    source: np.ndarray | None  # [R, R, 3] uint8
    mask: np.ndarray | None  # [R, R, 1] uint8, 1 where to repaint


def encode(
    *,
    source: str,
    model: str,
    out: epath.PathLike,
    vae: str = "",
    variant: str | None = None,
    resolution: int | None = None,
    validation_fraction: float = 0.01,
    batch_size: int = 32,
    dtype: Any = jnp.float32,
) -> None:
    """Encodes every pair of `source` (KIND:PATH) with the VAE and text encoders of `model`.

    With an editing or inpainting model also the image, and the mask, given with each pair.
    Does nothing where `out` already holds the same encoding, whole.

    Args:
        resolution: side of the images in pixels, resized on the shorter side and cropped
            at the centre; None is the size that the UNet was trained at.
        validation_fraction: of the pairs, chosen by a hash of their id.
        batch_size: pairs encoded at a time, rounded up to a multiple of the devices.

    Raises:
        ValueError: `out` holds another encoding; more than 1 % of the images are
            unreadable; a part of the model is missing or does not fit the others; or a pair
            lacks an image that the model is given.
    """
    out = epath.Path(out)
    pipeline = diffusers_io.load_pipeline(model, vae=vae, variant=variant, dtype=dtype)
    config = diffusers_io.read_json(pipeline.folder / "unet" / "config.json")
    channels = config.get("in_channels", 4)
    families.check_channels(pipeline.family, channels, pipeline.vae.config.latent_channels)
    side = resolution or trained_side(config, pipeline.vae.config)
    about = {
        "model": str(model),
        "vae": vae,
        "source": source,
        "resolution": side,
        "validation_fraction": validation_fraction,
        "scaling_factor": pipeline.vae.config.scaling_factor,
        "shift_factor": pipeline.vae.config.shift_factor or 0.0,
        "image_kind": pipeline.family.image,
    }
    if is_done(out, about):
        LOG.info("%s is encoded already", out)
        return
    raw = sources.open_source(source)
    prompts = list(dict.fromkeys(["", *_prompts(raw, pipeline.family)]))
    number = {prompt: i for i, prompt in enumerate(prompts)}

    def embeddings() -> Iterator[records.PromptEmbedding]:
        embedded = diffusers_io.embed_prompts(pipeline, prompts)
        for prompt, (context, pooled) in zip(prompts, embedded, strict=True):
            pooled = None if pooled is None else pooled.astype(np.float16)
            yield records.PromptEmbedding(prompt, context.astype(np.float16), pooled)

    pairs = list(_encoded(raw, number, pipeline, side, batch_size))
    held_out = [is_held_out(pair.id, validation_fraction) for pair in pairs]
    splits = {"train": [p for p, held in zip(pairs, held_out, strict=True) if not held]}
    if any(held_out):
        splits["validation"] = [p for p, held in zip(pairs, held_out, strict=True) if held]
    records.write_pairs(out, splits, embeddings(), about)


def trained_side(unet: Any, vae: Any) -> int:
    """The images' side in pixels that a UNet was trained at, by the two configs."""
    factor = 2 ** (len(vae.block_out_channels) - 1)
    size = unet.get("sample_size") or vae.sample_size // factor
    return (size if isinstance(size, int) else min(size)) * factor


def is_done(out: epath.Path, about: dict[str, Any]) -> bool:
    """Whether `out` holds this encoding, whole; ValueError where it holds another."""
    if not (out / records.MARKER).exists():
        return False
    meta = records.open_pairs(out).meta
    if other := {k: (meta.get(k), v) for k, v in about.items() if meta.get(k) != v}:
        said = ", ".join(
            f"{k}: {have!r} there, {want!r} asked" for k, (have, want) in other.items()
        )
        raise ValueError(f"{out} holds another encoding ({said}): choose another folder")
    return True


def is_held_out(name: str, fraction: float) -> bool:
    """Whether a pair is in the validation split: a function of its id alone."""
    return zlib.crc32(name.encode()) % 10_000 < round(fraction * 10_000)


def prepare(
    image: np.ndarray, resolution: int, resampling: Image.Resampling = Image.Resampling.LANCZOS
) -> tuple[np.ndarray, tuple[int, int, int, int, int, int]]:
    """uint8 `[H, W, C]` -> uint8 `[R, R, C]`, and SDXL's six sizes in pixels; C 3 or 1.

    The shorter side is resized to R, then the centre is cropped; the sizes hold the
    original height and width, the crop's top and left after resizing, and R twice.
    """
    height, width = image.shape[:2]
    scale = resolution / min(height, width)
    h, w = max(round(height * scale), resolution), max(round(width * scale), resolution)
    if (h, w) != (height, width):
        # Pillow has no channel axis of 1.
        resized = Image.fromarray(np.squeeze(image, 2) if image.shape[2] == 1 else image)
        image = np.asarray(resized.resize((w, h), resampling)).reshape(h, w, -1)
    top, left = (h - resolution) // 2, (w - resolution) // 2
    image = image[top : top + resolution, left : left + resolution]
    return image, (height, width, top, left, resolution, resolution)


def _prompts(raw: sources.Source, family: families.Family) -> Iterator[str]:
    """Every pair's prompt; ValueError at a pair without what the family is given."""
    for pair in raw:
        for field in NEEDS[family.image]:
            if getattr(pair, field) is None:
                column = sources.GIVEN[field]
                raise ValueError(
                    f"a {family.name} model needs the column {column!r} in every pair, but "
                    f"{pair.id} has none: add it, or take a text-to-image model"
                )
        yield pair.prompt


def load_pixels(pair: sources.RawPair, kind: str, resolution: int) -> Pixels:
    """Decodes, resizes and crops what a family of image kind `kind` needs of a pair.

    Raises:
        ValueError: an image is unreadable, or the mask does not lie on its source.
    """
    ready = [prepare(sources.decode_image(x), resolution) for x in pair.images]
    images, sizes = (np.stack(x) for x in zip(*ready, strict=True))
    source = mask = None
    if "source" in NEEDS[kind]:
        source, of_source = prepare(sources.decode_image(pair.source or b""), resolution)
        if "mask" in NEEDS[kind]:
            given = sources.decode_mask(pair.mask or b"")
            mask, of_mask = prepare(given, resolution, Image.Resampling.NEAREST)
            if of_mask[2:] != of_source[2:]:  # another aspect ratio is cropped elsewhere
                raise ValueError(
                    f"the mask should have its source's shape, {of_source[:2]}, or one of the "
                    f"same ratio, but got {of_mask[:2]}"
                )
    return Pixels(pair, images, sizes.astype(np.int32), source, mask)


def make_run(pipeline: diffusers_io.Pipeline) -> Callable[..., Any]:
    """`run(VAE's parameters, images [B, 2, R, R, 3], source, mask) -> (moments, image)`.

    All in uint8 as in `Pixels`, out in float32; image is None where the family has none.
    """
    structure, _ = parameters.split(pipeline.vae)
    kind, scaling = pipeline.family.image, pipeline.vae.config.scaling_factor

    @jax.jit
    def run(params, images, source, mask):
        vae = parameters.merge(structure, params)

        def encode(x):
            return vae.encode(x).astype(jnp.float32)

        def in_range(x):
            return x.astype(jnp.float32) / 127.5 - 1

        flat = encode(in_range(images.reshape(-1, *images.shape[2:])))
        moments = flat.reshape(*images.shape[:2], *flat.shape[1:])
        if not kind:
            return moments, None
        mask = None if mask is None else mask.astype(jnp.float32)
        given = in_range(source)
        return moments, families.image_channels(kind, encode, given, mask, scaling_factor=scaling)

    return run


def _encoded(
    raw: sources.Source,
    number: dict[str, int],
    pipeline: diffusers_io.Pipeline,
    resolution: int,
    batch_size: int,
) -> Iterator[records.EncodedPair]:
    devices = mesh.make_mesh()
    sharding = mesh.batch_sharding(devices)
    batch_size = -(-batch_size // devices.size) * devices.size
    params = jax.device_put(parameters.split(pipeline.vae)[1], mesh.replicated(devices))
    run = make_run(pipeline)

    def stack(arrays: list[np.ndarray | None]) -> np.ndarray | None:
        """Rows of one shape, whatever is left for the last batch: one compilation."""
        rows = [x for x in arrays if x is not None]
        return np.stack(rows + rows[:1] * (batch_size - len(rows))) if rows else None

    def flush(batch: Sequence[Pixels]):
        inputs = [stack([getattr(x, f) for x in batch]) for f in ("images", "source", "mask")]
        found = run(params, *jax.device_put(inputs, sharding))
        moments, image = jax.tree.map(lambda x: np.asarray(x).astype(np.float16), found)
        for i, (pair, _, sizes, _, _) in enumerate(batch):
            yield records.EncodedPair(
                pair.id,
                number[pair.prompt],
                pair.preference,
                moments[i],
                sizes,
                None if image is None else image[i],
            )

    batch, bad = [], 0
    with Progress(len(raw), description="encoding") as progress:
        for pair in raw:
            try:
                batch.append(load_pixels(pair, pipeline.family.image, resolution))
            except ValueError as error:
                bad += 1
                LOG.warning("pair %s is left out: %s", pair.id, error)
                if bad > max(MAX_BAD * len(raw), 1):
                    raise ValueError(
                        f"{bad} of {len(raw)} pairs cannot be read, above {MAX_BAD:.0%}; the last "
                        f"is {pair.id}: {error}"
                    ) from error
                continue
            if len(batch) == batch_size:
                yield from flush(batch)
                progress.advance(len(batch))
                batch = []
        if batch:
            yield from flush(batch)
            progress.advance(len(batch))
