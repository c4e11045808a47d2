"""Raw pairs -> encoded pairs: VAE moments of both images, and each distinct prompt once."""

import logging
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image

from dmpo_jax import diffusers_io, mesh
from dmpo_jax.data import records, sources
from dmpo_jax.models import parameters
from dmpo_jax.writers import Progress

LOG = logging.getLogger(__name__)
MAX_BAD = 0.01  # share of pairs that may be unreadable before the job gives up


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

    Does nothing where `out` already holds the same encoding, whole.

    Args:
        resolution: side of the images in pixels, resized on the shorter side and cropped
            at the centre; None is the size that the UNet was trained at.
        validation_fraction: of the pairs, chosen by a hash of their id.
        batch_size: pairs encoded at a time, rounded up to a multiple of the devices.

    Raises:
        ValueError: `out` holds another encoding; more than 1 % of the images are
            unreadable; or a part of the model is missing.
    """
    out = epath.Path(out)
    pipeline = diffusers_io.load_pipeline(model, vae=vae, variant=variant, dtype=dtype)
    factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    config = diffusers_io.read_json(pipeline.folder / "unet" / "config.json")
    size: Any = config.get("sample_size") or pipeline.vae.config.sample_size // factor
    side = resolution or (size if isinstance(size, int) else min(size)) * factor
    about = {
        "model": str(model),
        "vae": vae,
        "source": source,
        "resolution": side,
        "validation_fraction": validation_fraction,
        "scaling_factor": pipeline.vae.config.scaling_factor,
        "shift_factor": pipeline.vae.config.shift_factor or 0.0,
    }
    if is_done(out, about):
        LOG.info("%s is encoded already", out)
        return
    raw = sources.open_source(source)
    prompts = list(dict.fromkeys(["", *(pair.prompt for pair in raw)]))
    number = {prompt: i for i, prompt in enumerate(prompts)}

    def embeddings() -> Iterator[records.PromptEmbedding]:
        embedded = diffusers_io.embed_prompts(pipeline, prompts)
        for prompt, (context, pooled) in zip(prompts, embedded, strict=True):
            pooled = None if pooled is None else pooled.astype(np.float16)
            yield records.PromptEmbedding(prompt, context.astype(np.float16), pooled)

    pairs = list(_encoded(raw, number, pipeline.vae, side, batch_size))
    held_out = [is_held_out(pair.id, validation_fraction) for pair in pairs]
    splits = {"train": [p for p, held in zip(pairs, held_out, strict=True) if not held]}
    if any(held_out):
        splits["validation"] = [p for p, held in zip(pairs, held_out, strict=True) if held]
    records.write_pairs(out, splits, embeddings(), about)


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
    image: np.ndarray, resolution: int
) -> tuple[np.ndarray, tuple[int, int, int, int, int, int]]:
    """uint8 `[H, W, 3]` -> uint8 `[R, R, 3]`, and SDXL's six sizes in pixels.

    The shorter side is resized to R, then the centre is cropped; the sizes hold the
    original height and width, the crop's top and left after resizing, and R twice.
    """
    height, width = image.shape[:2]
    scale = resolution / min(height, width)
    h, w = max(round(height * scale), resolution), max(round(width * scale), resolution)
    if (h, w) != (height, width):
        resized = Image.fromarray(image).resize((w, h), Image.Resampling.LANCZOS)
        image = np.asarray(resized)
    top, left = (h - resolution) // 2, (w - resolution) // 2
    image = image[top : top + resolution, left : left + resolution]
    return image, (height, width, top, left, resolution, resolution)


def _encoded(
    raw: sources.Source, number: dict[str, int], vae: Any, resolution: int, batch_size: int
) -> Iterator[records.EncodedPair]:
    devices = mesh.make_mesh()
    sharding = mesh.batch_sharding(devices)
    batch_size = -(-batch_size // devices.size) * devices.size
    structure, params = parameters.split(vae)
    params = jax.device_put(params, mesh.replicated(devices))

    @jax.jit
    def run(params, images):  # [B, 2, R, R, 3] uint8 -> [B, 2, h, w, 2C]
        flat = images.reshape(-1, *images.shape[2:]).astype(jnp.float32) / 127.5 - 1
        moments = parameters.merge(structure, params).encode(flat).astype(jnp.float32)
        return moments.reshape(*images.shape[:2], *moments.shape[1:])

    def flush(batch: Sequence[tuple[sources.RawPair, np.ndarray, np.ndarray]]):
        images = np.stack([images for _, images, _ in batch])
        padding = batch_size - len(batch)
        padded = np.concatenate([images, np.repeat(images[:1], padding, axis=0)])
        moments = np.asarray(run(params, jax.device_put(padded, sharding)))
        for (pair, _, sizes), moment in zip(batch, moments, strict=False):
            yield records.EncodedPair(
                pair.id, number[pair.prompt], pair.preference, moment.astype(np.float16), sizes
            )

    batch, bad = [], 0
    with Progress(len(raw), description="encoding") as progress:
        for pair in raw:
            try:
                ready = [prepare(sources.decode_image(x), resolution) for x in pair.images]
            except ValueError as error:
                bad += 1
                LOG.warning("pair %s is left out: %s", pair.id, error)
                if bad > max(MAX_BAD * len(raw), 1):
                    raise ValueError(
                        f"{bad} of {len(raw)} pairs cannot be read, above {MAX_BAD:.0%}; the last "
                        f"is {pair.id}: {error}"
                    ) from error
                continue
            images = np.stack([image for image, _ in ready])
            batch.append((pair, images, np.array([sizes for _, sizes in ready], np.int32)))
            if len(batch) == batch_size:
                yield from flush(batch)
                progress.advance(len(batch))
                batch = []
        if batch:
            yield from flush(batch)
            progress.advance(len(batch))
