"""Convolutions, by the fastest method for the platform.

Letters: N images, H x W pixels in, h x w out, C channels in, D out, I x J the kernel's taps.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmpo_jax.parallel.placement import platform

# Output pixels over all images. Up to this many, XLA's CPU backend spends longer on changing
# the kernel's layout than a matrix product takes; above, the convolution is faster.
FEW_PIXELS = 256


def convolution(
    x: Float[Array, "N H W C"],
    kernel: Float[Array, "I J C D"],
    strides: tuple[int, int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = "VALID",
) -> Float[Array, "N h w D"]:
    """Convolves `x` with `kernel`, without a bias.

    On a CPU with few output pixels, this is a matrix product over the pixels under the kernel;
    otherwise XLA's convolution. The mesh set at trace time determines the platform, because a
    program may be compiled on a CPU for a TPU.

    Args:
        strides: down and across.
        padding: zeros (before, after), down and across; or "SAME" or "VALID".
    """
    if platform() == "cpu":
        n, *size = x.shape[:3]
        if isinstance(padding, str):
            padding = jax.lax.padtype_to_pads(size, kernel.shape[:2], strides, padding)
        axes = [_Axis(*each) for each in zip(size, kernel.shape[:2], strides, padding, strict=True)]
        if n * axes[0].out * axes[1].out <= FEW_PIXELS:
            return _as_product(x, kernel, *axes)
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


class _Axis:
    """The input pixels that each tap of the kernel reads, along one axis."""

    def __init__(self, size: int, taps: int, stride: int, pad: tuple[int, int]):
        self.pad, self.stride = pad, stride
        self.out = (size + sum(pad) - taps) // stride + 1
        # A tap that meets only padding adds nothing and is not read: on a map of one pixel,
        # eight of a 3 x 3 kernel's nine.
        starts = range(-pad[0], -pad[0] + self.out * stride, stride)
        meets = [any(0 <= start + tap < size for start in starts) for tap in range(taps)]
        self.taps = [tap for tap in range(taps) if meets[tap]]

    def under(self, tap: int) -> slice:
        """Indices of the padded pixels that `tap` reads, one for each output pixel."""
        return slice(tap, tap + (self.out - 1) * self.stride + 1, self.stride)


def _as_product(x: Array, kernel: Array, down: _Axis, across: _Axis) -> Array:
    padded = jnp.pad(x, ((0, 0), down.pad, across.pad, (0, 0)))
    pixels = [padded[:, down.under(i), across.under(j)] for i in down.taps for j in across.taps]
    rows = jnp.concatenate(pixels, -1)
    used = kernel[down.taps[0] : down.taps[-1] + 1, across.taps[0] : across.taps[-1] + 1]
    y = rows.reshape(-1, rows.shape[-1]) @ used.reshape(-1, kernel.shape[-1])
    return y.reshape(x.shape[0], down.out, across.out, -1)
