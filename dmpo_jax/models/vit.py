"""CLIP's vision tower, and the text tower beside it in the folder of a complete CLIP model.

Attribute paths are those of transformers' `CLIPModel`, the reference.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dmpo_jax.errors import UserError
from dmpo_jax.models.clip import CLIPTextModel, Layers, checked_config
from dmpo_jax.models.component_config import ModelConfig, Only
from dmpo_jax.models.layers import Linear, conv, layer_norm

KEYS = {
    "attention_dropout": 0.0,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "image_size": 224,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-5,
    "num_attention_heads": 12,
    "num_channels": Only(3),
    "num_hidden_layers": 12,
    "patch_size": 32,
    "projection_dim": 512,
}
LOGIT_SCALE = "logit_scale"
_TEXT, _VISION = ("text_model.", "text_projection."), ("vision_model.", "visual_projection.")


class VisionEmbeddings(nnx.Module):
    def __init__(self, config: ModelConfig, **kw: Any):
        width, patch = config.hidden_size, config.patch_size
        positions = (config.image_size // patch) ** 2 + 1
        self.class_embedding = nnx.Param(jnp.zeros(width, kw["param_dtype"]))
        self.patch_embedding = conv(3, width, patch, patch, (0, 0), use_bias=False, **kw)
        self.position_embedding = nnx.Embed(positions, width, **kw)

    def __call__(self, images: Float[Array, "N H W 3"]) -> Float[Array, "N T D"]:
        patches = self.patch_embedding(images)
        n, width = patches.shape[0], patches.shape[-1]
        first = self.class_embedding[...].astype(patches.dtype)
        first = jnp.broadcast_to(first[None, None], (n, 1, width))
        x = jnp.concatenate([first, patches.reshape(n, -1, width)], 1)
        return x + self.position_embedding(jnp.arange(x.shape[1]))[None]


class VisionTransformer(nnx.Module):
    def __init__(self, config: ModelConfig, **kw: Any):
        width, epsilon = config.hidden_size, config.layer_norm_eps
        self.embeddings = VisionEmbeddings(config, **kw)
        self.pre_layrnorm = layer_norm(width, epsilon, **kw)  # transformers' spelling
        self.encoder = Layers(config, causal=False, **kw)
        self.post_layernorm = layer_norm(width, epsilon, **kw)


class CLIPVisionTower(nnx.Module):
    """Images -> embeddings; transformers' `CLIPVisionModelWithProjection`.

    Raises:
        ValueError: naming each config key whose value is not supported; on call, if the images
            are not of the config's size.
    """

    def __init__(self, config: Any, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config = checked_config(config, KEYS)
        for key in ("image_size", "patch_size"):
            if not isinstance(config[key], int) or config[key] < 1:
                raise UserError(f"{key}={config[key]!r} must be one number of pixels")
        kw: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.vision_model = VisionTransformer(config, **kw)
        self.visual_projection = Linear(
            config.hidden_size, config.projection_dim, use_bias=False, **kw
        )

    def unused(self, name: str) -> bool:
        """True for a tensor of a complete model that the vision tower does not need."""
        return name.startswith(_TEXT) or name == LOGIT_SCALE

    def __call__(self, images: Float[Array, "N H W 3"]) -> Float[Array, "N P"]:
        """Embeds normalised images."""
        side = self.config.image_size
        if images.shape[1:3] != (side, side):
            raise ValueError(f"images are {images.shape[1:3]}, this tower takes {side} x {side}")
        x = self.vision_model.pre_layrnorm(self.vision_model.embeddings(images))
        for layer in self.vision_model.encoder.layers:
            x = layer(x)
        return self.visual_projection(self.vision_model.post_layernorm(x[:, 0]))


class CLIPTextTower(CLIPTextModel):
    """The text tower of a complete model; its output's `pooled` is the embedding."""

    def __init__(self, config: Any, **kw: Any):
        super().__init__(config, projection=True, **kw)

    def unused(self, name: str) -> bool:
        """True for a tensor of a complete model that the text tower does not need."""
        return name.startswith(_VISION) or name == LOGIT_SCALE
