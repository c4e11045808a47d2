"""The device mesh, the sharding of arrays, and the transfer of batches to it.

Axes: "data" splits the batch alone; "fsdp" splits the batch and, on top, the large
parameters; "tensor" splits the features of attention, feed-forward and resnets, as in
Megatron (arXiv 1909.08053), if one pair does not fit a device. All are
`AxisType.Auto`; `parallel.placement` determines where a model gathers.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from dmpo_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
SHARDED_FROM = 2**18  # elements; below it, gathering costs more than the memory is worth

# End of a parameter's path -> how its layer splits it over "tensor"; the first match counts.
# "columns": each device has some output features. "rows": some input features, and a sum over
# "tensor" follows. "whole": every device has all of it. A layer's `split` has the same values.
RULES = (
    (r"(to_q|to_k|to_v|conv1|time_emb_proj)\.(lora_B\.)?kernel", "columns"),
    (r"(add_q_proj|add_k_proj|add_v_proj)\.(lora_B\.)?kernel", "columns"),
    (r"(to_out\.0|ff\.net\.2|conv2)\.(lora_A\.)?kernel", "rows"),
    (r"(to_add_out|ff_context\.net\.2)\.(lora_A\.)?kernel", "rows"),
    (r"feed_forward\.(w1|w3)\.(lora_B\.)?kernel", "columns"),
    (r"(linear_out|feed_forward\.w2)\.(lora_A\.)?kernel", "rows"),
    (r"", "whole"),
)


def split_cpu(count: int) -> None:
    """Splits the CPU into `count` devices; 1 leaves it as it is, and so does an accelerator.

    Raises:
        UserError: this process has used JAX already, on another number of CPU devices.
    """
    if count == 1:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX has its devices
        if jax.default_backend() == "cpu" and (found := jax.local_device_count()) != count:
            raise UserError(
                f"mesh.cpu_devices={count}, but this process has already used JAX with {found} CPU "
                f"device(s): call jax.config.update('jax_num_cpu_devices', {count}) before its "
                "first computation, or leave mesh.cpu_devices at 1"
            ) from None


def make_mesh(
    *, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Makes a `[data, fsdp, tensor]` mesh over all devices.

    Args:
        data, fsdp, tensor: devices along each axis; one may be -1 and takes the remaining
            devices. On several TPU slices, "data" spans the slices: the slow network between
            them then carries gradients only.
        devices: default `jax.devices()`. On TPU they are reordered to follow the torus, so
            row r of a batch need not lie on device r.

    Raises:
        ValueError: if the product is not the number of devices, or the slices do not
            divide data, naming the legal shapes.
    """
    devices = jax.devices() if devices is None else list(devices)
    count = len(devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    asked = {"data": data, "fsdp": fsdp, "tensor": tensor}
    refusal = _refusal(count, slices, asked)
    unknown = [axis for axis, size in asked.items() if size == -1]
    known = math.prod(size for size in asked.values() if size != -1)
    if len(unknown) > 1:
        raise UserError(f"at most one of {', '.join(AXES)} may be -1; {refusal}")
    if unknown and known > 0:
        asked[unknown[0]] = count // known
    shape = tuple(asked.values())
    if min(shape) < 1 or math.prod(shape) != count or shape[0] % slices:
        raise UserError(refusal)
    try:
        # Without the split, shapes that would divide an axis of the torus are refused.
        if slices > 1:
            inside, across = (shape[0] // slices, *shape[1:]), (slices, 1, 1)
            grid = mesh_utils.create_hybrid_device_mesh(
                inside, across, devices=devices, allow_split_physical_axes=True
            )
        else:
            grid = mesh_utils.create_device_mesh(
                shape, devices=devices, allow_split_physical_axes=True
            )
    except (NotImplementedError, AssertionError) as error:
        raise UserError(f"these devices cannot be laid out so; {refusal}") from error
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _refusal(count: int, slices: int, asked: Mapping[str, int]) -> str:
    """Returns the error message: the mesh requested, and the legal ones."""
    got = ", ".join(f"{axis}={size}" for axis, size in asked.items())
    tensor = asked["tensor"] if asked["tensor"] > 0 and count % asked["tensor"] == 0 else 1
    rest = count // tensor
    sizes = [f for f in range(1, rest + 1) if rest % f == 0 and rest // f % slices == 0]
    legal = ", ".join(f"({rest // f}, {f}, {tensor})" for f in sizes)
    over = f" in {slices} slices, which divide data" if slices > 1 else ""
    return (
        f"the mesh has {count} devices{over}, so (data, fsdp, tensor) is one of {legal}, or "
        f"another with the product {count}; got {got}"
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: rows (axis 0) over "data" and "fsdp"."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shares(mesh: Mesh) -> int:
    """Returns the number of shards of a batch: data * fsdp."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the replicated sharding."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_sharding(mesh: Mesh, params: Any) -> Any:
    """Returns one NamedSharding per leaf, by `RULES` and `stored_spec`.

    Args:
        params: any pytree of arrays or ShapeDtypeStructs, its leaves under the dotted
            paths of parameters: parameters, optimizer state, moving averages.
    """
    sizes = dict(mesh.shape)

    def rule(path: tuple, leaf: Any) -> NamedSharding:
        names = [key.key for key in path if isinstance(getattr(key, "key", None), str)]
        split = split_of(names[-1] if names else "")
        return NamedSharding(mesh, stored_spec(np.shape(leaf), split, sizes))

    return jax.tree_util.tree_map_with_path(rule, params)


def split_of(path: str) -> str:
    """Returns the split of the first of `RULES` that matches the end of the path."""
    return next(split for pattern, split in RULES if re.search(f"{pattern}$", path))


def stored_spec(shape: Sequence[int], split: str, sizes: Mapping[str, int]) -> PartitionSpec:
    """Returns the PartitionSpec of a stored leaf: large ones are sharded, small ones replicated.

    A leaf of two axes or more and at least 262,144 elements is split on its last axis (the
    output features of every kernel) if the devices divide it. "rows" are split over "tensor" on
    the axis before, as they are used.
    """
    fsdp, tensor = sizes.get("fsdp", 1), sizes.get("tensor", 1)
    if math.prod(shape) < SHARDED_FROM or len(shape) < 2:
        return PartitionSpec()
    if tensor > 1 and split == "rows" and shape[-2] % tensor == 0:
        last = "fsdp" if fsdp > 1 and shape[-1] % fsdp == 0 else None
        return PartitionSpec(*[None] * (len(shape) - 2), "tensor", last)
    # Columns are cut over "tensor" first, so that a gather over "fsdp" leaves them together.
    order = ("tensor", "fsdp") if split == "columns" else ("fsdp", "tensor")
    axes = tuple(axis for axis in order if sizes.get(axis, 1) > 1)
    while axes and shape[-1] % math.prod(sizes[axis] for axis in axes):
        axes = axes[:-1]
    if not axes:
        return PartitionSpec()
    return PartitionSpec(*[None] * (len(shape) - 1), axes[0] if len(axes) == 1 else axes)


def local_rows(sharding: Sharding, global_batch: int) -> np.ndarray:
    """Returns this process's rows of a global batch: int64, ascending, distinct.

    Rows come from the sharding, since meshes reorder devices: a process may hold rows 0-3, 12,
    13, 30 and 31. `shard_batch` expects them in ascending order.

    Raises:
        ValueError: if the devices cannot share global_batch rows evenly.
    """
    held = sharding.addressable_devices_indices_map((global_batch,)).values()
    spans = [np.arange(global_batch)[index] for index in held if index is not None]
    return np.unique(np.concatenate(spans))


def shard_batch(batch: Any, sharding: Sharding, global_batch: int) -> Any:
    """Makes global arrays from this process's rows. All data enters the mesh here.

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
        # device_put is an explicit transfer; make_array_from_callback is not, and
        # `jax_transfer_guard="disallow"` blocks it.
        return jax.make_array_from_single_device_arrays(
            shape, sharding, jax.device_put(blocks, devices)
        )

    return jax.tree.map(put, batch)


def check_batch(global_batch: int, accumulation: int, mesh: Mesh, group: int | None = None) -> None:
    """Raises ValueError unless devices, microbatches and groups divide the global batch.

    Args:
        group: consecutive rows that must lie on one device, in one microbatch; None: 1.

    Raises:
        ValueError: if accumulation is below 1, or global_batch is not a positive multiple of
            data * fsdp * accumulation * group, naming the nearest batch sizes that are.
    """
    if accumulation < 1:
        raise UserError(f"accumulation must be at least 1, but got {accumulation}")
    shares = batch_shares(mesh)
    unit = shares * accumulation * (group or 1)
    grouped = f" x groups of train.group={group} pairs" if group else ""
    if global_batch < 1 or global_batch % unit:
        below = max(global_batch // unit, 0) * unit
        nearest = " or ".join(str(n) for n in (below, below + unit) if n)
        raise UserError(
            f"a global batch must be a multiple of {unit} ({shares} devices x "
            f"{accumulation} microbatches{grouped}), but got {global_batch}; nearest: {nearest}"
        )
