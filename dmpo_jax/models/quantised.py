"""Frozen kernels in int8: a quarter of float32's memory, half of bfloat16's.

Symmetric, one scale per output channel, rounded to nearest: W is values * scale, and the largest
number of a channel is 127 steps. A layer makes the kernel of these just before it uses it
(`layers`), so that only int8 is held, gathered and kept for the backward.

Plain rounding, as torchao's and quanto's int8 weights: at 8 bits, per channel, finer methods gain
little. Activations are not quantised.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dmpo_jax.models import parameters
from dmpo_jax.parallel import meshes

LARGEST = 127  # steps from 0; -128 is not used, so that the grid is symmetric
TINY = 2**10  # numbers; smaller kernels are not worth their scales


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A kernel `[..., D]` as int8 values of its shape and a float32 scale `[D]`.

    Stands in place of the kernel's array among a model's parameters; a pytree. Either may be a
    ShapeDtypeStruct.
    """

    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def dequantised(self, dtype: Any) -> Array:
        """Returns the kernel in `dtype`: values * scale in float32, then rounded once."""
        scale = self.scale.reshape((1,) * (self.values.ndim - 1) + (-1,))
        return (self.values.astype(jnp.float32) * scale).astype(dtype)


def quantise(kernel: Any) -> Quantised:
    """Rounds a kernel to int8, by output channel; each number moves by at most half a step.

    Computed in float32. A channel of zeros stays zero.
    """
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return jax.eval_shape(quantise, kernel)
    wide = kernel.astype(jnp.float32)
    axes = tuple(range(wide.ndim - 1))
    scale = jnp.abs(wide).max(axes, keepdims=True) / LARGEST
    steps = jnp.round(wide / jnp.where(scale == 0, 1, scale))
    values = jnp.clip(steps, -LARGEST, LARGEST).astype(jnp.int8)
    return Quantised(values, scale.reshape(-1))


@dataclasses.dataclass(frozen=True)
class Holding:
    """How frozen parameters are held.

    dtype: that the model computes in. int8: kernels are quantised, except those of fewer than
        `TINY` numbers and those of which a part of the path is in `sensitive`.
    """

    dtype: Any
    int8: bool = False
    sensitive: tuple[str, ...] = ()

    def read_as(self, path: str) -> Any:
        """Returns the dtype to read a frozen parameter in: float32 if it will be quantised."""
        return jnp.float32 if self._chosen(path) else parameters.frozen_dtype(path, self.dtype)

    def __call__(self, path: str, x: Any) -> Any:
        """Returns an array, a shape or a `Quantised` as it is held."""
        if isinstance(x, Quantised):
            return x
        if self._chosen(path) and x.size >= TINY:
            return quantise(x)
        dtype = parameters.frozen_dtype(path, self.dtype)
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=x.sharding)
        return jnp.asarray(x, dtype)

    def placed(self, path: str, x: Any) -> Any:
        """Returns an array as it is held, sharded as a parameter is (`meshes.parameter_sharding`).

        Compiles a small program for each shape that is quantised. Shapes stay shapes.
        """
        if isinstance(x, Quantised | jax.ShapeDtypeStruct):
            return self(path, x)
        held = self(path, jax.ShapeDtypeStruct(x.shape, x.dtype))
        if not isinstance(held, Quantised):
            return self(path, x)
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, jax.sharding.NamedSharding):
            mesh: Any = sharding.mesh  # of an array: with its devices
            sharding = meshes.parameter_sharding(mesh, {path: held})[path]
        return jax.jit(quantise, out_shardings=sharding)(x)

    def _chosen(self, path: str) -> bool:
        *modules, leaf = path.split(".")
        return self.int8 and leaf == "kernel" and not set(modules) & set(self.sensitive)
