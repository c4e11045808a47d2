"""Adafactor's second moments, factored over the axes that PyTorch's is.

optax has one that factors the two largest axes of an array, from 128 up. On convolutions its
updates point elsewhere than those of published runs.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

EPSILON = 1e-30  # added to squares
DECAY = -0.8


class FactoredState(NamedTuple):
    """Second moments: of factored arrays their means along each of two axes; 0 where unused."""

    count: Int[Array, ""]
    first: Any
    second: Any
    whole: Any


class _Moments(NamedTuple):
    update: Any
    first: Any
    second: Any
    whole: Any


def scale_by_factored_rms() -> optax.GradientTransformation:
    """Divides gradients by the root of factored second moments, of decay `1 - step**-0.8`.

    Factored are arrays of two axes and more, over what are the last two axes in PyTorch: of a
    convolution's kernel its height and width, which are the first two here.

    Source: Adafactor, arXiv 1804.04235; huggingface/transformers, optimization.Adafactor with
    scale_parameter=False, relative_step=False and beta1=None.
    """

    def init(params: Any) -> FactoredState:
        def means(axis: int) -> Any:
            return jax.tree.map(lambda x: jnp.zeros(_without(x, axis)), params)

        whole = jax.tree.map(lambda x: jnp.zeros(x.shape if x.ndim < 2 else (1,)), params)
        return FactoredState(jnp.zeros((), jnp.int32), means(0), means(1), whole)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, FactoredState]:
        del params
        count = state.count + 1
        decay = 1 - count.astype(jnp.float32) ** DECAY

        def one(grad: Array, first: Array, second: Array, whole: Array) -> _Moments:
            square = jnp.square(grad) + EPSILON
            if grad.ndim < 2:
                whole = decay * whole + (1 - decay) * square
                return _Moments(grad * jax.lax.rsqrt(whole), first, second, whole)
            a, b = _axes(grad)
            first = decay * first + (1 - decay) * square.mean(b)
            second = decay * second + (1 - decay) * square.mean(a)
            # a is before b: it is the same axis of what has lost b.
            share = jax.lax.rsqrt(first / first.mean(a, keepdims=True))
            scale = jnp.expand_dims(share, b) * jnp.expand_dims(jax.lax.rsqrt(second), a)
            return _Moments(grad * scale, first, second, whole)

        found = jax.tree.map(one, updates, state.first, state.second, state.whole)
        inner = jax.tree.structure(_Moments(*"0123"))
        parts = jax.tree.transpose(jax.tree.structure(updates), inner, found)
        return parts.update, FactoredState(count, parts.first, parts.second, parts.whole)

    return optax.GradientTransformation(init, update)


def _axes(x: Float[Any, "..."]) -> tuple[int, int]:
    return (0, 1) if x.ndim == 4 else (x.ndim - 2, x.ndim - 1)


def _without(x: Float[Any, "..."], which: int) -> tuple[int, ...]:
    """Shape of the means that keep the first (0) or the second (1) of the two axes."""
    if x.ndim < 2:
        return (1,)
    gone = _axes(x)[1 - which]
    return tuple(n for axis, n in enumerate(x.shape) if axis != gone)
