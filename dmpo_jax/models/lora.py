"""Low-rank adapters (LoRA): a kernel W becomes W + alpha / rank * A B, and only A, B train.

An adapted layer keeps its own names and gains two layers of its own kind, `lora_A` and
`lora_B`, as in PyTorch's peft: `to_q.kernel` stands beside `to_q.lora_A.kernel`. With its
adapters off, the model is the base itself, so a reference costs no second copy.

Source: LoRA, arXiv 2106.09685; huggingface/peft, tuners/lora/layer.py.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Key

from dmpo_jax.errors import UserError
from dmpo_jax.models.layers import Conv, Linear
from dmpo_jax.models.parameters import Params

# Path of DoRA's magnitudes below their layer's, [out]. Files are read with them, none are trained.
MAGNITUDE = "lora_magnitude"


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Low-rank adapters of a model: arguments of `attach`, and dropout.

    alpha: None is rank. dropout: of the adapters' input, in training. seed: of initial values.
    """

    rank: int
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    alpha: float | int | None = None
    dropout: float | int = 0.0
    seed: int = 0

    @property
    def scale(self) -> float:
        return (self.alpha or self.rank) / self.rank

    def attach(self, model: nnx.Module) -> Any:
        """Returns the model with these adapters. Raises as `attach`."""
        alpha = self.alpha or self.rank
        return attach(model, rank=self.rank, alpha=alpha, targets=self.targets, seed=self.seed)


def attach(
    model: nnx.Module, *, rank: int, alpha: float | int, targets: Sequence[str], seed: int
) -> Any:
    """Adds adapters to the layers that `targets` names; returns the model.

    Args:
        model: not modified, its arrays shared; it may hold shapes instead of arrays.
        rank: width of the adapters. alpha: their scale is alpha / rank.
        targets: suffixes of module paths, in complete parts: "to_q", "ff.net.2", "conv1".
        seed: of A, float32 and uniform within 1 / sqrt(fan in); B is zero, so that an
            adapted model starts as the base.

    Raises:
        ValueError: a target matches no linear layer or convolution.
    """
    adapted: Any = nnx.merge(*nnx.split(model))
    layers: dict[str, Any] = {
        ".".join(map(str, path)): layer
        for path, layer in nnx.iter_modules(adapted)
        if isinstance(layer, Linear | Conv)
    }
    names = [n for n in layers if any(f".{n}".endswith(f".{target}") for target in targets)]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            kinds = sorted({last_parts(name) for name in layers})
            raise UserError(f"no layer's path ends in {target!r}; there are {', '.join(kinds)}")
    for name in names:
        layer = layers[name]
        layer.lora_A, layer.lora_B = nnx.eval_shape(lambda layer=layer: _pair(layer, rank))
        layer.lora_scale = alpha / rank
        shape = layer.lora_A.kernel.shape
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        bound = np.prod(shape[:-1]) ** -0.5
        start = jnp.asarray(rng.uniform(-bound, bound, shape), jnp.float32)
        layer.lora_A.kernel = nnx.Param(start)
        layer.lora_B.kernel = nnx.Param(jnp.zeros(layer.lora_B.kernel.shape, jnp.float32))
    return adapted


def partition(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits an adapted model's parameters into (base, adapters)."""
    adapters = {path: x for path, x in params.items() if is_adapter(path)}
    return {path: x for path, x in params.items() if path not in adapters}, adapters


def _pair(layer: Any, rank: int) -> tuple[Any, Any]:
    """Returns an adapter's (A, B): A as the layer but to `rank` features, B up; no biases."""
    kw: Any = {"use_bias": False, "dtype": layer.dtype, "rngs": nnx.Rngs(0)}
    # Each splits over "tensor" what the layer itself does: its input features or its output.
    into: Any = {"split": "rows" if layer.split == "rows" else "whole", **kw}
    out: Any = {"split": "columns" if layer.split == "columns" else "whole", **kw}
    if isinstance(layer, Linear):
        down = Linear(layer.in_features, rank, **into)
        return down, Linear(rank, layer.out_features, **out)
    geometry = {"strides": layer.strides, "padding": layer.padding}
    down = Conv(layer.in_features, rank, layer.kernel_size, **geometry, **into)
    return down, Conv(rank, layer.out_features, (1, 1), **out)


def last_parts(name: str) -> str:
    """Returns the end of a path that names a layer's kind: `to_out.0`, `conv1`, `ff.net.2`."""
    parts = name.split(".")
    if not parts[-1].isdigit():
        return parts[-1]
    return ".".join(parts[-3:] if parts[-2] == "net" else parts[-2:])


def is_adapter(path: str) -> bool:
    return ".lora_A." in path or ".lora_B." in path


def switched_off(adapters: Params) -> Params:
    """Zeroes every B: the adapted model's program then computes the base's values.

    The base's own program would not do: XLA would fuse it differently, and beta turns last bits
    into margins. The barrier prevents XLA from seeing the zeros and removing the adapters.
    """
    zeros = {path: jnp.zeros_like(x) for path, x in adapters.items() if ".lora_B." in path}
    return {**adapters, **jax.lax.optimization_barrier(zeros)}


def drop(key: Key[Array, ""], adapters: Params, rate: float) -> Params:
    """Applies dropout to the input features of every A, scaled to keep expectations.

    peft drops single numbers. Here a feature is dropped for all tokens and images of the call,
    so that both images of a pair are compared under the same network.
    """
    downs = [path for path in adapters if ".lora_A." in path]
    widths = [adapters[path].shape[-2] for path in downs]
    kept = jax.random.bernoulli(key, 1 - rate, (sum(widths),)) / (1 - rate)
    parts = jnp.split(kept, np.cumsum(widths)[:-1])
    masks = {
        path: part.reshape(*(1,) * (adapters[path].ndim - 2), -1, 1)
        for path, part in zip(downs, parts, strict=True)
    }
    return {path: x * masks[path] if path in masks else x for path, x in adapters.items()}


def fold_in(params: Params, adapters: Params, scale: float | int) -> None:
    """Merges adapters into `params`, in place: W becomes W + scale * A B, in W's dtype.

    In place, so that a full-size model is never held twice. `scale` is alpha / rank. The product
    is computed in float32, at the highest precision. With DoRA's magnitudes each output's
    weights then get that norm (arXiv 2402.09353).
    """
    for path, down in adapters.items():
        if ".lora_A." not in path:
            continue
        name = path.removesuffix(".lora_A.kernel")
        kernel = params[f"{name}.kernel"]
        up = adapters[f"{name}.lora_B.kernel"].reshape(down.shape[-1], -1)
        change = jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)
        moved = kernel.astype(jnp.float32) + scale * change
        if (magnitude := adapters.get(f"{name}.{MAGNITUDE}")) is not None:
            norm = jnp.sqrt(jnp.square(moved).sum(tuple(range(moved.ndim - 1))))
            moved *= (magnitude / norm).reshape(*(1,) * (moved.ndim - 1), -1)
        params[f"{name}.kernel"] = moved.astype(kernel.dtype)
