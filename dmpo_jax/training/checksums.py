"""Names, shapes, dtypes and checksums of a checkpoint's leaves.

Orbax detects a truncated or missing file, but not a flipped bit in an array.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from dmpo_jax import storage
from dmpo_jax.errors import UserError


def abstract_leaf(x: Any) -> jax.ShapeDtypeStruct:
    if getattr(x, "sharding", None) is None:
        raise UserError(f"restore needs a sharding on every leaf of the state, but got {x}")
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def describe(state: Any) -> dict[str, dict]:
    """Returns {name: {"shape", "dtype"}} of every leaf, in the tree's order.

    A state is a NamedTuple; a dict of some of its fields gives them the same names.
    """
    if isinstance(state, dict):
        fields = [(f".{field}", tree) for field, tree in sorted(state.items())]
    else:
        fields = [("", state)]
    return {
        f"{prefix}{jax.tree_util.keystr(path)}": {"shape": list(x.shape), "dtype": str(x.dtype)}
        for prefix, tree in fields
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def check_same(step: int, saved: dict[str, dict], wanted: dict[str, dict]) -> None:
    """Raises ValueError if a checkpoint's leaves differ from the run's."""

    def shown(leaf):
        return f"{leaf['dtype']}{leaf['shape']}" if leaf else "nothing"

    differing = [
        f"{name}: the checkpoint has {shown(saved.get(name))}, the run {shown(wanted.get(name))}"
        for name in {**saved, **wanted}
        if any(
            saved.get(name, {}).get(k) != wanted.get(name, {}).get(k) for k in ("shape", "dtype")
        )
    ]
    if differing:
        more = f"\n  and {len(differing) - 8} more" if len(differing) > 8 else ""
        raise UserError(
            f"checkpoint {step} is valid, but does not match this run's state:\n  "
            + "\n  ".join(differing[:8])
            + f"{more}\nUse the model and optimizer it was saved with, or another --workdir."
        )


def make_index(leaves: dict[str, dict]) -> dict[str, Any]:
    """Returns the index that a checkpoint stores: its leaves, and a hash of them."""
    return {"leaves": leaves, "digest": storage.hash_json(leaves)}


def load_index(folder: epath.Path) -> dict[str, dict]:
    """Returns the leaves of a checkpoint's stored index; ValueError if they are damaged."""
    index = ocp.JsonCheckpointHandler().restore(folder)
    if index["digest"] != storage.hash_json(index["leaves"]):
        raise ValueError("its list of leaves is damaged")
    return index["leaves"]


def compute(state: Any) -> list[int]:
    """Returns one checksum per leaf, in the tree's order; the same under every sharding."""
    # One small program per distinct shape: a single one over all leaves compiles for minutes.
    return [int(x) for x in jax.device_get([checksum(x) for x in jax.tree.leaves(state)])]


@jax.jit
def checksum(x: jax.Array) -> jax.Array:
    """Returns a uint32 that is certain to change if any one element changes.

    Computed on the array's own devices: one pass over memory and no copy. It is a sum of
    wrapping integers, so neither the order of addition nor the sharding changes it.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = min(x.dtype.itemsize, 4)
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width])
    bits = bits.astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        stride = math.prod(bits.shape[axis + 1 :]) % 2**32
        iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        index = index + iota * jnp.uint32(stride)
    return _mix(bits + _mix(index)).sum(dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """Bijective mixing of uint32s (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
