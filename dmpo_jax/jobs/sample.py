"""Images from a pipeline folder: prompts and seeds in, uint8 images and PNG files out."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image

from dmpo_jax import diffusers_io, mesh, samplers
from dmpo_jax.models import families, parameters
from dmpo_jax.types import Conditioning
from dmpo_jax.writers import Progress, image_grid, save_png

Sampler = Callable[..., np.ndarray]


def make_sampler(
    pipeline: diffusers_io.Pipeline,
    unet: Any,
    *,
    steps: int,
    guidance_scale: float,
    batch_size: int,
    negative_prompt: str = "",
) -> Sampler:
    """`sample(params, prompts, seeds, describe="") -> uint8 [N, H, W, 3]`, batch by batch.

    Args:
        unet: gives structure and size; its parameters are not used.
        batch_size: images at a time, rounded up to a multiple of the devices.

    An image is a function of its prompt, its seed and the parameters alone, whatever
    shares its batch. Compiled once; `params` may be any UNet's of the same structure.
    """
    if pipeline.family.image:
        raise ValueError(
            f"{pipeline.folder} is a {pipeline.family.name} pipeline, which needs an image beside "
            "each prompt: sample it in PyTorch"
        )
    devices = mesh.make_mesh()
    rows = mesh.batch_sharding(devices)
    batch_size = -(-batch_size // devices.size) * devices.size
    structure, _ = parameters.split(unet)
    predict = families.make_predict(lambda params: parameters.merge(structure, params))
    vae_structure, vae_params = parameters.split(pipeline.vae)
    vae_params = jax.device_put(vae_params, mesh.replicated(devices))
    scaling, shift = pipeline.vae.config.scaling_factor, pipeline.vae.config.shift_factor or 0.0
    side = latent_size(unet, pipeline)
    channels = pipeline.vae.config.latent_channels

    @jax.jit
    def run(params, vae_params, conditioning, negative, seeds):
        noise = jax.vmap(lambda s: jax.random.normal(jax.random.key(s), (*side, channels)))(seeds)
        latents = samplers.ddim(
            lambda x, t, c: predict(params, x, t, c),
            noise,
            conditioning,
            schedule=pipeline.schedule,
            num_steps=steps,
            guidance_scale=guidance_scale,
            negative=negative,
            **pipeline.sampling,
        )
        vae = parameters.merge(vae_structure, vae_params)
        return to_uint8(vae.decode(latents / scaling + shift))

    embedded: dict[str, Any] = {}

    def conditioning(prompts: Sequence[str]) -> Conditioning:
        new = [p for p in dict.fromkeys(prompts) if p not in embedded]
        for prompt, (context, pooled) in zip(
            new, diffusers_io.embed_prompts(pipeline, new), strict=True
        ):
            factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
            sizes = families.size_ids(side[0] * factor, side[1] * factor)
            ids = None if pooled is None else np.asarray([sizes], np.float32)
            row: Any = (context, pooled, ids)  # numpy until it goes to the devices
            embedded[prompt] = Conditioning(*row)
        return jax.tree.map(lambda *x: np.stack(x), *[embedded[p] for p in prompts])

    def sample(params, prompts: Sequence[str], seeds: Sequence[int], describe: str = ""):
        images = []
        with Progress(len(prompts), description=describe or "sampling") as progress:
            for start in range(0, len(prompts), batch_size):
                part = list(prompts[start : start + batch_size])
                padding = batch_size - len(part)
                numbers = [*seeds[start : start + batch_size], *[0] * padding]
                inputs = (
                    conditioning(part + part[:1] * padding),
                    conditioning([negative_prompt] * batch_size) if guidance_scale != 1 else None,
                    np.asarray(numbers, np.uint32),
                )
                inputs = jax.device_put(inputs, rows)
                images.append(np.asarray(run(params, vae_params, *inputs))[: len(part)])
                progress.advance(len(part))
        return np.concatenate(images)

    return sample


def latent_size(unet: Any, pipeline: diffusers_io.Pipeline) -> tuple[int, int]:
    """Height and width of the latents that the UNet was trained at."""
    size = unet.config.sample_size
    if size is None:
        factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        size = pipeline.vae.config.sample_size // factor
    return (size, size) if isinstance(size, int) else tuple(size)


def to_uint8(images: jax.Array) -> jax.Array:
    """Images in [-1, 1], clipped, to 0..255 as PyTorch pipelines round them."""
    return jnp.round(jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)


def load_prompts(path: epath.PathLike) -> list[str]:
    """One prompt a line; blank lines are left out.

    Raises:
        ValueError: the file is missing or holds no prompt.
    """
    file = epath.Path(path)
    if not file.exists():
        raise ValueError(f"prompts file {file} does not exist: give a text file, a prompt a line")
    prompts = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"prompts file {file} holds no prompt: write one a line")
    return prompts


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
    negative_prompt: str = "",
    batch_size: int = 8,
    dtype: Any = jnp.float32,
) -> None:
    """Writes `out/grid.png`, a row a prompt, and one PNG an image with its settings inside."""
    texts = load_prompts(prompts)
    pipeline = diffusers_io.load_pipeline(model, variant=variant, dtype=dtype)
    unet = diffusers_io.load_unet(pipeline.folder, variant=variant, dtype=dtype)
    sampler = make_sampler(
        pipeline,
        unet,
        steps=steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        negative_prompt=negative_prompt,
    )
    params = jax.device_put(parameters.split(unet)[1], mesh.replicated(mesh.make_mesh()))
    asked = [text for text in texts for _ in range(images_per_prompt)]
    seeds = [seed + i for i in range(len(asked))]
    images = sampler(params, asked, seeds)
    out = epath.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {"model": str(model), "steps": steps, "guidance_scale": guidance_scale}
    for i, (text, number, image) in enumerate(zip(asked, seeds, images, strict=True)):
        about = {**settings, "prompt": text, "negative_prompt": negative_prompt, "seed": number}
        save_png(out / f"{i:05}.png", Image.fromarray(image), about)
    save_png(out / "grid.png", image_grid(images, images_per_prompt, labels=texts))
