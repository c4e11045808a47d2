"""Stable Diffusion 3 and 3.5, text to image."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from dmpo_jax.errors import UserError
from dmpo_jax.families.family import Embedded, Facts, Family, Published, TextPart, Tiny
from dmpo_jax.models import clip
from dmpo_jax.models.sd3 import KEYS, SD3Transformer2DModel
from dmpo_jax.models.vae import AutoencoderKL
from dmpo_jax.types import Condition

CLIPS = ("text_encoder", "text_encoder_2")
T5_TOKENS = 256  # attended to the last one, padding too: other lengths are other conditions


def _embed(outputs: Sequence[Any], masks: Sequence[Any]) -> Embedded:
    """Returns the CLIP encoders' penultimate states, padded to T5's width, then T5's states.

    Pooled are both projections. Source: arXiv 2403.03206; diffusers
    `StableDiffusion3Pipeline.encode_prompt`.
    """
    *clips, t5 = outputs
    words = jnp.concatenate([output.hidden_states[-2] for output in clips], axis=-1)
    sentences = t5.last_hidden_state
    padding = sentences.shape[-1] - words.shape[-1]
    words = jnp.pad(words, ((0, 0), (0, 0), (0, padding)))
    context = jnp.concatenate([words, sentences.astype(words.dtype)], axis=1)
    return Embedded(context, jnp.concatenate([output.pooled for output in clips], axis=-1))


def predict(model: Any, latents: Any, times: Any, condition: Condition) -> Any:
    """Calls the transformer; times are 1000 sigma, as the noise table has them."""
    return model(latents, times, condition.context, condition.pooled)


def facts(config: Mapping[str, Any]) -> Facts:
    """Reads the Facts of a transformer's config.json, with defaults filled in."""
    config = {**KEYS, **config}
    return Facts(
        in_channels=config["in_channels"],
        latent_size=(config["sample_size"], config["sample_size"]),
        context_width=config["joint_attention_dim"],
        pooled_width=config["pooled_projection_dim"],
        splits=frozenset({config["num_attention_heads"]}),
        patch=config["patch_size"],
    )


def torch_inputs(latents: Any, times: Any, condition: Condition) -> dict[str, Any]:
    """Returns PyTorch's arguments: latents as NCHW."""
    return {
        "hidden_states": latents.transpose(0, 3, 1, 2),
        "timestep": times,
        "encoder_hidden_states": condition.context,
        "pooled_projections": condition.pooled,
    }


def check_text(folder: Any, facts: Facts, texts: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks that the text encoders are of the kinds and widths that the transformer takes.

    Raises:
        ValueError: naming the folder and the key.
    """
    clips = {part: {**clip.KEYS, **texts[part]} for part in CLIPS}
    for part, config in clips.items():
        _check_kind(folder, part, config, "CLIPTextModelWithProjection")
    pooled = [config["projection_dim"] for config in clips.values()]
    if sum(pooled) != facts.pooled_width:
        raise UserError(
            f"{folder}/transformer takes a pooled embedding of width {facts.pooled_width} "
            f"(pooled_projection_dim), but {' and '.join(clips)} project to "
            f"{' + '.join(map(str, pooled))} (projection_dim): {OWN}"
        )
    widths = [config["hidden_size"] for config in clips.values()]
    if sum(widths) > facts.context_width:
        raise UserError(
            f"{folder}/transformer attends to width {facts.context_width} (joint_attention_dim), "
            f"but {' and '.join(clips)} give {' + '.join(map(str, widths))} (hidden_size): {OWN}"
        )
    t5 = texts.get("text_encoder_3")
    if t5 is None:
        return
    _check_kind(folder, "text_encoder_3", t5, "T5EncoderModel")
    if t5.get("d_model") != facts.context_width:
        raise UserError(
            f"{folder}/transformer attends to width {facts.context_width} (joint_attention_dim), "
            f"but text_encoder_3 gives {t5.get('d_model')} (d_model): {OWN}"
        )


OWN = "take the text encoders from the transformer's own pipeline"


def _check_kind(folder: Any, part: str, config: Mapping[str, Any], wanted: str) -> None:
    if wanted not in (config.get("architectures") or []):
        raise UserError(
            f"{folder}/{part} should hold a {wanted}, but its config.json says "
            f"{config.get('architectures')}: {OWN}"
        )


SD3 = Family(
    name="sd3",
    pipeline="StableDiffusion3Pipeline",
    text=(
        *map(TextPart, CLIPS),
        TextPart("text_encoder_3", tokens=T5_TOKENS, optional=True),
    ),
    embed=_embed,
    model=SD3Transformer2DModel,
    component="transformer",
    sensitive=("pos_embed", "time_text_embed", "context_embedder", "norm_out", "proj_out"),
    predict=predict,
    facts=facts,
    vae=AutoencoderKL,
    torch_class="SD3Transformer2DModel",
    torch_inputs=torch_inputs,
    check_text=check_text,
    noise="flow",
    stored="bfloat16",  # T5's states overflow float16
    scheduler_overrides={"even_sigmas": False},
    tiny=Tiny(
        model={
            "_class_name": "SD3Transformer2DModel",
            "sample_size": 8,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 48,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 16 + 24,
            "pos_embed_max_size": 12,
            "qk_norm": "rms_norm",
            "dual_attention_layers": [0],
        },
        text={
            "text_encoder": {
                "hidden_size": 16,
                "architectures": ["CLIPTextModelWithProjection"],
            },
            "text_encoder_2": {
                "hidden_size": 24,
                "hidden_act": "gelu",
                "architectures": ["CLIPTextModelWithProjection"],
            },
            "text_encoder_3": {
                "architectures": ["T5EncoderModel"],
                "d_model": 48,
                "d_kv": 8,
                "d_ff": 64,
                "num_heads": 4,
                "num_layers": 2,
            },
        },
        vae={
            "latent_channels": 16,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "shift_factor": 0.0609,
        },
        scheduler={
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
        },
    ),
)

SCHEDULER = {"shift": 3.0}
# transformer/config.json of stabilityai/stable-diffusion-3-medium-diffusers, of
# stable-diffusion-3.5-medium and of stable-diffusion-3.5-large on the hub.
SD3_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
SD35_MEDIUM: dict[str, Any] = {
    **SD3_MEDIUM,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": list(range(13)),
}
SD35_LARGE: dict[str, Any] = {
    **SD3_MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
PUBLISHED = {
    name: Published(
        SD3,
        model,
        1.5305,
        SCHEDULER,
        latent_channels=16,
        tokens=77 + T5_TOKENS,
        shift_factor=0.0609,
    )
    for name, model in (
        ("sd3_medium", SD3_MEDIUM),
        ("sd35_medium", SD35_MEDIUM),
        ("sd35_large", SD35_LARGE),
    )
}
