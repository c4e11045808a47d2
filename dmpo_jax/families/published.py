"""The UNets of the published models, as their unet/config.json have them: shapes, no weights.

Sources: stable-diffusion-v1-5, stabilityai/stable-diffusion-2-1 and
stabilityai/stable-diffusion-xl-base-1.0 on the Hugging Face hub.
"""

from typing import Any, NamedTuple

SD15: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD21: dict[str, Any] = {
    **SD15,
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL: dict[str, Any] = {
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


class Published(NamedTuple):
    """A pipeline's class, its UNet's config and what its VAE scales latents by."""

    pipeline: str
    unet: dict[str, Any]
    scaling_factor: float
    prediction_type: str = "epsilon"


PUBLISHED = {
    "sd15": Published("StableDiffusionPipeline", SD15, 0.18215),
    "sd21": Published("StableDiffusionPipeline", SD21, 0.18215, "v_prediction"),
    "sdxl": Published("StableDiffusionXLPipeline", SDXL, 0.13025),
}
