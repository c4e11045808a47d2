"""safetensors as a stream: the library's bytes, one tensor in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors import safe_open
from safetensors.numpy import save as serialise
from safetensors.torch import load_file

from dmpo_jax import diffusers_io
from dmpo_jax.diffusers_io import tensor_files
from tests.support.model_folders import load, tiny_text, weight_file

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("chunk", [7, 64 * 2**20])
def test_a_streamed_file_is_the_library_s_own_to_the_byte(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "CHUNK_BYTES", chunk)
    rng = np.random.default_rng(0)
    tensors = {
        "b.weight": rng.normal(size=(3, 5)).astype(jnp.bfloat16),
        "a.weight": rng.normal(size=(3, 1, 2, 2)).astype(np.float16),
        "a.bias": rng.normal(size=3).astype(np.float32),
        "scale": np.float64(3.0),
        "naïve": np.zeros((0, 4), np.float32),
    }
    specs = {name: jax.ShapeDtypeStruct(t.shape, t.dtype) for name, t in tensors.items()}
    file = epath.Path(tmp_path / "ours.safetensors")
    tensor_files.write(file, specs, tensors.__getitem__)
    tensors["scale"] = np.asarray(tensors["scale"])
    assert file.read_bytes() == serialise(tensors, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"a is int8; .*float32.*choose with dtype="):
        tensor_files.write(file, {"a": jax.ShapeDtypeStruct((), np.int8)}, lambda name: None)


def test_one_tensor_is_held_while_a_file_is_written(tmp_path):
    """Each is asked for only after the one before it lies in the file."""
    spec = jax.ShapeDtypeStruct((64, 1024), np.float32)
    file, done = epath.Path(tmp_path / "x.safetensors"), []

    def produce(name):
        size = file.stat().length
        assert len(done) * spec.size * 4 <= size + 2**16, "what came before is not written yet"
        done.append(name)
        return np.full(spec.shape, len(done), spec.dtype)

    tensor_files.write(file, {f"t{i}": spec for i in range(8)}, produce)
    assert done == [f"t{i}" for i in range(8)]


def test_reading_lets_go_of_what_it_has_read(tmp_path, monkeypatch):
    """Pages of a mapped file count as memory: the mapping is dropped now and then."""
    diffusers_io.save_text_encoder(tiny_text(1.0), tmp_path)
    opened = []
    monkeypatch.setattr(
        tensor_files, "safe_open", lambda *a, **kw: opened.append(a) or safe_open(*a, **kw)
    )
    load("clip_l", tmp_path)
    assert len(opened) == 2  # its header, its data
    monkeypatch.setattr(tensor_files, "REOPEN_BYTES", 100)
    load("clip_l", tmp_path)
    size = sum(t.numel() * 4 for t in load_file(weight_file(tmp_path)).values())
    assert 4 <= len(opened) - 4 <= size / 100


def test_one_file_is_mapped_at_a_time(tmp_path, monkeypatch):
    """Each of many shards could otherwise keep its last pages."""
    diffusers_io.save_text_encoder(tiny_text(1.0), tmp_path, shard_bytes=1000)
    files = set()

    class Counted(tensor_files.TensorFile):
        def read(self, name, bounds):
            files.add(self)
            tensor = super().read(name, bounds)
            assert [f for f in files if f._handle is not None] == [self]
            return tensor

    monkeypatch.setattr(tensor_files, "TensorFile", Counted)
    load("clip_l", tmp_path)
    assert len(files) > 3
