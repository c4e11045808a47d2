"""How each family of pipelines conditions its UNet. Arrays only: no files, no tokenizers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from dmpo_jax.models.clip import TextOutput
from dmpo_jax.types import Conditioning

Embedded = tuple[Float[Array, "N S D"], Float[Array, "N P"] | None]


class Family(NamedTuple):
    """text_parts: the pipeline's text encoders, in order, each beside its `tokenizer...`;
    embed: their outputs -> (context, pooled)."""

    name: str
    text_parts: tuple[str, ...]
    embed: Callable[[Sequence[TextOutput]], Embedded]


def _sd_embed(outputs: Sequence[TextOutput]) -> Embedded:
    """The last hidden state. SD2 leaves its last layer out by the config's own layer count."""
    return outputs[0].last_hidden_state, None


def _sdxl_embed(outputs: Sequence[TextOutput]) -> Embedded:
    """Both encoders' penultimate states side by side, and the second one's projection.

    Source: arXiv 2307.01952; diffusers `StableDiffusionXLPipeline.encode_prompt`.
    """
    context = jnp.concatenate([output.hidden_states[-2] for output in outputs], axis=-1)
    return context, outputs[-1].pooled


FAMILIES = {
    "StableDiffusionPipeline": Family("sd", ("text_encoder",), _sd_embed),
    "StableDiffusionXLPipeline": Family("sdxl", ("text_encoder", "text_encoder_2"), _sdxl_embed),
}


def size_ids(height: int, width: int) -> list[int]:
    """SDXL's time_ids of an uncropped image at its own size, in pixels."""
    return [height, width, 0, 0, height, width]


def make_predict(merge: Callable[[Any], Any]) -> Callable[..., Any]:
    """`predict(params, latents [N...], timesteps [N], conditioning)`, rows one to one.

    Args:
        merge: parameters -> UNet.

    The conditioning's leading axis is N here; its time_ids are `[N, 1, 6]` or `[N, 6]`.
    """

    def predict(params: Any, latents, timesteps, conditioning: Conditioning):
        if conditioning.image is not None:
            latents = jnp.concatenate([latents, conditioning.image.astype(latents.dtype)], axis=-1)
        time_ids = conditioning.time_ids
        if time_ids is not None:
            time_ids = time_ids.reshape(-1, 6)
        return merge(params)(
            latents, timesteps, conditioning.context, conditioning.pooled, time_ids
        )

    return predict
