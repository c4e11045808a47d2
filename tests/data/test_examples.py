"""The tf.Example codec, and records that TFDS or older versions wrote."""

import io
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from dmpo_jax.data.encoded import prompts as prompt_store
from dmpo_jax.data.encoded.examples import read_example, write_example
from dmpo_jax.data.encoded.pair import make_features

DTYPES = [np.float16, np.float32, ml_dtypes.bfloat16]


def described(array):
    return {"shape": list(array.shape), "dtype": array.dtype.name}


def assert_same(a, b):
    np.testing.assert_array_equal(a, b)
    assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(dtype):
    array = np.random.default_rng(0).normal(size=(3, 4)).astype(dtype)
    read = read_example(
        write_example({"x": array, "text": "ein Bär".encode(), "empty": b""}),
        {"x": described(array), "absent": None},
    )
    assert_same(read["x"], array)
    assert read["text"].decode() == "ein Bär"
    assert read["empty"] == b""


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_what_tfds_reads(dtype):
    rng = np.random.default_rng(0)
    pair: dict[str, Any] = {
        "id": "pair-0",
        "prompt": 3,
        "preference": 0.7,
        "sizes": np.arange(12, dtype=np.int32).reshape(2, 6),
        "moments": rng.normal(size=(2, 4, 6, 8)).astype(dtype),
        "flipped": rng.normal(size=(2, 4, 6, 8)).astype(dtype),
    }
    shapes = {name: described(pair[name]) for name in ("moments", "flipped")}
    features = make_features(shapes)
    record = features.serialize_example(pair)
    ours = read_example(record, shapes)
    theirs: Any = features.deserialize_example_np(record)
    assert set(ours) == set(theirs)
    for name in shapes:
        assert_same(ours[name], theirs[name])
    assert ours["id"] == theirs["id"]
    assert ours["prompt"][0] == theirs["prompt"]
    assert ours["preference"][0] == theirs["preference"]
    np.testing.assert_array_equal(ours["sizes"], theirs["sizes"].ravel())


@pytest.mark.parametrize("pooled", [True, False])
def test_prompts_of_format_1_are_read(tmp_path, pooled):
    """One file of npz records."""
    arrays: dict[str, Any] = {"context": np.full((3, 2), 0.5, np.float16)}
    if pooled:
        arrays["pooled"] = np.full(4, 2, np.float16)
    writer = ArrayRecordWriter(str(tmp_path / prompt_store.PROMPTS), "group_size:1")
    for text in ("", "ein Bär"):
        buffer = io.BytesIO()
        np.savez(buffer, **arrays, text=np.frombuffer(text.encode(), np.uint8))
        writer.write(buffer.getvalue())
    writer.close()
    shapes = {name: described(array) for name, array in arrays.items()}
    folder = epath.Path(tmp_path)
    store = prompt_store.PromptStore(folder, [], total=2, shapes={"pooled": None, **shapes})
    assert [prompt.text for prompt in store] == ["", "ein Bär"]
    assert_same(store[1].context, arrays["context"])
    assert (store[1].pooled is not None) == pooled
