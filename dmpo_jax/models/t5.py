"""T5's encoder, version 1.1: the third text encoder of SD3.

Reference: transformers `T5EncoderModel`; arXiv 1910.10683.

Letters: N prompts, S tokens, D width, H heads.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dmpo_jax.models import clip
from dmpo_jax.models.clip import TextOutput
from dmpo_jax.models.component_config import ModelConfig, Only
from dmpo_jax.models.layers import Embed, Linear, RMSNorm, activation

KEYS = {
    "d_ff": 2048,
    "d_kv": 64,
    "d_model": 512,
    "dense_act_fn": Only("gelu_new"),
    "feed_forward_proj": Only("gated-gelu"),
    "is_gated_act": Only(True),
    "layer_norm_epsilon": 1e-6,
    "num_heads": 8,
    "num_layers": 6,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "vocab_size": 32128,
}
# Of the decoder, of dropout, which never runs, and of generation.
DEAD = clip.DEAD | frozenset(
    """classifier_dropout dropout_rate eos_token_id n_positions num_decoder_layers output_past
    pad_token_id scale_decoder_outputs""".split()
)


class SelfAttention(nnx.Module):
    """Attention with a bias by distance in place of positions, and without 1 / sqrt(width)."""

    def __init__(self, config: ModelConfig, *, first: bool, **kw: Any):
        inner = config.num_heads * config.d_kv
        self.q, self.k, self.v = (
            Linear(config.d_model, inner, use_bias=False, **kw) for _ in range(3)
        )
        self.o = Linear(inner, config.d_model, use_bias=False, **kw)
        if first:  # which holds the bias of all
            buckets = config.relative_attention_num_buckets
            self.relative_attention_bias = Embed(buckets, config.num_heads, **kw)
        self.heads = config.num_heads

    def __call__(
        self, x: Float[Array, "N S D"], bias: Float[Array, "1 H S S"]
    ) -> Float[Array, "N S D"]:
        q, k, v = (
            f(x).reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2)
            for f in (self.q, self.k, self.v)
        )
        scores = jnp.einsum("NHSE,NHTE->NHST", q, k, preferred_element_type=jnp.float32) + bias
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        heads = jnp.einsum("NHST,NHTE->NHSE", weights, v).swapaxes(1, 2)
        return self.o(heads.reshape(*x.shape[:2], -1))


class GatedFeedForward(nnx.Module):
    def __init__(self, config: ModelConfig, **kw: Any):
        width, inner = config.d_model, config.d_ff
        self.wi_0, self.wi_1 = (Linear(width, inner, use_bias=False, **kw) for _ in range(2))
        self.wo = Linear(inner, width, use_bias=False, **kw)

    def __call__(self, x: Float[Array, "N S D"]) -> Float[Array, "N S D"]:
        return self.wo(activation("gelu_tanh")(self.wi_0(x)) * self.wi_1(x))


class AttentionLayer(nnx.Module):
    def __init__(self, config: ModelConfig, *, first: bool, **kw: Any):
        self.SelfAttention = SelfAttention(config, first=first, **kw)
        self.layer_norm = RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, **kw)

    def __call__(self, x: Float[Array, "N S D"], bias: Array) -> Float[Array, "N S D"]:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class FeedForwardLayer(nnx.Module):
    def __init__(self, config: ModelConfig, **kw: Any):
        self.DenseReluDense = GatedFeedForward(config, **kw)
        self.layer_norm = RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, **kw)

    def __call__(self, x: Float[Array, "N S D"]) -> Float[Array, "N S D"]:
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nnx.Module):
    def __init__(self, config: ModelConfig, *, first: bool, **kw: Any):
        attend = AttentionLayer(config, first=first, **kw)
        self.layer = nnx.List([attend, FeedForwardLayer(config, **kw)])

    def __call__(self, x: Float[Array, "N S D"], bias: Array) -> Float[Array, "N S D"]:
        attend: Any = self.layer[0]
        feed: Any = self.layer[1]
        return feed(attend(x, bias))


class Stack(nnx.Module):
    def __init__(self, config: ModelConfig, **kw: Any):
        blocks = (Block(config, first=i == 0, **kw) for i in range(config.num_layers))
        self.block = nnx.List(blocks)
        self.final_layer_norm = RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, **kw)


class T5EncoderModel(nnx.Module):
    """A text encoder. Every position attends to every other, padding too.

    Raises:
        ValueError: naming each config key whose value is not supported.
    """

    def __init__(self, config: Any, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config = ModelConfig(config, KEYS, DEAD)
        kw: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.shared = Embed(config.vocab_size, config.d_model, **kw)
        self.encoder = Stack(config, **kw)

    @staticmethod
    def unused(name: str) -> bool:
        """True for a tensor of older folders that repeats another one."""
        return name == "encoder.embed_tokens.weight"

    def __call__(self, ids: Int[Array, "N S"]) -> TextOutput:
        """Encodes token ids, padded as the folder's tokenizer pads them. Nothing is pooled."""
        x = self.shared(ids)
        states = [x]
        first: Any = self.encoder.block[0].layer[0]
        table = first.SelfAttention.relative_attention_bias
        config = self.config
        apart = buckets(
            ids.shape[1],
            count=config.relative_attention_num_buckets,
            largest=config.relative_attention_max_distance,
        )
        bias = table(jnp.asarray(apart)).astype(jnp.float32).transpose(2, 0, 1)[None]
        for block in self.encoder.block:
            x = block(x, bias)
            states.append(x)
        last = self.encoder.final_layer_norm(x)
        return TextOutput(last, tuple(states), last[:, 0])


def buckets(tokens: int, *, count: int, largest: int) -> Int[np.ndarray, "S S"]:
    """Returns the bucket of the distance from each token (row) to each other (column).

    Half of the buckets are for tokens after. Of a half, the first half are single distances, the
    rest grow logarithmically up to `largest`, beyond which all share the last. By float32
    logarithms, as PyTorch: near a bound the bucket depends on them.
    """
    positions = np.arange(tokens)
    apart = positions[None] - positions[:, None]
    half = count // 2
    exact = half // 2
    away = np.abs(apart)
    steps = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact))
    steps = steps / np.float32(math.log(largest / exact)) * np.float32(half - exact)
    far = np.minimum(exact + steps.astype(np.int64), half - 1)
    return np.where(away < exact, away, far) + half * (apart > 0)
