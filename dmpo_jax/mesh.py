"""The device mesh, how arrays lie on it, and the one way in for a batch.

Axes: "data" splits the batch alone; "fsdp" splits the batch and, on top, the large
parameters. Both are `AxisType.Auto`: the compiler places the collectives.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

AXES = ("data", "fsdp")
SHARDED_FROM = 65536  # elements; below it, gathering costs more than the memory is worth


def make_mesh(*, data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A `[data, fsdp]` mesh over all devices.

    Args:
        data: devices along "data"; -1 takes what fsdp leaves.
        fsdp: devices along "fsdp"; -1 takes what data leaves. At most one is -1.
        devices: which devices; default `jax.devices()`. On TPU they are reordered to
            follow the torus, so row r of a batch need not lie on device r.

    Raises:
        ValueError: if data * fsdp is not the number of devices, naming the legal shapes.
    """
    devices = jax.devices() if devices is None else list(devices)
    count = len(devices)
    asked = f"data={data}, fsdp={fsdp}"
    legal = ", ".join(f"({count // f}, {f})" for f in range(1, count + 1) if count % f == 0)
    refusal = f"the mesh has {count} devices, so (data, fsdp) is one of {legal}; got {asked}"
    if data == fsdp == -1:
        raise ValueError(f"at most one of data and fsdp may be -1; {refusal}")
    if data == -1 and fsdp > 0:
        data = count // fsdp
    elif fsdp == -1 and data > 0:
        fsdp = count // data
    if min(data, fsdp) < 1 or data * fsdp != count:
        raise ValueError(refusal)
    try:
        # Without the split, shapes that do not fit the torus' axes whole are refused.
        grid = mesh_utils.create_device_mesh(
            (data, fsdp), devices=devices, allow_split_physical_axes=True
        )
    except (NotImplementedError, AssertionError) as error:
        raise ValueError(f"these devices cannot be laid out as {asked}; {refusal}") from error
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (axis 0) split over every device; other axes whole."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Everything on every device."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_sharding(mesh: Mesh, params: Any) -> Any:
    """One NamedSharding a leaf: large leaves split over "fsdp", the rest replicated.

    A leaf of at least 65,536 elements is split on its last axis where fsdp divides it.
    The last axis is the output features of every kernel, and never the stacking axis of
    scanned blocks.

    Args:
        params: any pytree of arrays or ShapeDtypeStructs: parameters, optimizer state.
    """
    fsdp = mesh.shape["fsdp"]

    def rule(leaf: Any) -> NamedSharding:
        shape = np.shape(leaf)
        if fsdp == 1 or math.prod(shape) < SHARDED_FROM or shape[-1] % fsdp:
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 1), "fsdp"))

    return jax.tree.map(rule, params)


def local_rows(sharding: Sharding, global_batch: int) -> np.ndarray:
    """The rows of a global batch that this process holds: int64, ascending, each once.

    Asked of the sharding, since meshes reorder devices: a process may hold rows 0-3, 12,
    13, 30 and 31. Ascending is the order in which `shard_batch` takes them.

    Raises:
        ValueError: if the devices cannot share global_batch rows evenly.
    """
    held = sharding.addressable_devices_indices_map((global_batch,)).values()
    spans = [np.arange(global_batch)[index] for index in held if index is not None]
    return np.unique(np.concatenate(spans))


def shard_batch(batch: Any, sharding: Sharding, global_batch: int) -> Any:
    """This process's rows -> global arrays. The only way in for data.

    Args:
        batch: pytree of numpy arrays whose row k is global row
            `local_rows(sharding, global_batch)[k]`. None leaves pass through.
        sharding: of the batch, from `batch_sharding`.
        global_batch: rows over all processes.

    Raises:
        ValueError: if a leaf does not have one row for each local row.
    """
    rows = local_rows(sharding, global_batch)

    def put(leaf: np.ndarray) -> jax.Array:
        if leaf.ndim < 1 or leaf.shape[0] != len(rows):
            raise ValueError(
                f"a batch leaf must have {len(rows)} rows, this process's share of "
                f"{global_batch}, but got shape {leaf.shape}"
            )

        shape = (global_batch, *leaf.shape[1:])
        blocks, devices = [], []
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            held = np.arange(global_batch)[index[0]] if index else rows
            # Positions are looked up, not computed: local rows need not be contiguous.
            start = int(np.searchsorted(rows, held[0]))
            blocks.append(leaf[start : start + len(held)])
            devices.append(device)
        # device_put is an explicit transfer; make_array_from_callback is none, and
        # `jax_transfer_guard="disallow"` stops it.
        return jax.make_array_from_single_device_arrays(
            shape, sharding, jax.device_put(blocks, devices)
        )

    return jax.tree.map(put, batch)


def check_batch(global_batch: int, accumulation: int, mesh: Mesh) -> None:
    """Refuses a batch that devices and microbatches cannot share evenly.

    Raises:
        ValueError: if global_batch is not a positive multiple of devices * accumulation,
            naming the nearest batch sizes that are.
    """
    if accumulation < 1:
        raise ValueError(f"accumulation must be at least 1, but got {accumulation}")
    unit = mesh.size * accumulation
    if global_batch < 1 or global_batch % unit:
        below = max(global_batch // unit, 0) * unit
        nearest = " or ".join(str(n) for n in (below, below + unit) if n)
        raise ValueError(
            f"a global batch must be a multiple of {unit} ({mesh.size} devices x "
            f"{accumulation} microbatches), but got {global_batch}; nearest: {nearest}"
        )
