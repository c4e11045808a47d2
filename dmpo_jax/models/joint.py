"""Attention and modulation of flow transformers: one stream of tokens, or an image's and a text's.

Module names follow PyTorch diffusers.

Letters: N images, T image tokens, S text tokens, D width.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dmpo_jax.models import rope
from dmpo_jax.models.attention import attention
from dmpo_jax.models.layers import Linear, RMSNorm, activation

Tokens = Float[Array, "N T D"]
Words = Float[Array, "N S D"]
Row = Float[Array, "N D"]  # of an image, the same at every token


class Attention(nnx.Module):
    """Self-attention.

    Args:
        width: of the tokens. heads, head_width: of the attention.
        epsilon: of the norms of queries and keys, a head at a time; None: there are none.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        *,
        epsilon: float | None,
        use_bias: bool = True,
        **kw: Any,
    ):
        inner, self.heads, self.norms = heads * head_width, heads, epsilon is not None
        self.to_q, self.to_k, self.to_v = (
            Linear(width, inner, use_bias=use_bias, split="columns", **kw) for _ in "qkv"
        )
        self.to_out = nnx.List([Linear(inner, width, use_bias=use_bias, split="rows", **kw)])
        if epsilon is not None:
            self.norm_q, self.norm_k = (RMSNorm(head_width, epsilon=epsilon, **kw) for _ in "qk")

    def __call__(
        self,
        x: Tokens,
        rotation: rope.Rotation | None = None,
        lengths: Int[Array, " N"] | None = None,
        *,
        kernel: str,
    ) -> Tokens:
        """Attends to the first `lengths` tokens, or to all."""
        q, k, v = self.project(x, rotation)
        return self.to_out[0](from_heads(attention(q, k, v, lengths=lengths, kernel=kernel)))

    def project(self, x: Tokens, rotation: rope.Rotation | None) -> tuple[Array, Array, Array]:
        """Returns queries, keys and values [N, T, heads, width of a head]."""
        q, k, v = (to_heads(f(x), self.heads) for f in (self.to_q, self.to_k, self.to_v))
        norms = (self.norm_q, self.norm_k) if self.norms else (None, None)
        return prepared(q, norms[0], rotation), prepared(k, norms[1], rotation), v


class JointAttention(Attention):
    """Attention over the tokens of an image and its text, each with projections of its own.

    Args:
        text_first: order of the two in the sequence, by which models differ.
        last: the text's part is not needed, and has no projection out.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        *,
        epsilon: float | None,
        text_first: bool,
        last: bool = False,
        use_bias: bool = True,
        **kw: Any,
    ):
        super().__init__(width, heads, head_width, epsilon=epsilon, use_bias=use_bias, **kw)
        inner, self.text_first, self.last = heads * head_width, text_first, last
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (
            Linear(width, inner, use_bias=use_bias, split="columns", **kw) for _ in "qkv"
        )
        if not last:
            self.to_add_out = Linear(inner, width, use_bias=use_bias, split="rows", **kw)
        if epsilon is not None:
            self.norm_added_q, self.norm_added_k = (
                RMSNorm(head_width, epsilon=epsilon, **kw) for _ in "qk"
            )

    def joint(
        self, x: Tokens, words: Words, rotation: rope.Rotation | None = None, *, kernel: str
    ) -> tuple[Tokens, Any]:
        """Returns what the attention adds to the image, and to the text (None in the last block).

        Args:
            rotation: of both, in the sequence's order.
        """
        first = words.shape[1] if self.text_first else x.shape[1]
        turns = rope.parted(rotation, first) if rotation is not None else (None, None)
        of_words, of_image = turns if self.text_first else turns[::-1]
        parts = [self.project(x, of_image), self._project_words(words, of_words)]
        if self.text_first:
            parts.reverse()
        q, k, v = (jnp.concatenate(both, 1) for both in zip(*parts, strict=True))
        out = from_heads(attention(q, k, v, kernel=kernel))
        image, text = jnp.split(out, [first], axis=1)
        if self.text_first:
            image, text = text, image
        return self.to_out[0](image), None if self.last else self.to_add_out(text)

    def _project_words(
        self, words: Words, rotation: rope.Rotation | None
    ) -> tuple[Array, Array, Array]:
        added = self.add_q_proj, self.add_k_proj, self.add_v_proj
        q, k, v = (to_heads(f(words), self.heads) for f in added)
        norms = (self.norm_added_q, self.norm_added_k) if self.norms else (None, None)
        return prepared(q, norms[0], rotation), prepared(k, norms[1], rotation), v


class Modulation(nnx.Module):
    """Shifts, scales and gates, `count` rows in all, from the embedding of time."""

    def __init__(self, width: int, count: int, **kw: Any):
        self.linear = Linear(width, count * width, **kw)
        self.count = count

    def __call__(self, embedded: Row) -> list[Row]:
        return jnp.split(self.linear(activation("silu")(embedded)), self.count, axis=-1)


def to_heads(x: Tokens, heads: int) -> Float[Array, "N T heads width"]:
    """Splits features into heads."""
    return x.reshape(*x.shape[:2], heads, -1)


def from_heads(x: Float[Array, "N T heads width"]) -> Tokens:
    """Joins the heads' features."""
    return x.reshape(*x.shape[:2], -1)


def gated(gate: Row, x: Tokens) -> Tokens:
    """Multiplies every token by an image's row."""
    return gate[:, None] * x


def prepared(
    x: Float[Array, "N T heads width"],
    norm: Callable[[Array], Array] | None,
    rotation: rope.Rotation | None,
) -> Float[Array, "N T heads width"]:
    """Normalises and rotates queries or keys; the backward keeps only what is given."""

    def prepare(x: Array) -> Array:
        x = x if norm is None else norm(x)
        return x if rotation is None else rope.rotate_pairs(x, rotation)

    return jax.checkpoint(prepare)(x)
