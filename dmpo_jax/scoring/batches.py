"""Runs a model over any number of rows in batches of one size, so that it compiles once."""

from collections.abc import Callable

import jax
import numpy as np

BATCH = 8


def in_batches(run: Callable[..., jax.Array], *arrays: np.ndarray, size: int = BATCH) -> np.ndarray:
    """Returns run(*arrays), computed `size` rows at a time; the last batch is filled up.

    Products are of float32: by default a GPU or TPU would round their factors.

    Args:
        run: maps `size` rows of each array to as many rows.
        arrays: of equal length, at least 1.
    """
    found = []
    for start in range(0, len(arrays[0]), size):
        parts = [array[start : start + size] for array in arrays]
        short = size - len(parts[0])
        filled = [np.concatenate([p, np.repeat(p[-1:], short, 0)]) for p in parts]
        with jax.default_matmul_precision("highest"):
            found.append(np.asarray(run(*filled))[: len(parts[0])])
    return np.concatenate(found)
