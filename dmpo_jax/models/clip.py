"""CLIP's text encoders: CLIP-L of SD1.x, OpenCLIP H of SD2.x, both encoders of SDXL.

`vit` has the vision tower, of the same layers. Reference: transformers `CLIPTextModel`,
`CLIPTextModelWithProjection`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dmpo_jax.errors import UserError
from dmpo_jax.models.attention import attention
from dmpo_jax.models.component_config import ModelConfig
from dmpo_jax.models.layers import ACTIVATIONS, Embed, Linear, activation, layer_norm

KEYS = {
    "attention_dropout": 0.0,  # the towers are frozen: dropout never runs
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "hidden_act": "quick_gelu",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "num_attention_heads": 8,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 512,
    "vocab_size": 49408,
}
DEAD = frozenset(
    "dropout gradient_checkpointing initializer_factor initializer_range use_cache".split()
    # Generation defaults that transformers 4 wrote into every model's config.
    + """add_cross_attention bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder label2id
    length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores prefix
    problem_type pruned_heads remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p
    torchscript typical_p use_bfloat16""".split()
)


class TextOutput(NamedTuple):
    """Outputs of a text encoder.

    hidden_states: embeddings first, then one per layer, without the final layer norm.
    pooled: `text_embeds` of a tower with a projection, else `pooler_output`; None if the model
        has neither.
    """

    last_hidden_state: Float[Array, "N S D"]
    hidden_states: tuple[Float[Array, "N S D"], ...]
    pooled: Float[Array, "N P"] | None = None


class SelfAttention(nnx.Module):
    """causal: a token attends to itself and to those before it, as in text; else to all."""

    def __init__(self, width: int, heads: int, *, causal: bool, **kw: Any):
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            Linear(width, width, **kw) for _ in range(4)
        )
        self.heads, self.causal = heads, causal

    def __call__(self, x: Float[Array, "N S D"]) -> Float[Array, "N S D"]:
        q, k, v = (
            f(x).reshape(*x.shape[:2], self.heads, -1)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool)) if self.causal else None
        return self.out_proj(attention(q, k, v, mask).reshape(x.shape))


class MLP(nnx.Module):
    def __init__(self, config: ModelConfig, **kw: Any):
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, **kw)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, **kw)
        self.act = config.hidden_act

    def __call__(self, x: Float[Array, "N S D"]) -> Float[Array, "N S D"]:
        return self.fc2(activation(self.act)(self.fc1(x)))


class EncoderLayer(nnx.Module):
    def __init__(self, config: ModelConfig, *, causal: bool, **kw: Any):
        width, epsilon = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = layer_norm(width, epsilon, **kw)
        self.self_attn = SelfAttention(width, config.num_attention_heads, causal=causal, **kw)
        self.layer_norm2 = layer_norm(width, epsilon, **kw)
        self.mlp = MLP(config, **kw)

    def __call__(self, x: Float[Array, "N S D"]) -> Float[Array, "N S D"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nnx.Module):
    def __init__(self, config: ModelConfig, **kw: Any):
        width = config.hidden_size
        self.token_embedding = Embed(config.vocab_size, width, **kw)
        self.position_embedding = Embed(config.max_position_embeddings, width, **kw)

    def __call__(self, ids: Int[Array, "N S"]) -> Float[Array, "N S D"]:
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))[None]


class Layers(nnx.Module):
    def __init__(self, config: ModelConfig, *, causal: bool, **kw: Any):
        count = config.num_hidden_layers
        self.layers = nnx.List(EncoderLayer(config, causal=causal, **kw) for _ in range(count))


def checked_config(config: Any, keys: Mapping[str, Any]) -> ModelConfig:
    """Returns a tower's config; ValueError names each key whose value is not supported."""
    found = ModelConfig(config, keys, DEAD)
    if found.hidden_act not in ACTIVATIONS:
        raise UserError(f"hidden_act={found.hidden_act!r}; supported: {sorted(ACTIVATIONS)}")
    if found.hidden_size % found.num_attention_heads:
        raise UserError(
            f"num_attention_heads={found.num_attention_heads} must divide {found.hidden_size} "
            "channels"
        )
    return found


class TextTransformer(nnx.Module):
    def __init__(self, config: ModelConfig, **kw: Any):
        self.embeddings = Embeddings(config, **kw)
        self.encoder = Layers(config, causal=True, **kw)
        self.final_layer_norm = layer_norm(config.hidden_size, config.layer_norm_eps, **kw)


class CLIPTextModel(nnx.Module):
    """A text encoder; `projection=True` is CLIPTextModelWithProjection.

    Raises:
        ValueError: naming each config key whose value is not supported; on call, if a
            prompt is longer than the position embeddings.
    """

    def __init__(
        self,
        config: Any,
        *,
        projection: bool = False,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config = checked_config(config, KEYS)
        width = config.hidden_size
        kw: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.text_model = TextTransformer(config, **kw)
        if projection:
            self.text_projection = Linear(width, config.projection_dim, use_bias=False, **kw)
        self.projects = projection

    def __call__(self, ids: Int[Array, "N S"]) -> TextOutput:
        """Encodes token ids, padded as the folder's tokenizer pads them."""
        limit = self.config.max_position_embeddings
        if ids.shape[1] > limit:
            raise ValueError(f"prompts have {ids.shape[1]} tokens, this encoder takes {limit}")
        x = self.text_model.embeddings(ids)
        states = [x]
        for layer in self.text_model.encoder.layers:
            x = layer(x)
            states.append(x)
        last = self.text_model.final_layer_norm(x)
        # Configs from before transformers 4.30 say eos_token_id 2 while the tokenizer's
        # end token is the largest id of the vocabulary.
        eos = self.config.eos_token_id
        end = jnp.argmax(ids if eos == 2 else ids == eos, axis=-1)
        pooled = last[jnp.arange(ids.shape[0]), end]
        if self.projects:
            pooled = self.text_projection(pooled)
        return TextOutput(last, tuple(states), pooled)
