"""Where kernels and activations lie on the mesh that a program is traced for.

The compiler left alone moves activations to the parameters: it compiles a UNet with
sharded kernels to hundreds of all-to-alls and permutes. So every layer says it outright:
its kernel is gathered just before use, its activations stay with their rows. Where no
mesh is set (`jax.sharding.use_abstract_mesh`), or it is of one device, nothing happens.
"""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from dmpo_jax import mesh as meshes

GATHERED = "gathered_kernel"  # under this name a remat policy finds them


def _mesh_sizes() -> dict[str, int]:
    """Axis -> size of the mesh in force; empty where there is nothing to place."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or any(t != AxisType.Auto for t in mesh.axis_types):
        return {}
    return dict(mesh.shape)


def shards_parameters() -> bool:
    """Whether devices hold parts of parameters, so that they are gathered at use."""
    sizes = _mesh_sizes()
    return sizes.get("fsdp", 1) * sizes.get("tensor", 1) > 1


def gathered(kernel: Array, split: str) -> Array:
    """The kernel as its layer uses it: whole, or its share over "tensor".

    Its cotangent is laid out as the parameter is stored, so that gradients are reduced
    and scattered in one collective instead of being summed whole on every device.

    Args:
        split: "whole", "columns" (output features over "tensor") or "rows" (input features).
    """
    sizes = _mesh_sizes()
    if not shards_parameters():
        return kernel
    stored = meshes.stored_spec(kernel.shape, split, sizes)
    used = meshes.used_spec(kernel.shape, split, sizes)
    return checkpoint_name(_relaid(kernel, used, stored), GATHERED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _relaid(kernel: Array, used: PartitionSpec, stored: PartitionSpec) -> Array:
    return jax.lax.with_sharding_constraint(kernel, used)


def _relaid_forward(kernel, used, stored):
    return _relaid(kernel, used, stored), None


def _relaid_backward(used, stored, _, cotangent):
    return (jax.lax.with_sharding_constraint(cotangent, stored),)


_relaid.defvjp(_relaid_forward, _relaid_backward)


def stored(leaf: Array, path: str) -> Array:
    """A parameter, or several stacked, kept in the parts that the rules cut for `path`."""
    if not shards_parameters():
        return leaf
    spec = meshes.stored_spec(leaf.shape, meshes.split_of(path), _mesh_sizes())
    return jax.lax.with_sharding_constraint(leaf, spec)


def pinned(x: Array, features: bool = False) -> Array:
    """Activations, rows over "data" and "fsdp"; `features`: the last axis over "tensor"."""
    sizes = _mesh_sizes()
    shares = sizes.get("data", 1) * sizes.get("fsdp", 1)
    if not sizes or x.shape[0] % shares:
        return x
    last = "tensor" if features and x.shape[-1] % sizes.get("tensor", 1) == 0 else None
    spec = PartitionSpec(meshes.BATCH_AXES, *[None] * (x.ndim - 2), last)
    return jax.lax.with_sharding_constraint(x, spec)
