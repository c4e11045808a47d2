"""Editing (InstructPix2Pix) and inpainting families: text to image plus an input image."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from dmpo_jax.families.family import Family, Given
from dmpo_jax.families.sdxl import SDXL
from dmpo_jax.families.stable_diffusion import SD

Encode = Callable[[Float[Array, "N H W 3"]], Float[Array, "N h w M"]]


def edit_channels(
    encode: Encode,
    images: Float[Array, "N H W 3"],
    masks: Float[Array, "N H W 1"] | None = None,
    *,
    scaling_factor: float = 1.0,
) -> Float[Array, "N h w E"]:
    """Returns the mean of the image's posterior, unscaled, as InstructPix2Pix was trained.

    Source: arXiv 2211.09800; diffusers takes the distribution's mode.
    """
    return _mean(encode(images))


def inpaint_channels(
    encode: Encode,
    images: Float[Array, "N H W 3"],
    masks: Float[Array, "N H W 1"],
    *,
    scaling_factor: float,
) -> Float[Array, "N h w E"]:
    """Returns the mask at the latents' size, then the scaled mean of the masked image.

    diffusers samples the posterior; the mean makes a run a function of its config.

    Args:
        encode: images in [-1, 1] -> moments, as `AutoencoderKL.encode`.
        masks: 1 where to repaint, 0 where to keep.
        scaling_factor: of the VAE.
    """
    # Masked pixels become 0: grey, the middle of the range.
    mean = scaling_factor * _mean(encode(jnp.where(masks < 0.5, images, 0)))
    return jnp.concatenate([_nearest(masks, *mean.shape[1:3]).astype(mean.dtype), mean], axis=-1)


def _mean(moments: Float[Array, "N h w M"]) -> Float[Array, "N h w C"]:
    return jnp.split(moments, 2, axis=-1)[0]


def _nearest(images: Float[Array, "N H W C"], h: int, w: int) -> Float[Array, "N h w C"]:
    """Resizes to the pixels at floor(i H / h), as torch's `interpolate(mode="nearest")`."""
    height, width = images.shape[1:3]
    rows, columns = jnp.arange(h) * height // h, jnp.arange(w) * width // w
    return images[:, rows][:, :, columns]


EDIT = Given("edit", ("source",), lambda latent: latent, edit_channels, optional=True)
INPAINT = Given("inpaint", ("source", "mask"), lambda latent: 1 + latent, inpaint_channels)


def _with_image(family: Family, given: Given, pipeline: str) -> Family:
    """Returns a family whose model sees an input image beside 4 latent channels."""
    model = {**family.tiny.model, "in_channels": 4 + given.width(4)}
    return dataclasses.replace(
        family,
        name=f"{family.name}_{given.kind}",
        pipeline=pipeline,
        given=given,
        tiny=family.tiny._replace(model=model),
        scheduler_overrides={},
    )


SD_EDIT = _with_image(SD, EDIT, "StableDiffusionInstructPix2PixPipeline")
SDXL_EDIT = _with_image(SDXL, EDIT, "StableDiffusionXLInstructPix2PixPipeline")
SD_INPAINT = dataclasses.replace(
    _with_image(SD, INPAINT, "StableDiffusionInpaintPipeline"),
    scheduler_overrides={"steps_offset": 1},
)
SDXL_INPAINT = _with_image(SDXL, INPAINT, "StableDiffusionXLInpaintPipeline")
