"""Z-Image, text to image."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dmpo_jax.errors import UserError
from dmpo_jax.families.family import Embedded, Facts, Family, Published, TextPart, Tiny
from dmpo_jax.families.flux2 import OWN, TINY_QWEN3, check_qwen3
from dmpo_jax.models.vae import AutoencoderKL
from dmpo_jax.models.z_image import KEYS, ZImageTransformer2DModel
from dmpo_jax.types import Condition

TOKENS = 512  # of a prompt, of which the transformer sees those that are text
# What Qwen3's chat template makes of one message, its reply left open.
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def _embed(outputs: Sequence[Any], masks: Sequence[Any]) -> Embedded:
    """Returns the state after all layers but the last, and the number of tokens of text."""
    return Embedded(outputs[0].hidden_states[-1], lengths=masks[0].sum(-1))


def predict(model: Any, latents: Any, times: Any, condition: Condition) -> Any:
    """Calls the transformer, which counts time from noise to image and negates the velocity."""
    return -model(latents, 1 - times / 1000, condition.context, condition.lengths)


def facts(config: Mapping[str, Any]) -> Facts:
    """Reads the Facts of a transformer's config.json, with defaults filled in."""
    config = {**KEYS, **config}
    return Facts(
        in_channels=config["in_channels"],
        latent_size=None,
        context_width=config["cap_feat_dim"],
        pooled_width=0,
        splits=frozenset({config["n_heads"]}),
        patch=2,
        lengths=True,
    )


def torch_inputs(latents: Any, times: Any, condition: Condition) -> dict[str, Any]:
    """Returns PyTorch's arguments: lists of images [C 1 H W] and of texts without padding."""
    lengths: Any = condition.lengths
    return {
        "x": list(latents.transpose(0, 3, 1, 2)[:, :, None]),
        "t": 1 - np.asarray(times, np.float32) / 1000,
        "cap_feats": [
            text[:length] for text, length in zip(condition.context, lengths, strict=True)
        ],
    }


def torch_output(predicted: Any, shape: Sequence[int]) -> Any:
    """Returns the velocity [N H W C] from PyTorch's list of negated images."""
    return -np.stack(predicted)[:, :, 0].transpose(0, 2, 3, 1)


def check_text(folder: Any, facts: Facts, texts: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks that the text encoder is Qwen3, as wide as the transformer reads.

    Raises:
        ValueError: naming the folder and the key.
    """
    width = check_qwen3(folder, texts)["hidden_size"]
    if width != facts.context_width:
        raise UserError(
            f"{folder}/transformer attends to width {facts.context_width} (cap_feat_dim), but "
            f"text_encoder gives {width} (hidden_size): {OWN}"
        )


Z_IMAGE = Family(
    name="z_image",
    pipeline="ZImagePipeline",
    # Causal, and padded behind the text: what is text needs no mask.
    text=(TextPart("text_encoder", tokens=TOKENS, template=TEMPLATE, layers=-1),),
    embed=_embed,
    model=ZImageTransformer2DModel,
    component="transformer",
    sensitive=("all_x_embedder", "all_final_layer", "t_embedder", "cap_embedder"),
    predict=predict,
    facts=facts,
    vae=AutoencoderKL,
    torch_class="ZImageTransformer2DModel",
    torch_inputs=torch_inputs,
    torch_output=torch_output,
    check_text=check_text,
    noise="flow",
    stored="bfloat16",
    guidance=lambda scale: (1 + scale, -scale),
    tiny=Tiny(
        model={
            "_class_name": "ZImageTransformer2DModel",
            "in_channels": 8,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [4, 6, 6],
            "axes_lens": [640, 64, 64],
        },
        text={
            "text_encoder": {
                **TINY_QWEN3,
                "architectures": ["Qwen3Model"],
                "num_hidden_layers": 3,
            }
        },
        vae={
            "latent_channels": 8,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
        },
        scheduler={
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 6.0,
        },
    ),
)

PUBLISHED = {
    "z_image": Published(
        Z_IMAGE,
        {},  # the transformer's defaults
        0.3611,
        {"shift": 6.0},
        latent_channels=16,
        tokens=TOKENS,
        shift_factor=0.1159,
    )
}
