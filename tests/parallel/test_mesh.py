"""Tests for dmpo_jax/parallel/meshes.py, on eight fake devices."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dmpo_jax.errors import UserError
from dmpo_jax.parallel import meshes
from dmpo_jax.types import Condition, PairBatch
from tests.support import launched
from tests.support.meshes import PERMUTED, permuted_mesh, pretend_process


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        ({}, (8, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1)),
        ({"data": 2, "fsdp": -1}, (2, 4, 1)),
        ({"data": 1, "fsdp": 8}, (1, 8, 1)),
        ({"fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 1, "fsdp": 2, "tensor": -1}, (1, 2, 4)),
    ],
)
def test_make_mesh(asked, shape):
    mesh = meshes.make_mesh(**asked)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == shape
    assert mesh.axis_types == (AxisType.Auto,) * 3


def test_a_cpu_that_jax_has_begun_on_is_not_split_again():
    assert jax.local_device_count() == 8
    meshes.split_cpu(1)  # as it is
    meshes.split_cpu(8)
    with pytest.raises(UserError, match=r"mesh.cpu_devices=4, but .* with 8 CPU .* before its"):
        meshes.split_cpu(4)


@pytest.mark.parametrize(
    "asked",
    [
        {"data": -1, "fsdp": -1},
        {"fsdp": 3},
        {"data": 4, "fsdp": 4},
        {"data": 0},
        {"fsdp": 0},
        {"data": -1, "fsdp": -2},
        {"tensor": 3},
    ],
)
def test_make_mesh_refuses_and_names_legal_shapes(asked):
    legal = r"8 devices.*\(8, 1, 1\), \(4, 2, 1\), \(2, 4, 1\), \(1, 8, 1\)"
    with pytest.raises(ValueError, match=legal):
        meshes.make_mesh(**asked)
    with pytest.raises(ValueError, match=r"\(4, 1, 2\), \(2, 2, 2\), \(1, 4, 2\)"):
        meshes.make_mesh(data=3, tensor=2)


def slices(count: int, devices: int = 8) -> list:
    """Devices as those of several TPU slices look."""

    def device(i):
        of = {"slice_index": i // (devices // count), "process_index": 0, "platform": "cpu"}
        return mock.Mock(id=i, device_kind="fake", **of)

    return [device(i) for i in range(devices)]


def test_data_goes_over_the_slices():
    mesh = meshes.make_mesh(fsdp=4, devices=slices(2))
    index = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert index.shape == (2, 4, 1)
    assert (index == np.arange(2)[:, None, None]).all()
    with pytest.raises(ValueError, match=r"2 slices, which divide data.*\(2, 4, 1\); or|2 slices"):
        meshes.make_mesh(fsdp=8, devices=slices(2))


def test_parameter_sharding():
    mesh = meshes.make_mesh(data=2, fsdp=4)
    large, odd = jax.ShapeDtypeStruct((4, 256, 256), jnp.float32), np.zeros((2**17, 3))
    state = {"a.kernel": large, "opt": (odd, np.zeros((511, 512)), jnp.zeros(())), "none": None}
    specs = jax.tree.map(lambda s: s.spec, meshes.parameter_sharding(mesh, state))
    whole = PartitionSpec()
    assert specs == {
        "a.kernel": PartitionSpec(None, None, "fsdp"),
        "opt": (whole, whole, whole),
        "none": None,
    }
    alone = meshes.parameter_sharding(meshes.make_mesh(), state)
    assert all(s.is_fully_replicated for s in jax.tree.leaves(alone))
    assert meshes.replicated(mesh).is_fully_replicated


def test_parameters_are_cut_as_their_layers_use_them():
    """Optimizer moments like their parameters, whatever holds them."""
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    kernel = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    paths = {
        "attn1.to_q.kernel": PartitionSpec(None, ("tensor", "fsdp")),
        "attn1.to_out.0.kernel": PartitionSpec("tensor", "fsdp"),
        "ff.net.2.kernel": PartitionSpec("tensor", "fsdp"),
        "to_q.lora_B.kernel": PartitionSpec(None, ("tensor", "fsdp")),
        "to_q.lora_A.kernel": PartitionSpec(None, ("fsdp", "tensor")),
        "proj_in.kernel": PartitionSpec(None, ("fsdp", "tensor")),
    }
    params = dict.fromkeys(paths, kernel)
    tree = {"params": params, "moments": ({"mu": params}, 0)}
    got = jax.tree.map(lambda s: s.spec, meshes.parameter_sharding(mesh, tree))
    assert got["params"] == got["moments"][0]["mu"] == paths
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    # Where not all axes divide, the first that do.
    assert meshes.stored_spec((4096, 258), "whole", sizes) == PartitionSpec(None, "fsdp")


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_shard_batch_puts_row_r_in_global_row_r(shape):
    sharding = meshes.batch_sharding(permuted_mesh(*shape))
    rows = meshes.local_rows(sharding, 16)
    np.testing.assert_array_equal(rows, np.arange(16))
    moments = np.random.default_rng(0).normal(size=(16, 2, 4, 4, 8)).astype(np.float16)
    context = rows[:, None, None] * np.ones((1, 3, 5), np.float32)
    batch = PairBatch(moments, rows.astype(np.float32), Condition(context))
    with jax.transfer_guard("disallow"):
        out = meshes.shard_batch(batch, sharding, 16)
    assert out.condition.pooled is None
    assert out.moments.sharding.is_equivalent_to(sharding, 5)
    assert out.moments.dtype == jnp.float16
    jax.tree.map(np.testing.assert_array_equal, out, batch)
    for shard in out.preference.addressable_shards:  # on the very device the mesh names
        np.testing.assert_array_equal(shard.data, np.arange(16.0)[shard.index])
    first = next(s for s in out.preference.addressable_shards if s.index[0].start in (0, None))
    assert first.device.id == PERMUTED[0]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_the_rows_of_a_permuted_mesh(processes):
    sharding = meshes.batch_sharding(permuted_mesh())
    held = []
    for devices in np.array_split(np.array(jax.devices()), processes):
        rows = meshes.local_rows(pretend_process(sharding, list(devices)), 16)
        assert (np.diff(rows) > 0).all()
        held.append(rows)
    np.testing.assert_array_equal(np.sort(np.concatenate(held)), np.arange(16))
    if processes == 4:  # devices 0 and 1 stand at places 1 and 4 of the mesh
        np.testing.assert_array_equal(held[0], [2, 3, 8, 9])


def test_replicated_rows_are_held_once():
    sharding = NamedSharding(permuted_mesh(2, 4), PartitionSpec("data"))
    np.testing.assert_array_equal(meshes.local_rows(sharding, 6), np.arange(6))
    rows = np.arange(6)
    out = meshes.shard_batch(rows, sharding, 6)
    np.testing.assert_array_equal(out, rows)


@pytest.mark.parametrize("leaf", [np.zeros((7, 2)), np.zeros(())])
def test_shard_batch_refuses_wrong_rows(leaf):
    sharding = meshes.batch_sharding(meshes.make_mesh())
    with pytest.raises(ValueError, match="must have 8 rows"):
        meshes.shard_batch({"x": leaf}, sharding, 8)


def test_check_batch():
    mesh = meshes.make_mesh()
    meshes.check_batch(32, 4, mesh)
    meshes.check_batch(64, 4, mesh, 2)
    with pytest.raises(ValueError, match=r"of 64 .* x groups of train.group=2 pairs\), .* got 32"):
        meshes.check_batch(32, 4, mesh, 2)
    with pytest.raises(ValueError, match=r"multiple of 32 .*got 40; nearest: 32 or 64"):
        meshes.check_batch(40, 4, mesh)
    with pytest.raises(ValueError, match=r"nearest: 32$"):
        meshes.check_batch(8, 4, mesh)
    with pytest.raises(ValueError, match="at least 1"):
        meshes.check_batch(8, 0, mesh)


TWO_PROCESSES = """
import sys, jax, numpy as np
from jax.sharding import AxisType, Mesh
from dmpo_jax.parallel import meshes, processes
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
processes.join()
devices = sorted(jax.devices(), key=lambda d: d.id)
mesh = Mesh(np.array([devices[i] for i in (2, 0, 1, 3)]).reshape(2, 2, 1), meshes.AXES,
            axis_types=(AxisType.Auto,) * 3)
sharding = meshes.batch_sharding(mesh)
rows = meshes.local_rows(sharding, 8)
assert rows.tolist() == ([2, 3, 4, 5] if jax.process_index() == 0 else [0, 1, 6, 7]), rows
x = meshes.shard_batch(np.stack([rows, rows * 10], 1).astype(np.float32), sharding, 8)
whole = jax.jit(lambda a: a + 0, out_shardings=meshes.replicated(mesh))(x)
want = np.stack([np.arange(8), 10 * np.arange(8)], 1)
np.testing.assert_array_equal(whole.addressable_data(0), want)
"""


def test_two_real_processes_on_a_permuted_mesh():
    launched.run_script(TWO_PROCESSES)
