"""Models as (structure, parameters), the functional form of a jitted step."""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# "down_blocks.0.resnets.0.conv1.kernel" -> array. A frozen kernel may be a `quantised.Quantised`.
Params = dict[str, Any]


def split(model: nnx.Module) -> tuple[Any, dict[str, Any]]:
    """Splits a model into its static structure and {dotted path: array or shape}."""
    structure, state = nnx.split(model)
    flat = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
    return structure, flat


def shapes(model: nnx.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns dotted path -> shape and dtype; works on an abstract model too."""
    return {
        ".".join(map(str, path)): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in nnx.to_flat_state(nnx.state(model))
    }


def merge(structure: Any, params: Mapping[str, Any]) -> Any:
    """Rebuilds the model: the inverse of `split`. ShapeDtypeStructs give an abstract model."""
    keyed: Any = {
        tuple(int(part) if part.isdigit() else part for part in path.split(".")): leaf
        for path, leaf in params.items()
    }
    return nnx.merge(structure, nnx.from_flat_state(keyed))


def frozen_dtype(path: str, dtype: Any) -> Any:
    """Returns the smallest dtype that gives a model in `dtype` the same frozen parameter.

    Kernels, embeddings and their biases are cast to `dtype` before use and can be held in it;
    norms compute in float32. The program sees the same values either way.
    """
    module, _, leaf = path.rpartition(".")
    norm = leaf == "scale" or "norm" in module.rpartition(".")[2]
    return jnp.float32 if norm else dtype


class Buffer(nnx.Variable):
    """An array that a model loads and saves but does not train, such as a position table.

    Training keeps it in the reference, out of reach of gradient and weight decay.
    """


def buffer_paths(model: nnx.Module) -> frozenset[str]:
    """Dotted paths of the model's buffers."""
    state = nnx.to_flat_state(nnx.state(model))
    return frozenset(".".join(map(str, path)) for path, leaf in state if isinstance(leaf, Buffer))


def partition(
    model: nnx.Module, params: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits the model's arrays into (trained parameters, buffers)."""
    frozen = buffer_paths(model)
    buffers = {path: x for path, x in params.items() if path in frozen}
    return {path: x for path, x in params.items() if path not in frozen}, buffers


def completed(params: Mapping[str, Any], frozen: Mapping[str, Any] | None) -> dict[str, Any]:
    """Adds to trained parameters the frozen ones that they lack.

    Those are the base under adapters, and buffers.
    """
    return {**{path: x for path, x in (frozen or {}).items() if path not in params}, **params}


def without_arrays(model: nnx.Module) -> Any:
    """Replaces the model's arrays by their shapes and dtypes, which frees them."""
    structure, _ = nnx.split(model)
    return merge(structure, shapes(model))


class _ConstantKeys(nnx.Rngs):
    """Draws a fresh key per call from a Python counter.

    Under a trace, Flax's own JAX counter takes longer with every parameter, which adds up to
    minutes for SDXL (measured: 191 s against 2 s).
    """

    def __init__(self):
        super().__init__(0)
        self.drawn = 0

    def params(self) -> jax.Array:
        self.drawn += 1
        return jax.random.key(self.drawn)


def abstract(make: Callable[..., Any], config: Any, **kw: Any) -> Any:
    """Makes the model abstractly: ShapeDtypeStructs, nothing computed or compiled."""
    return merge(*_parts(make, json.dumps(config, default=dict), **kw))


@functools.lru_cache(maxsize=64)  # a model is made for its policy, its reference and its plan
def _parts(make: Callable[..., Any], config: str, **kw: Any) -> tuple[Any, dict[str, Any]]:
    return split(nnx.eval_shape(lambda: make(json.loads(config), rngs=_ConstantKeys(), **kw)))


def initialise(make: Callable[..., Any], config: dict, seed: int, **kw: Any) -> Any:
    """Makes the model with random float32 parameters, drawn by NumPy.

    Kernels are normal with deviation 1/sqrt(fan in), embeddings 0.02; norms and variances start
    at one, biases at zero. Drawing on the host compiles nothing, whereas a module's own
    initialisers compile a program for every shape.
    """
    model = abstract(make, config, **kw)
    rng = np.random.default_rng(seed)
    params = {}
    for path, leaf in shapes(model).items():
        kind = path.rpartition(".")[2]
        if kind == "kernel":
            value = rng.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        elif kind == "embedding":
            value = 0.02 * rng.standard_normal(leaf.shape)
        else:
            value = np.full(leaf.shape, 1.0 if kind in ("scale", "running_var") else 0.0)
        params[path] = jnp.asarray(value, leaf.dtype)
    return merge(nnx.split(model)[0], params)
