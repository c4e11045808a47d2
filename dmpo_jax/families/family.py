"""How each family of pipelines conditions its UNet. Arrays only: no files, no tokenizers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from dmpo_jax.models.clip import TextOutput
from dmpo_jax.types import Condition

Embedded = tuple[Float[Array, "N S D"], Float[Array, "N P"] | None]


class Family(NamedTuple):
    """text_parts: the pipeline's text encoders, in order, each beside its `tokenizer...`;
    embed: their outputs -> (context, pooled);
    image: the given image that the UNet sees beside the latents: "" none, "edit" the one to
    edit, "inpaint" the one to repaint a part of (`image_channels`)."""

    name: str
    text_parts: tuple[str, ...]
    embed: Callable[[Sequence[TextOutput]], Embedded]
    image: str = ""


def _sd_embed(outputs: Sequence[TextOutput]) -> Embedded:
    """The last hidden state. SD2 leaves its last layer out by the config's own layer count."""
    return outputs[0].last_hidden_state, None


def _sdxl_embed(outputs: Sequence[TextOutput]) -> Embedded:
    """Both encoders' penultimate states side by side, and the second one's projection.

    Source: arXiv 2307.01952; diffusers `StableDiffusionXLPipeline.encode_prompt`.
    """
    context = jnp.concatenate([output.hidden_states[-2] for output in outputs], axis=-1)
    return context, outputs[-1].pooled


_SD = (("text_encoder",), _sd_embed)
_SDXL = (("text_encoder", "text_encoder_2"), _sdxl_embed)
FAMILIES = {
    "StableDiffusionPipeline": Family("sd", *_SD),
    "StableDiffusionXLPipeline": Family("sdxl", *_SDXL),
    "StableDiffusionInstructPix2PixPipeline": Family("sd_edit", *_SD, "edit"),
    "StableDiffusionXLInstructPix2PixPipeline": Family("sdxl_edit", *_SDXL, "edit"),
    "StableDiffusionInpaintPipeline": Family("sd_inpaint", *_SD, "inpaint"),
    "StableDiffusionXLInpaintPipeline": Family("sdxl_inpaint", *_SDXL, "inpaint"),
}


def size_ids(height: int, width: int) -> list[int]:
    """SDXL's time_ids of an uncropped image at its own size, in pixels."""
    return [height, width, 0, 0, height, width]


def image_width(kind: str, latent_channels: int) -> int:
    """E, the channels that `image_channels` makes."""
    return {"": 0, "edit": latent_channels, "inpaint": 1 + latent_channels}[kind]


def check_channels(family: Family, in_channels: int, latent_channels: int) -> None:
    """ValueError where the UNet does not take the latents and the family's image channels."""
    beside = image_width(family.image, latent_channels)
    if in_channels == latent_channels + beside:
        return
    if family.image == "inpaint" and in_channels == latent_channels:
        raise ValueError(
            f"the UNet of this {family.name} pipeline takes {in_channels} channels, the latents "
            f"alone, and sees neither mask nor image: train it as its text-to-image class (as "
            f"_class_name in model_index.json), or take one of {latent_channels + beside} channels"
        )
    raise ValueError(
        f"the UNet takes {in_channels} channels, but {family.name} models take {latent_channels} "
        f"of the latents and {beside} of a given image, {latent_channels + beside} in all: take "
        "the VAE, and the pairs encoded with it, that belong to this UNet"
    )


def image_channels(
    kind: str,
    encode: Callable[[Float[Array, "N H W 3"]], Float[Array, "N h w M"]],
    images: Float[Array, "N H W 3"],
    masks: Float[Array, "N H W 1"] | None = None,
    *,
    scaling_factor: float,
) -> Float[Array, "N h w E"]:
    """What goes beside the noised latents, `Condition.image`.

    "edit": the mean of the image's posterior, unscaled, as InstructPix2Pix was trained
    (arXiv 2211.09800; diffusers takes the distribution's mode). "inpaint": the mask, at the
    latents' size, then the scaled mean of the image without what the mask covers. There
    diffusers draws from the posterior; its mean makes a run a function of its config.

    Args:
        encode: images in [-1, 1] -> moments, as `AutoencoderKL.encode`.
        masks: 1 where to repaint, 0 where to keep.
        scaling_factor: of the VAE.

    Raises:
        ValueError: the kind is neither, or "inpaint" comes without masks.
    """
    if kind == "edit":
        return _mean(encode(images))
    if kind != "inpaint" or masks is None:
        raise ValueError(
            f"kind must be 'edit', or 'inpaint' with masks, but got {kind!r} with masks {masks}"
        )
    # Grey, the middle of the range, stands for what is not shown.
    mean = scaling_factor * _mean(encode(jnp.where(masks < 0.5, images, 0)))
    return jnp.concatenate([_nearest(masks, *mean.shape[1:3]).astype(mean.dtype), mean], axis=-1)


def _mean(moments: Float[Array, "N h w M"]) -> Float[Array, "N h w C"]:
    return jnp.split(moments, 2, axis=-1)[0]


def _nearest(images: Float[Array, "N H W C"], h: int, w: int) -> Float[Array, "N h w C"]:
    """The pixel at the floor of i H / h, as torch's `interpolate(mode="nearest")` takes it."""
    height, width = images.shape[1:3]
    rows, columns = jnp.arange(h) * height // h, jnp.arange(w) * width // w
    return images[:, rows][:, :, columns]


def make_predict(merge: Callable[[Any], Any]) -> Callable[..., Any]:
    """`predict(params, latents [N...], timesteps [N], condition)`, rows one to one.

    Args:
        merge: parameters -> UNet.

    The condition's leading axis is N here; its time_ids are `[N, 1, 6]` or `[N, 6]`.
    """

    def predict(params: Any, latents, timesteps, condition: Condition):
        if condition.image is not None:
            latents = jnp.concatenate([latents, condition.image.astype(latents.dtype)], axis=-1)
        time_ids = condition.time_ids
        if time_ids is not None:
            time_ids = time_ids.reshape(-1, 6)
        return merge(params)(latents, timesteps, condition.context, condition.pooled, time_ids)

    return predict
