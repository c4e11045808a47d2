"""SDXL, text to image."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from dmpo_jax.families.family import Embedded, Family, Published, TextPart, Tiny
from dmpo_jax.families.stable_diffusion import SCHEDULER, UNET
from dmpo_jax.models.vae import AutoencoderKL


def size_ids(height: int, width: int) -> list[int]:
    """Returns `Condition.sizes` of an uncropped image at its own size, in pixels."""
    return [height, width, 0, 0, height, width]


def _embed(outputs: Sequence[Any], masks: Sequence[Any]) -> Embedded:
    """Concatenates both encoders' penultimate states; pooled is the second one's projection.

    Source: arXiv 2307.01952; diffusers `StableDiffusionXLPipeline.encode_prompt`.
    """
    context = jnp.concatenate([output.hidden_states[-2] for output in outputs], axis=-1)
    return Embedded(context, outputs[-1].pooled)


SDXL = Family(
    name="sdxl",
    pipeline="StableDiffusionXLPipeline",
    text=(TextPart("text_encoder"), TextPart("text_encoder_2")),
    embed=_embed,
    **UNET,
    vae=AutoencoderKL,
    sizes=size_ids,
    zero_negative=True,
    tiny=Tiny(
        model={
            "block_out_channels": [16, 32, 32],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 2],
            "attention_head_dim": [2, 4, 4],
            "cross_attention_dim": 16 + 24,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24 + 6 * 8,
        },
        text={
            "text_encoder": {"hidden_size": 16},
            "text_encoder_2": {
                "hidden_size": 24,
                "architectures": ["CLIPTextModelWithProjection"],
            },
        },
    ),
)

# unet/config.json of stabilityai/stable-diffusion-xl-base-1.0 on the hub.
SDXL_BASE: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
PUBLISHED = {"sdxl": Published(SDXL, SDXL_BASE, 0.13025, SCHEDULER)}
