"""Models straight onto meshes and from them, also of two processes."""

import json

import jax
import numpy as np
import pytest

from dmpo_jax.diffusers_io import placement, tensor_files
from dmpo_jax.models import parameters
from dmpo_jax.parallel import meshes
from tests.support import launched
from tests.support.model_folders import KINDS, assert_bitwise, load, reopen, save

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def split_everything(axes):
    """Shapes -> shardings over a (2, 4) mesh: each array's first axis, last axis, or both."""
    devices = meshes.make_mesh(data=2, fsdp=4)

    def rule(shape):
        names = {"first": ["fsdp"], "last": ["fsdp"], "both": ["fsdp", "data"]}[axes]
        spec: list[str | None] = [None] * len(shape)
        places = [len(shape) - 1, 0] if axes != "first" else [0]
        for place, name in zip(places[: len(shape)], names, strict=False):
            spec[place] = name if shape[place] % devices.shape[name] == 0 else None
        return jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec(*spec))

    return lambda shapes: {path: rule(spec.shape) for path, spec in shapes.items()}


@pytest.mark.long
@pytest.mark.parametrize("axes", ["first", "last", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_gets_the_same_bits_and_gives_them_back(kind, axes, tmp_path):
    """Convolutions, linear layers, norms and embeddings, cut along every side."""
    theirs = KINDS[kind][0]()
    theirs.save_pretrained(tmp_path / "in", max_shard_size="30KB")
    whole = parameters.split(load(kind, tmp_path / "in"))[1]
    sharding = split_everything(axes)
    with jax.transfer_guard("disallow"):
        ours = load(kind, tmp_path / "in", sharding=sharding)
    params = parameters.split(ours)[1]
    wanted = sharding(parameters.shapes(ours))
    assert sum(not x.is_fully_replicated for x in params.values()) > 10
    for path, array in params.items():
        assert array.sharding.is_equivalent_to(wanted[path], array.ndim)
        np.testing.assert_array_equal(array, whole[path])
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[path][shard.index])
    save(kind, ours, tmp_path / "out", shard_bytes=30_000)
    assert_bitwise(reopen(theirs, tmp_path / "out").state_dict(), theirs.state_dict())


def test_a_process_reads_only_what_its_devices_hold(tmp_path, monkeypatch):
    """Of each tensor the slices of its own devices, each once, however many hold it."""
    KINDS["unet"][0]().save_pretrained(tmp_path)
    read = tensor_files.TensorFile.read
    counts = []

    def counting(self, name, bounds):
        tensor = read(self, name, bounds)
        counts.append(tensor.size)
        return tensor

    monkeypatch.setattr(tensor_files.TensorFile, "read", counting)
    shapes = parameters.shapes(load("unet", tmp_path, abstract=True))
    total = sum(spec.size for spec in shapes.values())
    assert not counts
    load("unet", tmp_path, sharding=split_everything("both"))
    assert sum(counts) == total
    # One process of four: the first two devices of eight.
    everywhere = split_everything("last")
    addressed = jax.sharding.NamedSharding.addressable_devices_indices_map
    firsts = jax.devices()[:2]

    def of_the_first(self, shape):
        return {d: i for d, i in addressed(self, shape).items() if d in firsts}

    monkeypatch.setattr(jax.sharding.NamedSharding, "addressable_devices_indices_map", of_the_first)
    monkeypatch.setattr(
        jax, "make_array_from_single_device_arrays", lambda shape, s, blocks: blocks[0]
    )
    counts.clear()
    model = load("unet", tmp_path, sharding=everywhere)
    assert sum(counts) <= 0.55 * total, (sum(counts), total)  # two of four columns
    del model


def test_gathering_keeps_no_copy():
    """`device_get` of a sharded array would stay with the array: a whole model, on the host."""
    devices = meshes.make_mesh(data=1, fsdp=8)
    sharding = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec("fsdp"))
    array = jax.device_put(np.arange(16.0, dtype=np.float32), sharding)
    first = placement.gather(array)
    np.testing.assert_array_equal(first, np.arange(16))
    second = placement.gather(array)
    assert not np.shares_memory(first, second)
    assert np.shares_memory(jax.device_get(array), jax.device_get(array))  # what it must not do


TWO_PROCESSES = """
import functools, sys, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
from etils import epath
from dmpo_jax import diffusers_io
from dmpo_jax.parallel import meshes, processes
processes.join()
from dmpo_jax.diffusers_io import tensor_files
from dmpo_jax.models import parameters
source, out = epath.Path(sys.argv[1]), epath.Path(sys.argv[2])
meshes.SHARDED_FROM = 64
devices = meshes.make_mesh(data=1, fsdp=4)
read, counts = tensor_files.TensorFile.read, []
def counting(self, name, bounds):
    counts.append((read(self, name, bounds)).size)
    return read(self, name, bounds)
tensor_files.TensorFile.read = counting
placing = functools.partial(meshes.parameter_sharding, devices)
unet = diffusers_io.load_unet(source, sharding=placing)
params = parameters.split(unet)[1]
total = sum(x.size for x in params.values())
assert sum(counts) < 0.55 * total, (sum(counts), total)
assert sum(not x.is_fully_addressable and not x.is_fully_replicated for x in params.values()) > 20
moved = jax.jit(lambda p: {k: 2 * v for k, v in p.items()})(params)
if jax.process_index() == 1:
    def refuse(*args, **kw):
        raise AssertionError("only process 0 writes")
    for name in ("write_bytes", "write_text", "replace", "unlink", "mkdir", "copy"):
        setattr(type(out), name, refuse)
abstract = diffusers_io.load_unet(source, abstract=True)
diffusers_io.save_pipeline(abstract, source, out, params=moved, shard_bytes=30_000)
assert (out / "model_index.json").exists()
"""


@pytest.mark.long
def test_two_real_processes_load_their_slices_and_save_together(tmp_path):
    theirs = KINDS["unet"][0]()
    theirs.save_pretrained(tmp_path / "in" / "unet")
    index = {"_class_name": "StableDiffusionPipeline"}
    (tmp_path / "in" / "model_index.json").write_text(json.dumps(index))
    launched.run_script(TWO_PROCESSES, tmp_path / "in", tmp_path / "out")
    want = {k: 2 * v for k, v in theirs.state_dict().items()}
    assert_bitwise(reopen(theirs, tmp_path / "out" / "unet").state_dict(), want)
    assert len(list((tmp_path / "out" / "unet").glob("*.safetensors"))) > 2
