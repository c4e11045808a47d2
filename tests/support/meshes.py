"""Meshes of permuted devices, and a process that holds only some of them."""

from unittest import mock

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from dmpo_jax.parallel import meshes

PERMUTED = [3, 0, 6, 5, 1, 7, 2, 4]


def permuted_mesh(data=8, fsdp=1):
    devices = np.array(jax.devices())[PERMUTED].reshape(data, fsdp, 1)
    return Mesh(devices, meshes.AXES, axis_types=(AxisType.Auto,) * 3)


def pretend_process(sharding, devices):
    """The sharding as a process sees it that holds only some of the devices."""
    view = mock.Mock(spec=NamedSharding)
    view.addressable_devices_indices_map.side_effect = lambda shape: {
        d: i for d, i in sharding.devices_indices_map(shape).items() if d in devices
    }
    return view
