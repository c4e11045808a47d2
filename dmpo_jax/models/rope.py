"""Rotary positions: queries and keys are rotated by angles that grow with their position.

Source: RoFormer, arXiv 2104.09864; with several axes as in FLUX.

Letters: N images or prompts, T tokens, A heads, H a head's width, P axes of a position.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped


class Rotation(NamedTuple):
    """Factors of a feature and of its partner, for every token; 1 for N if images share them.

    Of a pair (a, b) rotated by t, a becomes a cos t - b sin t, b becomes b cos t + a sin t.
    """

    own: Float[Any, "N T 1 H"]
    partner: Float[Any, "N T 1 H"]


def angles(
    positions: Shaped[np.ndarray, "T P"], widths: Sequence[int], theta: float | int
) -> Float[np.ndarray, "T half"]:
    """Returns angles in float64, one for each pair of features: those of the first axis first.

    Args:
        widths: number of features that each axis of a position rotates; all are even.
        theta: base of the frequencies, theta^(-2 i / width).
    """
    found = []
    for axis, width in enumerate(widths):
        frequencies = float(theta) ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        found.append(np.outer(positions[:, axis].astype(np.float64), frequencies))
    return np.concatenate(found, axis=-1)


def pairs(angles: Float[np.ndarray, "T half"]) -> Rotation:
    """Returns the rotation of neighbours: features 2 i and 2 i + 1 are a pair."""
    cos, sin = _factors(angles)
    return _rotation(np.stack([cos, cos], -1), np.stack([-sin, sin], -1))


def halves(angles: Float[np.ndarray, "T half"]) -> Rotation:
    """Returns the rotation of halves: features i and i + H / 2 are a pair."""
    cos, sin = _factors(angles)
    return _rotation(np.concatenate([cos, cos], -1), np.concatenate([-sin, sin], -1))


def _factors(angles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _rotation(own: np.ndarray, partner: np.ndarray) -> Rotation:
    tokens = len(own)
    return Rotation(own.reshape(1, tokens, 1, -1), partner.reshape(1, tokens, 1, -1))


def parted(rotation: Rotation, tokens: int) -> tuple[Rotation, Rotation]:
    """Returns the rotation of the first `tokens`, and that of the others."""
    own, partner = rotation
    return (
        Rotation(own[:, :tokens], partner[:, :tokens]),
        Rotation(own[:, tokens:], partner[:, tokens:]),
    )


def rotate_pairs(x: Float[Array, "N T A H"], rotation: Rotation) -> Float[Array, "N T A H"]:
    """Rotates neighbours, in float32."""

    def swapped(x: Array) -> Array:
        # By shifts: an axis of two would be padded to the 128 lanes of a TPU.
        even = (jnp.arange(x.shape[-1]) % 2 == 0).reshape(1, 1, 1, -1)
        return jnp.where(even, jnp.roll(x, -1, -1), jnp.roll(x, 1, -1))

    return _rotate(x, rotation, swapped)


def rotate_halves(x: Float[Array, "N T A H"], rotation: Rotation) -> Float[Array, "N T A H"]:
    """Rotates halves, in float32."""
    return _rotate(x, rotation, lambda x: jnp.roll(x, x.shape[-1] // 2, -1))


def _rotate(x: Array, rotation: Rotation, swapped: Any) -> Array:
    own, partner = map(jnp.asarray, rotation)
    wide = x.astype(jnp.float32)
    return (_product(wide, own) + _product(swapped(wide), partner)).astype(x.dtype)


def _product(a: Array, b: Array) -> Array:
    # Less its last bit, so that no compiler joins it and the sum into one rounding: which of the
    # two products it took would differ between programs, and a policy from itself as reference.
    return jax.lax.reduce_precision(a * b, exponent_bits=8, mantissa_bits=22)
