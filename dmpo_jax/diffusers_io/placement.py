"""Transfers arrays between host and devices, one at a time: `place` and its inverse `gather`."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from dmpo_jax.diffusers_io.layout import Bounds


def place(
    shape: tuple[int, ...], sharding: Sharding | None, read: Callable[[Bounds], np.ndarray]
) -> jax.Array:
    """Builds a global array; this process reads only its devices' shards, each once.

    Args:
        sharding: None is the default device.
        read: (start, stop) of each axis -> that part of the array.
    """
    if sharding is None:
        return jax.device_put(read(tuple((0, n) for n in shape)))
    holders: dict[Bounds, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        parts = index or tuple(slice(n) for n in shape)
        bounds = tuple(s.indices(n)[:2] for s, n in zip(parts, shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    blocks = []
    for bounds, devices in holders.items():
        block = read(bounds)
        # An explicit transfer, which `jax_transfer_guard="disallow"` permits.
        blocks += jax.device_put([block] * len(devices), devices)
    return jax.make_array_from_single_device_arrays(shape, sharding, blocks)


def takes_all(array: Any) -> bool:
    """True if gathering requires every process: no process can address all parts."""
    apart = isinstance(array, jax.Array) and not array.is_fully_addressable
    return apart and not array.is_fully_replicated


def gather(array: Any) -> np.ndarray:
    """Returns the complete array on this host.

    If `takes_all`, every process must gather the same arrays in the same order.
    """
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    if takes_all(array):
        return multihost_utils.process_allgather(array, tiled=True)
    # An array caches its host copy, so a model gathered directly would stay in host memory.
    # An alias of the same buffers is dropped together with its copy.
    blocks = [shard.data for shard in array.addressable_shards]
    alias = jax.make_array_from_single_device_arrays(array.shape, array.sharding, blocks)
    return jax.device_get(alias)
