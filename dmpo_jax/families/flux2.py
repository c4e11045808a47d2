"""FLUX.2-klein, text to image."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmpo_jax.diffusion.noise import Factor
from dmpo_jax.errors import UserError
from dmpo_jax.families.family import Embedded, Facts, Family, Published, TextPart, Tiny
from dmpo_jax.models import qwen3
from dmpo_jax.models.flux2 import KEYS, Flux2Transformer2DModel
from dmpo_jax.models.vae import AutoencoderKLFlux2
from dmpo_jax.types import Condition

TOKENS = 512  # attended to the last one, padding too: other lengths are other conditions
STATES = (9, 18, 27)  # of the text encoder, after so many layers, side by side
# What Qwen3's chat template makes of one message, its reply begun without thoughts.
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def empirical_mu(tokens: int, steps: int) -> float:
    """Returns the dynamic shift of an image's tokens in a number of steps.

    Two lines in the tokens, for 10 and for 200 steps, and a line in the steps between them; from
    4,300 tokens on that for 200. Source: diffusers `Flux2KleinPipeline`.
    """
    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333
    return many + (few - many) * (200 - steps) / 190


def embed(outputs: Sequence[Any], masks: Sequence[Any], states: Sequence[int] = STATES) -> Embedded:
    """Concatenates three states of the text encoder on their features."""
    return Embedded(jnp.concatenate([outputs[0].hidden_states[i] for i in states], axis=-1))


def predict(model: Any, latents: Any, times: Any, condition: Condition) -> Any:
    """Calls the transformer; times are 1000 sigma, as the noise table has them."""
    return model(latents, times / 1000, condition.context)


def facts(config: Mapping[str, Any]) -> Facts:
    """Reads the Facts of a transformer's config.json, with defaults filled in."""
    config = {**KEYS, **config}
    return Facts(
        in_channels=config["in_channels"],
        latent_size=None,
        context_width=config["joint_attention_dim"],
        pooled_width=0,
        splits=frozenset({config["num_attention_heads"]}),
    )


def factors(vae: Any) -> tuple[Factor, Factor]:
    """Returns (scaling factor, shift factor), each packed channel's, from the VAE's statistics.

    Raises:
        ValueError: another kind of VAE.

    Source: diffusers `Flux2KleinPipeline`: (latents - mean) / sqrt(variance + epsilon).
    """
    if not hasattr(vae, "bn"):
        raise UserError(
            f"FLUX.2 needs the statistics of an AutoencoderKLFlux2, but its VAE is an "
            f"{type(vae).__name__}: take the VAE from the transformer's own pipeline"
        )
    mean, variance = (x.get_value() for x in (vae.bn.running_mean, vae.bn.running_var))
    if isinstance(mean, jax.ShapeDtypeStruct):  # of a plan, which reads no weights
        return (1.0,) * mean.shape[0], (0.0,) * mean.shape[0]
    deviation = np.sqrt(np.asarray(variance, np.float64) + vae.config.batch_norm_eps)
    return tuple((1 / deviation).tolist()), tuple(np.asarray(mean, np.float64).tolist())


def torch_inputs(latents: Any, times: Any, condition: Condition) -> dict[str, Any]:
    """Returns PyTorch's arguments: latents as tokens, and the position of every token."""
    n, height, width, channels = latents.shape
    words = condition.context.shape[1]
    text, image = np.zeros((words, 4), np.int64), np.zeros((height * width, 4), np.int64)
    text[:, 3] = np.arange(words)
    image[:, 1], image[:, 2] = np.divmod(np.arange(height * width), width)
    return {
        "hidden_states": latents.reshape(n, height * width, channels),
        "timestep": np.asarray(times, np.float32) / 1000,
        "encoder_hidden_states": condition.context,
        "txt_ids": text,
        "img_ids": image,
        "guidance": None,
    }


def torch_output(predicted: Any, shape: Sequence[int]) -> Any:
    """Returns PyTorch's tokens as [N H W C]."""
    return predicted.reshape(*shape[:3], -1)


def check_text(folder: Any, facts: Facts, texts: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks that the text encoder is Qwen3, of the depth and width that the transformer reads.

    Raises:
        ValueError: naming the folder and the key.
    """
    config = check_qwen3(folder, texts)
    depth, width = config["num_hidden_layers"], config["hidden_size"]
    if depth <= STATES[-1]:  # the last layer's state is normed, and no model was trained on that
        raise UserError(
            f"{folder}/text_encoder has {depth} layers (num_hidden_layers), but the states after "
            f"{', '.join(map(str, STATES))} are read and more layers must follow: {OWN}"
        )
    if len(STATES) * width != facts.context_width:
        raise UserError(
            f"{folder}/transformer attends to width {facts.context_width} (joint_attention_dim), "
            f"but {len(STATES)} states of text_encoder are {len(STATES)} x {width} wide "
            f"(hidden_size): {OWN}"
        )


OWN = "take the text encoder from the transformer's own pipeline"


def check_qwen3(folder: Any, texts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the config.json of a text encoder that must be Qwen3, with defaults filled in."""
    config = texts["text_encoder"]
    kinds = config.get("architectures") or []
    if not {"Qwen3Model", "Qwen3ForCausalLM"} & set(kinds):
        raise UserError(
            f"{folder}/text_encoder should hold Qwen3, but its config.json says {kinds}: {OWN}"
        )
    return {**qwen3.KEYS, **config}


TINY_QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
}
KLEIN = Family(
    name="klein",
    pipeline="Flux2KleinPipeline",
    text=(
        TextPart("text_encoder", tokens=TOKENS, template=TEMPLATE, masked=True, layers=STATES[-1]),
    ),
    embed=embed,
    model=Flux2Transformer2DModel,
    component="transformer",
    sensitive=(
        "time_guidance_embed",
        "double_stream_modulation_img",  # one for all blocks, and so its errors
        "double_stream_modulation_txt",
        "single_stream_modulation",
        "x_embedder",
        "context_embedder",
        "norm_out",
        "proj_out",
    ),
    predict=predict,
    facts=facts,
    vae=AutoencoderKLFlux2,
    torch_class="Flux2Transformer2DModel",
    torch_inputs=torch_inputs,
    torch_output=torch_output,
    check_text=check_text,
    pack=2,
    factors=factors,
    noise="flow",
    stored="bfloat16",
    scheduler_overrides={"mu": empirical_mu},
    tiny=Tiny(
        model={
            "_class_name": "Flux2Transformer2DModel",
            "patch_size": 1,
            "in_channels": 32,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 48,
            "axes_dims_rope": [4, 4, 4, 4],
            "guidance_embeds": False,
        },
        text={
            "text_encoder": {
                **TINY_QWEN3,
                "architectures": ["Qwen3ForCausalLM"],
                "num_hidden_layers": 28,
            }
        },
        vae={"_class_name": "AutoencoderKLFlux2", "latent_channels": 8},
        scheduler={
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
            "use_dynamic_shifting": True,
        },
    ),
)

# Shapes of black-forest-labs/FLUX.2-klein-base-4B and -9B on the hub.
KLEIN_4B: dict[str, Any] = {
    "in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 20,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
KLEIN_9B: dict[str, Any] = {
    **KLEIN_4B,
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}
PUBLISHED = {
    name: Published(KLEIN, model, 1.0, {}, latent_channels=32, tokens=TOKENS)
    for name, model in (("klein_4b", KLEIN_4B), ("klein_9b", KLEIN_9B))
}
