"""The tf.Example codec, and records that TFDS wrote."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dmpo_jax.data.encoded.examples import read_example, write_example
from dmpo_jax.data.encoded.meta import ArraySpec
from dmpo_jax.data.encoded.pair import make_features

DTYPES = [np.float16, np.float32, ml_dtypes.bfloat16]


def described(array):
    return ArraySpec(array.shape, array.dtype.name)


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
    arrays = {name: described(pair[name]) for name in ("moments", "flipped")}
    features = make_features({name: spec.to_json() for name, spec in arrays.items()})
    record = features.serialize_example(pair)
    ours = read_example(record, arrays)
    theirs: Any = features.deserialize_example_np(record)
    assert set(ours) == set(theirs)
    for name in arrays:
        assert_same(ours[name], theirs[name])
    assert ours["id"] == theirs["id"]
    assert ours["prompt"][0] == theirs["prompt"]
    assert ours["preference"][0] == theirs["preference"]
    np.testing.assert_array_equal(ours["sizes"], theirs["sizes"].ravel())
