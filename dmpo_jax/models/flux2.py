"""The transformer of FLUX.2. Module tree and config keys follow PyTorch diffusers.

Reference: diffusers `Flux2Transformer2DModel`.

Letters: N images, H W their packed latents, C channels, T image tokens, S text tokens, D width.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped

from dmpo_jax.errors import UserError
from dmpo_jax.models import rope
from dmpo_jax.models.attention import attention
from dmpo_jax.models.component_config import ModelConfig, Only
from dmpo_jax.models.execution import DEFAULT, Execution, apply_blocks, by_block
from dmpo_jax.models.joint import (
    JointAttention,
    Modulation,
    Row,
    Tokens,
    from_heads,
    gated,
    prepared,
    to_heads,
)
from dmpo_jax.models.layers import (
    Linear,
    RMSNorm,
    TimestepEmbedding,
    activation,
    modulated_norm,
    sinusoid,
)

KEYS = {
    "attention_head_dim": 128,
    "axes_dims_rope": (32, 32, 32, 32),
    "eps": 1e-6,
    "guidance_embeds": True,
    "in_channels": 128,
    "joint_attention_dim": 15360,
    "mlp_ratio": 3.0,
    "num_attention_heads": 48,
    "num_layers": 8,
    "num_single_layers": 48,
    "out_channels": None,
    "patch_size": Only(1),
    "rope_theta": 2000,
    "timestep_guidance_channels": 256,
}


class FeedForward(nnx.Module):
    """SwiGLU, its gate and its values in one projection."""

    def __init__(self, width: int, inner: int, **kw: Any):
        self.linear_in = Linear(width, 2 * inner, use_bias=False, **kw)
        self.linear_out = Linear(inner, width, use_bias=False, split="rows", **kw)

    def __call__(self, x: Tokens) -> Tokens:
        half = self.linear_in.out_features // 2
        gate, values = self.linear_in.parts(x, (half, half))
        return self.linear_out(activation("silu")(gate) * values)


class DoubleBlock(nnx.Module):
    """Joint attention, then a feed-forward of each stream."""

    def __init__(self, config: ModelConfig, **kw: Any):
        width, inner = _widths(config)
        self.attn = JointAttention(
            width,
            config.num_attention_heads,
            config.attention_head_dim,
            epsilon=config.eps,
            text_first=True,
            use_bias=False,
            **kw,
        )
        self.ff = FeedForward(width, inner, **kw)
        self.ff_context = FeedForward(width, inner, **kw)
        self.eps = config.eps

    def __call__(
        self, streams: tuple[Tokens, Float[Array, "N S D"]], told: Any, *, kernel: str
    ) -> tuple[Tokens, Float[Array, "N S D"]]:
        x, context = streams
        image, text, rotation = told
        shift, scale, gate, shift_ff, scale_ff, gate_ff = image
        text_shift, text_scale, text_gate, text_shift_ff, text_scale_ff, text_gate_ff = text
        added, words = self.attn.joint(
            modulated_norm(x, shift, scale, self.eps),
            modulated_norm(context, text_shift, text_scale, self.eps),
            rotation,
            kernel=kernel,
        )
        x = x + gated(gate, added)
        x = x + gated(gate_ff, self.ff(modulated_norm(x, shift_ff, scale_ff, self.eps)))
        context = context + gated(text_gate, words)
        normed = modulated_norm(context, text_shift_ff, text_scale_ff, self.eps)
        return x, context + gated(text_gate_ff, self.ff_context(normed))


class ParallelAttention(nnx.Module):
    """Attention and feed-forward side by side, in one projection into and one out of both."""

    def __init__(self, config: ModelConfig, **kw: Any):
        width, inner = _widths(config)
        self.to_qkv_mlp_proj = Linear(width, 3 * width + 2 * inner, use_bias=False, **kw)
        norm = functools.partial(RMSNorm, config.attention_head_dim, epsilon=config.eps, **kw)
        self.norm_q, self.norm_k = norm(), norm()
        self.to_out = Linear(width + inner, width, use_bias=False, **kw)
        self.heads = config.num_attention_heads
        self.widths = (width, width, width, inner, inner)

    def __call__(self, x: Tokens, rotation: rope.Rotation, *, kernel: str) -> Tokens:
        q, k, v, gate, values = self.to_qkv_mlp_proj.parts(x, self.widths)
        q, k, v = (to_heads(y, self.heads) for y in (q, k, v))
        q, k = prepared(q, self.norm_q, rotation), prepared(k, self.norm_k, rotation)
        out = from_heads(attention(q, k, v, kernel=kernel))
        return self.to_out(jnp.concatenate([out, activation("silu")(gate) * values], -1))


class SingleBlock(nnx.Module):
    """One stream, text then image."""

    def __init__(self, config: ModelConfig, **kw: Any):
        self.attn = ParallelAttention(config, **kw)
        self.eps = config.eps

    def __call__(self, x: Tokens, told: Any, *, kernel: str) -> Tokens:
        (shift, scale, gate), rotation = told
        normed = modulated_norm(x, shift, scale, self.eps)
        return x + gated(gate, self.attn(normed, rotation, kernel=kernel))


class TimeEmbedding(nnx.Module):
    def __init__(self, config: ModelConfig, **kw: Any):
        width, _ = _widths(config)
        self.channels = config.timestep_guidance_channels
        self.dtype = kw["dtype"]
        embedder = functools.partial(
            TimestepEmbedding, self.channels, width, "silu", use_bias=False, **kw
        )
        self.timestep_embedder = embedder()
        self.guided = config.guidance_embeds
        if self.guided:
            self.guidance_embedder = embedder()

    def __call__(self, sigma: Float[Array, " N"], guidance: Float[Array, " N"] | None) -> Row:
        embedded = self.timestep_embedder(self._wave(sigma))
        if self.guided and guidance is not None:
            embedded = embedded + self.guidance_embedder(self._wave(guidance))
        return embedded

    def _wave(self, values: Float[Array, " N"]) -> Row:
        return sinusoid(1000 * values, self.channels, True, 0).astype(self.dtype)


class Flux2Transformer2DModel(nnx.Module):
    """Predicts the velocity of noised, packed latents under text.

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
        _check(config)
        width, _ = _widths(config)
        kw: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.time_guidance_embed = TimeEmbedding(config, **kw)
        self.double_stream_modulation_img = Modulation(width, 6, use_bias=False, **kw)
        self.double_stream_modulation_txt = Modulation(width, 6, use_bias=False, **kw)
        self.single_stream_modulation = Modulation(width, 3, use_bias=False, **kw)
        self.x_embedder = Linear(config.in_channels, width, use_bias=False, **kw)
        self.context_embedder = Linear(config.joint_attention_dim, width, use_bias=False, **kw)
        doubles, singles = range(config.num_layers), range(config.num_single_layers)
        self.transformer_blocks = nnx.List(DoubleBlock(config, **kw) for _ in doubles)
        self.single_transformer_blocks = nnx.List(SingleBlock(config, **kw) for _ in singles)
        self.norm_out = Modulation(width, 2, use_bias=False, **kw)
        out = config.out_channels or config.in_channels
        self.proj_out = Linear(width, out, use_bias=False, **kw)

    def __call__(
        self,
        latents: Float[Array, "N H W C"],
        sigma: Shaped[Array, " N"] | Shaped[Array, ""],
        context: Float[Array, "N S E"],
        guidance: Float[Array, " N"] | None = None,
    ) -> Float[Array, "N H W O"]:
        """Predicts, in the compute dtype.

        Args:
            sigma: level of noise, in (0, 1].
            context: every position is attended to, padding too.
            guidance: scale that a model distilled with `guidance_embeds` was taught to follow.
        """
        n, height, width, _ = latents.shape
        sigma = jnp.broadcast_to(sigma, (n,)).astype(jnp.float32)
        embedded = self.time_guidance_embed(sigma, guidance)
        image, text, single = (
            modulation(embedded)
            for modulation in (
                self.double_stream_modulation_img,
                self.double_stream_modulation_txt,
                self.single_stream_modulation,
            )
        )
        words = context.shape[1]
        rotation = self._rotation(words, height, width)
        context = self.context_embedder(context.astype(self.dtype))
        x = self.x_embedder(latents.astype(self.dtype)).reshape(n, height * width, -1)
        how = by_block(self.execution)
        doubles, singles = list(self.transformer_blocks), list(self.single_transformer_blocks)
        x, context = apply_blocks(doubles, (x, context), (image, text, rotation), how)
        x = jnp.concatenate([context, x], axis=1)
        x = apply_blocks(singles, x, (single, rotation), how)[:, words:]
        scale, shift = self.norm_out(embedded)  # in this order
        x = self.proj_out(modulated_norm(x, shift, scale, self.config.eps))
        return x.reshape(n, height, width, -1)

    def _rotation(self, words: int, height: int, width: int) -> rope.Rotation:
        """Positions (time, row, column, place in the text): text first, then the image."""
        text = np.zeros((words, 4), np.int64)
        text[:, 3] = np.arange(words)
        image = np.zeros((height * width, 4), np.int64)
        image[:, 1], image[:, 2] = np.divmod(np.arange(height * width), width)
        places = np.concatenate([text, image])
        config = self.config
        return rope.pairs(rope.angles(places, config.axes_dims_rope, config.rope_theta))


def _widths(config: ModelConfig) -> tuple[int, int]:
    """Returns the widths of the tokens and of a feed-forward."""
    width = config.num_attention_heads * config.attention_head_dim
    return width, int(width * config.mlp_ratio)


def _check(config: ModelConfig) -> None:
    axes, head = config.axes_dims_rope, config.attention_head_dim
    if len(axes) != 4 or sum(axes) != head or any(width % 2 for width in axes):
        raise UserError(
            f"axes_dims_rope={list(axes)} must be four even numbers that add up to "
            f"attention_head_dim={head}"
        )
