"""ImageReward's model: BLIP's ViT, a BERT that attends to the image, and a head of one number.

Attribute paths are those of the published state dict. References: transformers `BlipVisionModel`
and `BlipTextModel` with `layer_norm_eps` as here; the head of
https://github.com/THUDM/ImageReward (Apache-2.0), ImageReward/ImageReward.py.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dmpo_jax.errors import UserError
from dmpo_jax.models.attention import attention
from dmpo_jax.models.component_config import ModelConfig
from dmpo_jax.models.layers import Linear, activation, conv, layer_norm

KEYS = {  # ImageReward 1.0: ViT-L/16 and BERT-base
    "image_size": 224,
    "patch_size": 16,
    "text_heads": 12,
    "text_intermediate": 3072,
    "text_layers": 12,
    "text_positions": 512,
    "text_width": 768,
    "vision_heads": 16,
    "vision_layers": 24,
    "vision_width": 1024,
    "vocab_size": 30524,
}
VISION_EPSILON, TEXT_EPSILON = 1e-6, 1e-12
# The state dict's numbers of the head's linear layers; the others are dropout.
HEAD = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}
# Scores of the training set: their mean and deviation, by which the head's output is normalised.
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
# Left from pretraining, for a loss that scoring does not compute.
_UNUSED = ("blip.vision_proj.", "blip.text_proj.")


def _heads(x: Float[Array, "N T D"], heads: int) -> Float[Array, "N T heads H"]:
    return x.reshape(*x.shape[:2], heads, -1)


class PatchEmbed(nnx.Module):
    def __init__(self, config: ModelConfig, **kw: Any):
        patch = config.patch_size
        self.proj = conv(3, config.vision_width, patch, patch, (0, 0), **kw)


class VisionAttention(nnx.Module):
    def __init__(self, config: ModelConfig, **kw: Any):
        width = config.vision_width
        self.qkv = Linear(width, 3 * width, **kw)
        self.proj = Linear(width, width, **kw)
        self.heads = config.vision_heads

    def __call__(self, x: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
        q, k, v = (_heads(part, self.heads) for part in jnp.split(self.qkv(x), 3, -1))
        return self.proj(attention(q, k, v).reshape(x.shape))


class VisionMLP(nnx.Module):
    def __init__(self, width: int, **kw: Any):
        self.fc1 = Linear(width, 4 * width, **kw)
        self.fc2 = Linear(4 * width, width, **kw)

    def __call__(self, x: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
        return self.fc2(activation("gelu")(self.fc1(x)))


class VisionBlock(nnx.Module):
    def __init__(self, config: ModelConfig, **kw: Any):
        width = config.vision_width
        self.norm1 = layer_norm(width, VISION_EPSILON, **kw)
        self.attn = VisionAttention(config, **kw)
        self.norm2 = layer_norm(width, VISION_EPSILON, **kw)
        self.mlp = VisionMLP(width, **kw)

    def __call__(self, x: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionEncoder(nnx.Module):
    def __init__(self, config: ModelConfig, **kw: Any):
        width, dtype = config.vision_width, kw["param_dtype"]
        positions = (config.image_size // config.patch_size) ** 2 + 1
        self.cls_token = nnx.Param(jnp.zeros((1, 1, width), dtype))
        self.pos_embed = nnx.Param(jnp.zeros((1, positions, width), dtype))
        self.patch_embed = PatchEmbed(config, **kw)
        self.blocks = nnx.List(VisionBlock(config, **kw) for _ in range(config.vision_layers))
        self.norm = layer_norm(width, VISION_EPSILON, **kw)

    def __call__(self, images: Float[Array, "N H W 3"]) -> Float[Array, "N T D"]:
        patches = self.patch_embed.proj(images)
        n, width = patches.shape[0], patches.shape[-1]
        first = jnp.broadcast_to(self.cls_token[...].astype(patches.dtype), (n, 1, width))
        x = jnp.concatenate([first, patches.reshape(n, -1, width)], 1)
        x = x + self.pos_embed[...].astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Projections(nnx.Module):
    """Query from the text; key and value from `source` channels, the text's or the image's."""

    def __init__(self, width: int, source: int, **kw: Any):
        self.query = Linear(width, width, **kw)
        self.key = Linear(source, width, **kw)
        self.value = Linear(source, width, **kw)


class AddAndNorm(nnx.Module):
    def __init__(self, given: int, width: int, **kw: Any):
        self.dense = Linear(given, width, **kw)
        self.LayerNorm = layer_norm(width, TEXT_EPSILON, **kw)

    def __call__(
        self, x: Float[Array, "N S E"], residual: Float[Array, "N S D"]
    ) -> Float[Array, "N S D"]:
        return self.LayerNorm(self.dense(x) + residual)


class TextAttention(nnx.Module):
    def __init__(self, config: ModelConfig, source: int, **kw: Any):
        width = config.text_width
        self.self = Projections(width, source, **kw)
        self.output = AddAndNorm(width, width, **kw)
        self.heads = config.text_heads

    def __call__(
        self,
        x: Float[Array, "N S D"],
        source: Float[Array, "N T E"],
        mask: Bool[Array, "N 1 T"] | None = None,
    ) -> Float[Array, "N S D"]:
        given = ((self.self.query, x), (self.self.key, source), (self.self.value, source))
        q, k, v = (_heads(project(states), self.heads) for project, states in given)
        return self.output(attention(q, k, v, mask).reshape(x.shape), x)


class Intermediate(nnx.Module):
    def __init__(self, config: ModelConfig, **kw: Any):
        self.dense = Linear(config.text_width, config.text_intermediate, **kw)

    def __call__(self, x: Float[Array, "N S D"]) -> Float[Array, "N S E"]:
        return activation("gelu")(self.dense(x))


class TextLayer(nnx.Module):
    def __init__(self, config: ModelConfig, **kw: Any):
        self.attention = TextAttention(config, config.text_width, **kw)
        self.crossattention = TextAttention(config, config.vision_width, **kw)
        self.intermediate = Intermediate(config, **kw)
        self.output = AddAndNorm(config.text_intermediate, config.text_width, **kw)

    def __call__(
        self,
        x: Float[Array, "N S D"],
        image: Float[Array, "N T E"],
        mask: Bool[Array, "N 1 S"],
    ) -> Float[Array, "N S D"]:
        x = self.crossattention(self.attention(x, x, mask), image)
        return self.output(self.intermediate(x), x)


class TextEmbeddings(nnx.Module):
    def __init__(self, config: ModelConfig, **kw: Any):
        width = config.text_width
        self.word_embeddings = nnx.Embed(config.vocab_size, width, **kw)
        self.position_embeddings = nnx.Embed(config.text_positions, width, **kw)
        self.LayerNorm = layer_norm(width, TEXT_EPSILON, **kw)

    def __call__(self, ids: Int[Array, "N S"]) -> Float[Array, "N S D"]:
        positions = self.position_embeddings(jnp.arange(ids.shape[1]))
        return self.LayerNorm(self.word_embeddings(ids) + positions[None])


class TextLayers(nnx.Module):
    def __init__(self, config: ModelConfig, **kw: Any):
        self.layer = nnx.List(TextLayer(config, **kw) for _ in range(config.text_layers))


class TextEncoder(nnx.Module):
    def __init__(self, config: ModelConfig, **kw: Any):
        self.embeddings = TextEmbeddings(config, **kw)
        self.encoder = TextLayers(config, **kw)

    def __call__(
        self,
        ids: Int[Array, "N S"],
        mask: Int[Array, "N S"],
        image: Float[Array, "N T E"],
    ) -> Float[Array, "N S D"]:
        x, shown = self.embeddings(ids), (mask != 0)[:, None]
        for layer in self.encoder.layer:
            x = layer(x, image, shown)
        return x


class Blip(nnx.Module):
    def __init__(self, config: ModelConfig, **kw: Any):
        self.visual_encoder = VisionEncoder(config, **kw)
        self.text_encoder = TextEncoder(config, **kw)


class Nothing(nnx.Module):
    """Dropout, which scoring does without; it keeps the numbers of the layers around it."""


class Head(nnx.Module):
    """Linear layers without activations between them."""

    def __init__(self, width: int, **kw: Any):
        layers: list[nnx.Module] = []
        for i in range(max(HEAD) + 1):
            layers.append(Linear(width, HEAD[i], **kw) if i in HEAD else Nothing())
            width = HEAD.get(i, width)
        self.layers = nnx.List(layers)

    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N 1"]:
        for i in HEAD:
            x = self.layers[i](x)
        return x


class ImageReward(nnx.Module):
    """Images and their prompts' tokens -> scores, about standard normal.

    Raises:
        ValueError: naming each config key whose value is not supported.
    """

    def __init__(self, config: Any, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config = ModelConfig(config, KEYS, frozenset())
        for side in ("vision", "text"):
            width, heads = config[f"{side}_width"], config[f"{side}_heads"]
            if width % heads:
                raise UserError(f"{side}_heads={heads} must divide {width} channels")
        kw: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.blip = Blip(config, **kw)
        self.mlp = Head(config.text_width, **kw)

    def unused(self, name: str) -> bool:
        """True for a tensor of the published file that scoring does not need."""
        return name.startswith(_UNUSED)

    def __call__(
        self,
        images: Float[Array, "N H W 3"],
        ids: Int[Array, "N S"],
        mask: Int[Array, "N S"],
    ) -> Float[Array, " N"]:
        """Scores normalised images; mask is 0 at padding."""
        seen = self.blip.visual_encoder(images)
        read = self.blip.text_encoder(ids, mask, seen)
        return (self.mlp(read[:, 0])[:, 0] - MEAN) / DEVIATION
