"""Attention over tokens: queries and keys meet in float32, whatever the compute dtype."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    mask: Bool[Array, "T S"] | None = None,
    *,
    kernel: str = "plain",
) -> Float[Array, "B T N H"]:
    """softmax(q k / sqrt(H)) v over N heads; where mask is False nothing is seen."""
    # Heads before tokens: on CPU a batched product over adjacent axes is several times quicker.
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    scores = jnp.einsum("BNTH,BNSH->BNTS", query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask[None, None], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.swapaxes(jnp.einsum("BNTS,BNSH->BNTH", weights, value), 1, 2)
