"""A model as (structure, parameters): the functional form that a jitted step takes."""

from typing import Any

import jax
from flax import nnx

Params = dict[str, jax.Array]  # "down_blocks.0.resnets.0.conv1.kernel" -> array


def split(model: nnx.Module) -> tuple[Any, Params]:
    """The model's static structure, and its arrays by dotted attribute path."""
    structure, state = nnx.split(model)
    flat = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}
    return structure, flat


def shapes(model: nnx.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Dotted path -> shape and dtype; works on a model that holds no arrays yet."""
    return {
        ".".join(map(str, path)): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in nnx.to_flat_state(nnx.state(model))
    }


def merge(structure: Any, params: Params) -> Any:
    """The inverse of `split`."""
    keyed = {
        tuple(int(part) if part.isdigit() else part for part in path.split(".")): leaf
        for path, leaf in params.items()
    }
    return nnx.merge(structure, nnx.from_flat_state(keyed))
