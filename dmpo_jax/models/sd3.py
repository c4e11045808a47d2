"""The transformer of SD3 and SD3.5. Module tree and config keys follow PyTorch diffusers.

Reference: diffusers `SD3Transformer2DModel`, `JointTransformerBlock`; arXiv 2403.03206.

Letters: N images, H W their latents, T image tokens, S text tokens, D width.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped

from dmpo_jax.errors import UserError
from dmpo_jax.models.component_config import ModelConfig, Only
from dmpo_jax.models.execution import DEFAULT, Execution, apply_blocks
from dmpo_jax.models.joint import Attention, JointAttention, Modulation, Row, Tokens, gated
from dmpo_jax.models.layers import (
    Linear,
    TimestepEmbedding,
    activation,
    conv,
    modulated_norm,
    sinusoid,
)
from dmpo_jax.models.parameters import Buffer
from dmpo_jax.parallel.placement import gathered

KEYS = {
    "attention_head_dim": 64,
    "caption_projection_dim": 1152,
    "dual_attention_layers": (),
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 18,
    "num_layers": 18,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 96,
    "qk_norm": Only(None, "rms_norm"),
    "sample_size": 128,
}
TIME_WIDTH = 256  # of the sinusoid
EPSILON = 1e-6  # of every norm


class FeedForward(nnx.Module):
    def __init__(self, width: int, **kw: Any):
        # Index 1 is PyTorch's dropout, which has no parameters.
        leave = Linear(4 * width, width, split="rows", **kw)
        self.net = nnx.List([Projection(width, 4 * width, **kw), None, leave])

    def __call__(self, x: Tokens) -> Tokens:
        enter: Any = self.net[0]
        leave: Any = self.net[2]
        return leave(activation("gelu_tanh")(enter.proj(x)))


class Projection(nnx.Module):
    def __init__(self, width: int, inner: int, **kw: Any):
        self.proj = Linear(width, inner, **kw)


class JointTransformerBlock(nnx.Module):
    """Joint attention and feed-forward of both streams; `dual` adds attention of the image alone.

    The last block returns the text as it came: nothing after it reads it.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        *,
        norms: bool,
        dual: bool,
        last: bool,
        **kw: Any,
    ):
        self.norm1 = Modulation(width, 9 if dual else 6, **kw)
        self.norm1_context = Modulation(width, 2 if last else 6, **kw)
        shape: Any = {"width": width, "heads": heads, "head_width": head_width}
        shape["epsilon"] = EPSILON if norms else None
        self.attn = JointAttention(**shape, text_first=False, last=last, **kw)
        if dual:
            self.attn2 = Attention(**shape, **kw)
        self.ff = FeedForward(width, **kw)
        if not last:
            self.ff_context = FeedForward(width, **kw)
        self.dual, self.last = dual, last

    def __call__(
        self,
        streams: tuple[Tokens, Float[Array, "N S D"]],
        embedded: Row,
        *,
        kernel: str,
    ) -> tuple[Tokens, Float[Array, "N S D"]]:
        x, context = streams
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = self.norm1(embedded)
        if self.last:
            context_scale, context_shift = self.norm1_context(embedded)  # in this order
            text = []
        else:
            context_shift, context_scale, *text = self.norm1_context(embedded)
        normed = modulated_norm(context, context_shift, context_scale, EPSILON)
        image, words = self.attn.joint(
            modulated_norm(x, shift, scale, EPSILON), normed, kernel=kernel
        )
        before, x = x, x + gated(gate, image)
        if self.dual:
            shift, scale, gate = second
            normed = modulated_norm(before, shift, scale, EPSILON)
            x = x + gated(gate, self.attn2(normed, kernel=kernel))
        x = x + gated(gate_ff, self.ff(modulated_norm(x, shift_ff, scale_ff, EPSILON)))
        if words is not None:
            gate, shift_ff, scale_ff, gate_ff = text
            context = context + gated(gate, words)
            normed = modulated_norm(context, shift_ff, scale_ff, EPSILON)
            context = context + gated(gate_ff, self.ff_context(normed))
        return x, context


class PatchEmbed(nnx.Module):
    """Patches as tokens, plus the middle of a table of positions."""

    def __init__(self, config: ModelConfig, width: int, *, param_dtype: Any, **kw: Any):
        patch, self.side = config.patch_size, config.pos_embed_max_size
        kw["param_dtype"] = param_dtype
        self.proj = conv(config.in_channels, width, patch, stride=patch, pad=(0, 0), **kw)
        self.pos_embed = Buffer(jnp.zeros((1, self.side**2, width), param_dtype))

    def __call__(self, latents: Float[Array, "N H W C"]) -> Float[Array, "N h w D"]:
        x = self.proj(latents)
        height, width = x.shape[1:3]
        if max(height, width) > self.side:
            raise ValueError(
                f"latents of {height} x {width} patches, but pos_embed_max_size={self.side}"
            )
        top, left = (self.side - height) // 2, (self.side - width) // 2
        table = self.pos_embed[...].reshape(self.side, self.side, -1)
        table = table[top : top + height, left : left + width].astype(x.dtype)
        return x + gathered(table, x.shape[-1], "whole")[None]


def sincos_table(config: Mapping[str, Any]) -> Float[np.ndarray, "1 P D"]:
    """Returns the position table `pos_embed.pos_embed` that a model is trained with.

    Half of the channels are of the column, half of the row; positions count in patches of the
    image size that `sample_size` names, on a grid of pos_embed_max_size.

    Source: diffusers `get_2d_sincos_pos_embed`.
    """
    config = {**KEYS, **config}
    side, width = (
        config["pos_embed_max_size"],
        config["num_attention_heads"] * config["attention_head_dim"],
    )
    places = np.arange(side) * (config["sample_size"] // config["patch_size"]) / side
    rates = 10000.0 ** -(np.arange(width // 4) / (width // 4))
    angles = places[:, None] * rates
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    shape = side, side, width // 2
    table = np.concatenate(
        [np.broadcast_to(waves[None], shape), np.broadcast_to(waves[:, None], shape)], axis=-1
    )
    return table.reshape(1, side**2, width).astype(np.float32)


class TimeTextEmbedding(nnx.Module):
    def __init__(self, pooled: int, width: int, **kw: Any):
        self.timestep_embedder = TimestepEmbedding(TIME_WIDTH, width, "silu", **kw)
        self.text_embedder = TimestepEmbedding(pooled, width, "silu", **kw)

    def __call__(self, times: Shaped[Array, " N"], pooled: Float[Array, "N P"]) -> Row:
        wave = sinusoid(times, TIME_WIDTH, True, 0).astype(pooled.dtype)
        return self.timestep_embedder(wave) + self.text_embedder(pooled)


class SD3Transformer2DModel(nnx.Module):
    """Predicts the velocity of noised latents under text.

    Args:
        config: the contents of transformer/config.json, as diffusers writes it.
        dtype: compute dtype. param_dtype: dtype the parameters are held in.
        execution: execution choices; may be set on a built model too.

    Raises:
        ValueError: naming each config key whose value is not supported.
    """

    def __init__(
        self,
        config: Any,
        *,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        execution: Execution = DEFAULT,
        rngs: nnx.Rngs,
    ):
        self.config = config = ModelConfig(config, KEYS, frozenset())
        self.dtype, self.execution = dtype, execution
        kw: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        heads, head_width = config.num_attention_heads, config.attention_head_dim
        width, layers = heads * head_width, config.num_layers
        _check(config, width)
        self.pos_embed = PatchEmbed(config, width, **kw)
        self.time_text_embed = TimeTextEmbedding(config.pooled_projection_dim, width, **kw)
        self.context_embedder = Linear(config.joint_attention_dim, width, **kw)
        self.transformer_blocks = nnx.List(
            JointTransformerBlock(
                width,
                heads,
                head_width,
                norms=config.qk_norm is not None,
                dual=i in config.dual_attention_layers,
                last=i == layers - 1,
                **kw,
            )
            for i in range(layers)
        )
        self.norm_out = Modulation(width, 2, **kw)
        self.proj_out = Linear(width, config.patch_size**2 * out_channels(config), **kw)

    def __call__(
        self,
        latents: Float[Array, "N H W C"],
        times: Shaped[Array, " N"] | Shaped[Array, ""],
        context: Float[Array, "N S E"],
        pooled: Float[Array, "N P"],
    ) -> Float[Array, "N h w D"]:
        """Predicts, in the compute dtype. times: 1000 sigma."""
        times = jnp.broadcast_to(times, latents.shape[:1])
        embedded = self.time_text_embed(times, pooled.astype(self.dtype))
        words = self.context_embedder(context.astype(self.dtype))
        x = self.pos_embed(latents.astype(self.dtype))
        n, h, w, _ = x.shape
        streams = x.reshape(n, h * w, -1), words
        blocks = list(self.transformer_blocks)
        x, _ = apply_blocks(blocks, streams, embedded, self.execution)
        scale, shift = self.norm_out(embedded)  # in this order
        x = self.proj_out(modulated_norm(x, shift, scale, EPSILON))
        side = self.config.patch_size
        patches = x.reshape(n, h, w, side, side, -1)
        return patches.transpose(0, 1, 3, 2, 4, 5).reshape(n, h * side, w * side, -1)


def out_channels(config: Any) -> int:
    """Channels of the prediction; a config may leave them to in_channels."""
    return config["in_channels"] if config["out_channels"] is None else config["out_channels"]


def _check(config: ModelConfig, width: int) -> None:
    if config.caption_projection_dim != width:
        raise UserError(
            f"caption_projection_dim={config.caption_projection_dim} must be {width}, "
            "num_attention_heads x attention_head_dim: text and image share their attention"
        )
    if not config.pos_embed_max_size:
        raise UserError(
            f"pos_embed_max_size={config.pos_embed_max_size!r}; supported: a number of patches"
        )
