"""Explicit sharding of a model's kernels and activations.

Left alone, the compiler moves activations to the parameters: it compiles a UNet with sharded
kernels to hundreds of all-to-alls and permutes. Here each device runs the model on its own
rows, and every layer gathers its kernel just before use. In the backward the same gather
becomes one reduce-scatter of its gradient. This is fully sharded data parallelism, as in ZeRO
(arXiv 1910.02054).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, PartitionSpec
from jaxtyping import Array

from dmpo_jax.parallel import meshes


def over_rows(predict: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """Wraps `predict(params, *rows)` so that each device computes its own rows.

    "data" and "fsdp" are manual inside, so that the only collectives are those of the layers.
    "tensor" is left to the compiler, under the layers' constraints (`split_over_tensor`).

    Args:
        predict: row by row: no row of its result may depend on another's.
        mesh: None returns `predict` as it is.
    """
    if mesh is None:
        return predict
    if mesh.size == 1:
        return _with_mesh(predict, mesh)
    manual = set(meshes.AXES if mesh.shape["tensor"] == 1 else meshes.BATCH_AXES)
    rows = PartitionSpec(meshes.BATCH_AXES)

    def spec(sharding: Any) -> PartitionSpec:
        axes = [axis if isinstance(axis, tuple) else (axis,) for axis in sharding.spec]
        held = [tuple(name for name in names if name in manual) for names in axes]
        return PartitionSpec(*[names or None for names in held])

    def placed(params: Any, *args: Any) -> Any:
        specs = jax.tree.map(spec, meshes.parameter_sharding(mesh, params))
        return jax.shard_map(
            predict,
            mesh=mesh,
            in_specs=(specs, *[rows] * len(args)),
            out_specs=rows,
            axis_names=manual,
            check_vma=False,  # Pallas calls do not declare over which axes results vary
        )(params, *args)

    return placed


def _with_mesh(predict: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Sets the mesh on one device: nothing is sharded, but `platform` needs it."""

    def placed(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return predict(*args)

    return placed


def platform() -> str:
    """Returns the platform that the traced program will run on: "cpu", "gpu" or "tpu".

    The mesh in force determines it, because a program may be compiled on a CPU for a TPU.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def gathered(kernel: Array, features: int, split: str) -> Array:
    """Gathers a kernel over "fsdp" for its layer; over "tensor" it stays sharded.

    Args:
        kernel: this device's shard, cut on the last axis, or the complete kernel.
        features: size of the complete kernel's last axis.
        split: "whole", "columns" (output features over "tensor") or "rows" (input features).
    """
    if kernel.shape[-1] < features:
        kernel = jax.lax.all_gather(kernel, "fsdp", axis=kernel.ndim - 1, tiled=True)
    axis = {"columns": -1, "rows": -2, "whole": None}[split]
    return kernel if axis is None else split_over_tensor(kernel, axis)


def looked_up(table: Array, ids: Array, features: int) -> Array:
    """Returns the rows `ids` of a table of embeddings, `[..., features]`.

    Args:
        table: complete, or this device's part, cut on the last axis over "fsdp". The table is then
            not gathered: each device looks up its features of all devices' ids, and gives each
            device those of its own. A vocabulary is larger than what is looked up.
        ids: this device's own, its rows on axis 0.
    """
    if table.shape[-1] == features:
        return jnp.take(table, ids, axis=0)
    everyones = jax.lax.all_gather(ids, "fsdp", axis=0, tiled=True)
    part = jnp.take(table, everyones, axis=0)
    return jax.lax.all_to_all(part, "fsdp", 0, part.ndim - 1, tiled=True)


def split_over_tensor(x: Array, axis: int) -> Array:
    """Shards an axis of `x` over "tensor", if that mesh axis has devices and divides it."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    size = mesh.shape["tensor"] if types.get("tensor") == AxisType.Auto else 1
    if size == 1 or x.shape[axis] % size:
        return x
    spec = ["tensor" if i == axis % x.ndim else None for i in range(x.ndim)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
