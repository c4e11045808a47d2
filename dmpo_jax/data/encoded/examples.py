"""Reader and writer of TFDS records, tf.Example protos, for arrays of known shape.

`tfds` also reads them, ten times slower: 84 us a pair of SD1.5 against 9. Reading the pair's
bytes takes 150 us.
"""

from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

_EXAMPLE: Any = tf_example_pb2  # protobuf creates the modules' classes at import
_FEATURE: Any = tf_feature_pb2


def read_example(record: bytes, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a record by name.

    Args:
        arrays: the `ArraySpec` of each array that is stored as bytes; None or absent for other
            features.

    Returns:
        Arrays (read-only views, little endian as stored); bytes of other byte features; and
        lists of numbers.
    """
    values: dict[str, Any] = {}
    for name, feature in _EXAMPLE.Example.FromString(record).features.feature.items():
        kind = feature.WhichOneof("kind")
        value = getattr(feature, kind).value
        if kind == "bytes_list":
            value = value[0]
            if described := arrays.get(name):
                # A view of `value`, which is a copy, not of the proto.
                value = np.frombuffer(value, np.dtype(described.dtype))
                value = value.reshape(described.shape)
        values[name] = value
    return values


def write_example(values: Mapping[str, np.ndarray | bytes]) -> bytes:
    """Returns a record of bytes, and of arrays as their bytes. Inverse of `read_example`."""

    def feature(value: np.ndarray | bytes) -> Any:
        data = value if isinstance(value, bytes) else value.tobytes()
        return _FEATURE.Feature(bytes_list=_FEATURE.BytesList(value=[data]))

    features = {name: feature(value) for name, value in values.items()}
    example = _EXAMPLE.Example(features=_FEATURE.Features(feature=features))
    return example.SerializeToString(deterministic=True)
