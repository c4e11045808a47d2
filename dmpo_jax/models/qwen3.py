"""Qwen3's decoder as a text encoder: its residual stream after some of its layers.

Reference: transformers `Qwen3Model`, `Qwen3ForCausalLM`.

Letters: N prompts, S tokens, D width, A heads, H a head's width.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dmpo_jax.errors import UserError
from dmpo_jax.models import clip, rope
from dmpo_jax.models.attention import attention
from dmpo_jax.models.clip import TextOutput
from dmpo_jax.models.component_config import ModelConfig, Only
from dmpo_jax.models.layers import Embed, Linear, RMSNorm, activation

KEYS = {
    "attention_bias": Only(False),
    "head_dim": 128,
    "hidden_act": Only("silu"),
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "layer_types": None,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_parameters": None,
    "rope_scaling": Only(None),
    "rope_theta": None,  # before transformers 5 kept it in rope_parameters
    "use_sliding_window": Only(False),
    "vocab_size": 151936,
}
# The window is not in use; tokens and tied embeddings matter to generation alone.
DEAD = clip.DEAD | frozenset(
    "attention_dropout bos_token_id eos_token_id max_window_layers pad_token_id "
    "sliding_window".split()
)


class SelfAttention(nnx.Module):
    """Causal attention, several heads of queries to a head of keys."""

    def __init__(self, config: ModelConfig, **kw: Any):
        width, head = config.hidden_size, config.head_dim
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = Linear(width, heads * head, **kw)
        self.k_proj = Linear(width, shared * head, **kw)
        self.v_proj = Linear(width, shared * head, **kw)
        self.o_proj = Linear(heads * head, width, **kw)
        norm: Any = {"epsilon": config.rms_norm_eps, **_normed(kw)}
        self.q_norm, self.k_norm = RMSNorm(head, **norm), RMSNorm(head, **norm)
        self.head, self.groups = head, heads // shared

    def __call__(
        self, x: Float[Array, "N S D"], rotation: rope.Rotation, mask: Bool[Array, "N S S"]
    ) -> Float[Array, "N S D"]:
        q, k, v = (
            f(x).reshape(*x.shape[:2], -1, self.head)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = rope.rotate_halves(self.q_norm(q), rotation)
        k = rope.rotate_halves(self.k_norm(k), rotation)
        k, v = (jnp.repeat(y, self.groups, axis=2) for y in (k, v))
        return self.o_proj(attention(q, k, v, mask).reshape(*x.shape[:2], -1))


class MLP(nnx.Module):
    def __init__(self, config: ModelConfig, **kw: Any):
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = Linear(width, inner, **kw), Linear(width, inner, **kw)
        self.down_proj = Linear(inner, width, **kw)

    def __call__(self, x: Float[Array, "N S D"]) -> Float[Array, "N S D"]:
        return self.down_proj(activation("silu")(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    def __init__(self, config: ModelConfig, **kw: Any):
        norm: Any = {"epsilon": config.rms_norm_eps, **_normed(kw)}
        self.input_layernorm = RMSNorm(config.hidden_size, **norm)
        self.self_attn = SelfAttention(config, **kw)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, **norm)
        self.mlp = MLP(config, **kw)

    def __call__(
        self, x: Float[Array, "N S D"], rotation: rope.Rotation, mask: Bool[Array, "N S S"]
    ) -> Float[Array, "N S D"]:
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3Model(nnx.Module):
    """The decoder, without the head that predicts tokens.

    Args:
        layers: number of layers to build, from the first; negative counts from the last, -1 is
            all but one. None builds all, and the norm behind them.

    Raises:
        ValueError: naming each config key whose value is not supported.
    """

    def __init__(
        self,
        config: Any,
        *,
        layers: int | None = None,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config = ModelConfig(config, KEYS, DEAD)
        self.theta = _check(config)
        depth = config.num_hidden_layers
        kept = depth if layers is None else layers if layers >= 0 else depth + layers
        if not 0 < kept <= depth:
            raise UserError(f"num_hidden_layers={depth}, but {layers} layers are read: too few")
        kw: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs, "use_bias": False}
        embed = {name: x for name, x in kw.items() if name != "use_bias"}
        self.embed_tokens = Embed(config.vocab_size, config.hidden_size, **embed)
        self.layers = nnx.List(DecoderLayer(config, **kw) for _ in range(kept))
        self.complete = layers is None
        if self.complete:
            self.norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, **_normed(kw))

    def unused(self, name: str) -> bool:
        """True for tensors of a folder that no state which is returned needs."""
        head, _, rest = name.partition(".")
        deeper = head == "layers" and int(rest.partition(".")[0]) >= len(self.layers)
        behind = head == "norm" and not self.complete
        return deeper or behind or head == "lm_head" or name.endswith("rotary_emb.inv_freq")

    def __call__(
        self, ids: Int[Array, "N S"], valid: Int[Array, "N S"] | None = None
    ) -> TextOutput:
        """Returns the states after 0, 1, ... layers; `last_hidden_state` is the last of them.

        As in transformers, the state after the last layer of the model is normed.

        Args:
            valid: 0 at padding, which no token attends to then.
        """
        n, tokens = ids.shape
        places = np.arange(tokens).reshape(-1, 1)
        rotation = rope.halves(rope.angles(places, (self.config.head_dim,), self.theta))
        mask = jnp.tril(jnp.ones((1, tokens, tokens), bool))
        if valid is not None:
            mask = mask & (valid[:, None] != 0)
        mask = jnp.broadcast_to(mask, (n, tokens, tokens))
        x = self.embed_tokens(ids)
        states = [x]
        for layer in self.layers:
            x = layer(x, rotation, mask)
            states.append(x)
        if self.complete:
            states[-1] = self.norm(x)
        return TextOutput(states[-1], tuple(states), None)


def _normed(kw: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a norm, from those of a linear layer."""
    return {name: x for name, x in kw.items() if name != "use_bias"}


def _check(config: ModelConfig) -> float | int:
    """Checks what depends on several keys; returns the base of the rotary frequencies."""
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    if heads % shared:
        raise UserError(f"num_key_value_heads={shared} must divide num_attention_heads={heads}")
    if any(kind != "full_attention" for kind in config.layer_types or ()):
        raise UserError(f"layer_types={config.layer_types}; supported: full_attention alone")
    rotary = config.rope_parameters or {}
    kind = rotary.get("rope_type", "default")
    theta = rotary.get("rope_theta", config.rope_theta)
    if kind != "default":
        raise UserError(f"rope_parameters has rope_type={kind!r}; supported: default")
    return 10000.0 if theta is None else theta  # transformers' own default
