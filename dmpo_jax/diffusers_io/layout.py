"""Conversion between PyTorch's names and layouts and ours, and a table of older names."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Bounds = tuple[tuple[int, int], ...]  # (start, stop) of each axis: a hashable slice


class Legacy(NamedTuple):
    """Older tensor names of a folder: renamed on load, restored on save."""

    name: str
    applies: Callable[[set[str]], bool]
    load: Callable[[str], str]
    save: Callable[[str], str]


def _renamer(pairs: Mapping[str, str], scope: str) -> Callable[[str], str]:
    def rename(name: str) -> str:
        for old, new in pairs.items():
            name = re.sub(rf"({scope}){re.escape(old)}\.", rf"\g<1>{new}.", name)
        return name

    return rename


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_ATTENTION_SCOPE = r"mid_block\.attentions\.\d+\."
LEGACY = (
    Legacy(
        "vae_attention",
        lambda names: any(".attentions.0.proj_attn." in n for n in names),
        _renamer(_OLD_ATTENTION, _ATTENTION_SCOPE),
        _renamer({new: old for old, new in _OLD_ATTENTION.items()}, _ATTENTION_SCOPE),
    ),
    # transformers 5 writes CLIPTextModel without a prefix; all older folders have it.
    Legacy(
        "bare_text_model",
        lambda names: "final_layer_norm.weight" in names,
        lambda name: name if name.startswith("text_projection") else f"text_model.{name}",
        lambda name: name.removeprefix("text_model."),
    ),
    # A language model with its head, of which only the model itself is used.
    Legacy(
        "language_model",
        lambda names: "model.embed_tokens.weight" in names,
        lambda name: name.removeprefix("model."),
        lambda name: f"model.{name}",
    ),
)
BUFFERS = ("embeddings.position_ids",)  # stored by transformers < 4.31, holds 0, 1, 2, ...


def torch_name(path: str) -> str:
    """Returns the state-dict name of a parameter's path: `conv1.kernel` -> `conv1.weight`."""
    head, dot, leaf = path.rpartition(".")
    return f"{head}{dot}{'weight' if leaf in ('kernel', 'scale', 'embedding') else leaf}"


def torch_axes(path: str, ndim: int) -> tuple[int, ...]:
    """Returns our axis for each of PyTorch's axes: OIHW from HWIO, [out, in] from [in, out]."""
    if not path.endswith(".kernel"):
        return tuple(range(ndim))
    convolutions = {4: (3, 2, 0, 1), 5: (4, 3, 0, 1, 2)}
    return convolutions.get(ndim, tuple(reversed(range(ndim))))


def to_jax(path: str, tensor: np.ndarray) -> np.ndarray:
    """Converts PyTorch's layout to ours: OIHW to HWIO, [out, in] to [in, out], else unchanged."""
    return tensor.transpose(np.argsort(torch_axes(path, tensor.ndim)))


def to_torch(path: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_jax`."""
    return array.transpose(torch_axes(path, array.ndim))


def permuted(path: str, ours: Any) -> tuple[Any, ...]:
    """Permutes the shape, or the bounds, of our array to PyTorch's axis order."""
    return tuple(ours[axis] for axis in torch_axes(path, len(ours)))
