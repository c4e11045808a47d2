"""Stable Diffusion 1.x and 2.x, text to image."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from dmpo_jax.errors import UserError
from dmpo_jax.families.family import Embedded, Facts, Family, Published, TextPart, Tiny
from dmpo_jax.models import clip
from dmpo_jax.models.unet import KEYS, UNet2DConditionModel
from dmpo_jax.models.vae import AutoencoderKL
from dmpo_jax.types import Condition


def predict(unet: Any, latents: Any, times: Any, condition: Condition) -> Any:
    """Calls the UNet, with the input image's channels and SDXL's sizes if present."""
    if condition.image is not None:
        latents = jnp.concatenate([latents, condition.image.astype(latents.dtype)], axis=-1)
    time_ids = condition.sizes
    if time_ids is not None:
        time_ids = time_ids.reshape(-1, 6)
    return unet(latents, times, condition.context, condition.pooled, time_ids)


def facts(config: Mapping[str, Any]) -> Facts:
    """Reads the Facts of a UNet's config.json, with defaults filled in."""
    config = {**KEYS, **config}
    size, width = config["sample_size"], config["cross_attention_dim"]
    heads = config["attention_head_dim"]
    pooled = 0
    if config["addition_embed_type"] == "text_time":
        sizes = 6 * (config["addition_time_embed_dim"] or 0)
        pooled = (config["projection_class_embeddings_input_dim"] or 0) - sizes
    return Facts(
        in_channels=config["in_channels"],
        latent_size=(size, size) if isinstance(size, int) else size and tuple(size),
        context_width=width[0] if isinstance(width, list | tuple) else width,
        pooled_width=pooled,
        splits=frozenset(
            {*(heads if isinstance(heads, list | tuple) else [heads]), config["norm_num_groups"]}
        ),
    )


def torch_inputs(latents: Any, times: Any, condition: Condition) -> dict[str, Any]:
    """Returns PyTorch's UNet arguments: latents as NCHW, SDXL's extras by name."""
    added = {"text_embeds": condition.pooled}
    if condition.sizes is not None:
        added["time_ids"] = condition.sizes.reshape(-1, 6)
    return {
        "sample": latents.transpose(0, 3, 1, 2),
        "timestep": times,
        "encoder_hidden_states": condition.context,
        "added_cond_kwargs": {name: x for name, x in added.items() if x is not None},
    }


def _embed(outputs: Sequence[Any], masks: Sequence[Any]) -> Embedded:
    """Returns the last hidden state. SD2 drops its last layer by the config's layer count."""
    return Embedded(outputs[0].last_hidden_state)


def check_text(folder: Any, facts: Facts, texts: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks that CLIP encoders have the UNet's context width and the projection it needs.

    Raises:
        ValueError: naming the folder and the key.
    """
    configs = {part: {**clip.KEYS, **config} for part, config in texts.items()}
    widths = [config["hidden_size"] for config in configs.values()]
    if sum(widths) != facts.context_width:
        raise UserError(
            f"{folder}/unet attends to width {facts.context_width} (cross_attention_dim), but "
            f"{' and '.join(configs)} give {' + '.join(map(str, widths))} (hidden_size): take the "
            "text encoders from the UNet's own pipeline"
        )
    if not facts.pooled_width:
        return
    last, config = list(configs.items())[-1]
    if "CLIPTextModelWithProjection" not in (config.get("architectures") or []):
        raise UserError(
            f"{folder}/{last} has no projection, which the UNet (text_time) needs: its config.json "
            f"says {config.get('architectures')}, wanted CLIPTextModelWithProjection"
        )
    if facts.pooled_width != config["projection_dim"]:
        raise UserError(
            f"{folder}/unet takes a pooled embedding of width {facts.pooled_width}, but {last} "
            f"projects to {config['projection_dim']} (projection_dim): take it from the UNet's own "
            "pipeline"
        )


UNET: dict[str, Any] = {
    "model": UNet2DConditionModel,
    "component": "unet",
    "sensitive": ("conv_in", "conv_out", "time_embedding", "add_embedding", "time_emb_proj"),
    "predict": predict,
    "facts": facts,
    "check_text": check_text,
    "torch_class": "UNet2DConditionModel",
    "torch_inputs": torch_inputs,
}
SD = Family(
    name="sd",
    pipeline="StableDiffusionPipeline",
    text=(TextPart("text_encoder"),),
    embed=_embed,
    **UNET,
    vae=AutoencoderKL,
    scheduler_overrides={"steps_offset": 1, "clip_sample": False},
    tiny=Tiny(
        model={
            "block_out_channels": [16, 32, 32, 32],
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
            "cross_attention_dim": 16,
            "attention_head_dim": 4,
        },
        text={"text_encoder": {"hidden_size": 16}},
    ),
)

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# unet/config.json of stable-diffusion-v1-5 and stabilityai/stable-diffusion-2-1 on the hub.
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
PUBLISHED = {
    "sd15": Published(SD, SD15, 0.18215, SCHEDULER),
    "sd21": Published(SD, SD21, 0.18215, {**SCHEDULER, "prediction_type": "v_prediction"}),
}
