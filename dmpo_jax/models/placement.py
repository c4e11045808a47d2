"""Where a model's kernels and activations lie on the mesh, said outright.

The compiler left alone moves activations to the parameters: it compiles a UNet with
sharded kernels to hundreds of all-to-alls and permutes. Here each device runs the model on
its own rows, and every layer gathers its kernel just before use; in the backward the same
gather turns round into one reduce-scatter of its gradient. Fully sharded data parallelism,
as in ZeRO (arXiv 1910.02054).
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, PartitionSpec
from jaxtyping import Array

from dmpo_jax import mesh as meshes

GATHERED = "gathered_kernel"  # under this name a remat policy finds them


def over_rows(predict: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """`predict(params, *rows)`, each device with its own rows of every array after the first.

    "data" and "fsdp" are manual inside, so that collectives are those of the layers and no
    others; "tensor" is the compiler's, within what the layers say of it (`split_over_tensor`).

    Args:
        predict: row by row: no row of its result may depend on another's.
        mesh: None or one device: `predict` as it is.
    """
    if mesh is None or mesh.size == 1:
        return predict
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
            check_vma=False,  # Pallas calls do not say over which axes their results vary
        )(params, *args)

    return placed


def _size(axis: str, kind: AxisType) -> int:
    """Of an axis of the mesh in force, where it is of this kind; else 1."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh.shape[axis] if types.get(axis) == kind else 1


def shards_parameters() -> bool:
    """Whether devices hold parts of parameters, so that they are gathered at use."""
    return _size("fsdp", AxisType.Manual) > 1


def gathered(kernel: Array, features: int, split: str) -> Array:
    """A kernel as its layer uses it: whole, or its share over "tensor".

    Args:
        kernel: this device's part of it, cut on the last axis, or all of it.
        features: of the whole kernel's last axis.
        split: "whole", "columns" (output features over "tensor") or "rows" (input features).
    """
    if kernel.shape[-1] < features:
        kernel = jax.lax.all_gather(kernel, "fsdp", axis=kernel.ndim - 1, tiled=True)
        kernel = checkpoint_name(kernel, GATHERED)
    axis = {"columns": -1, "rows": -2, "whole": None}[split]
    return kernel if axis is None else split_over_tensor(kernel, axis)


def split_over_tensor(x: Array, axis: int) -> Array:
    """`x`, with an axis shared over "tensor" where that is an axis of devices."""
    size = _size("tensor", AxisType.Auto)
    if size == 1 or x.shape[axis] % size:
        return x
    spec = ["tensor" if i == axis % x.ndim else None for i in range(x.ndim)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
