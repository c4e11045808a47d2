"""CLIP models as open_clip writes them: their tensors' names and their config.

Source: https://github.com/mlfoundations/open_clip (MIT), src/open_clip/{model,transformer}.py.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dmpo_jax.diffusers_io.layout import Bounds
from dmpo_jax.diffusers_io.tensor_files import TensorFile
from dmpo_jax.diffusers_io.weights import Files
from dmpo_jax.errors import UserError

CONFIG = "open_clip_config.json"
SIGN = "visual.conv1.weight"  # a file with this tensor has open_clip's names
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_FUSED = re.compile(r"attn\.in_proj_(weight|bias)")
_OUTSIDE = {  # of the blocks
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
# Matrices that multiply from the right; a linear layer's weight is the transpose.
_TRANSPOSED = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}
_IN_A_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
# Of old files: the causal mask, and sizes that the config states.
_DROPPED = ("attn_mask", "context_length", "input_resolution", "vocab_size")


class Part(NamedTuple):
    """Where a tensor lies in the file: in `name`, of its first axis a third, or transposed."""

    name: str
    third: int | None = None
    transposed: bool = False


class Renamed(TensorFile):
    """An open file whose tensors bear transformers' names."""

    def __init__(self, held: TensorFile, parts: Mapping[str, Part]):
        self.file, self._held, self._parts = held.file, held, dict(parts)
        self.names = {name: self._shape(part) for name, part in parts.items()}

    def _shape(self, part: Part) -> tuple[int, ...]:
        shape = self._held.names[part.name]
        if part.third is not None:
            return (shape[0] // 3, *shape[1:])
        return shape[::-1] if part.transposed else shape

    def read(self, name: str, bounds: Bounds) -> np.ndarray:
        part = self._parts[name]
        if part.transposed:
            return self._held.read(part.name, bounds[::-1]).T
        if part.third is not None:
            first = part.third * self.names[name][0]
            (start, stop), *rest = bounds
            bounds = ((first + start, first + stop), *rest)
        return self._held.read(part.name, bounds)

    def release(self) -> None:
        self._held.release()


def transformers_names(files: Files) -> Files:
    """Maps transformers' names to the tensors of a file with open_clip's; others are unchanged.

    Fused projections are split in three, and matrices of the other order transposed. A tensor
    that no rule knows keeps its name, so that the model refuses it.
    """
    if SIGN not in files:
        return files
    found: dict[str, TensorFile] = {}
    for held, group in itertools.groupby(files.items(), key=lambda item: item[1]):
        parts = {}
        for name, _ in group:
            parts |= _parts(name)
        renamed = Renamed(held, parts)
        found |= dict.fromkeys(parts, renamed)
    return found


def _parts(name: str) -> dict[str, Part]:
    """Returns transformers' names of an open_clip tensor."""
    if name in _DROPPED:
        return {}
    if name in _TRANSPOSED:
        return {_TRANSPOSED[name]: Part(name, transposed=True)}
    block = _BLOCK.fullmatch(name)
    if block is None:
        return {_OUTSIDE.get(name, name): Part(name)}
    tower = "vision_model" if block[1] else "text_model"
    layer = f"{tower}.encoder.layers.{block[2]}"
    if fused := _FUSED.fullmatch(block[3]):
        return {
            f"{layer}.self_attn.{which}_proj.{fused[1]}": Part(name, third=i)
            for i, which in enumerate("qkv")
        }
    module, _, leaf = block[3].rpartition(".")
    if module not in _IN_A_BLOCK:
        return {name: Part(name)}
    return {f"{layer}.{_IN_A_BLOCK[module]}.{leaf}": Part(name)}


_MODEL = {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}
_VISION = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}


def transformers_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config.json of a `CLIPModel` that open_clip_config.json describes.

    Raises:
        ValueError: naming each key that asks for another architecture, such as a ResNet's.
    """
    model = given.get("model_cfg") or {}
    vision, text = model.get("vision_cfg") or {}, model.get("text_cfg") or {}
    unknown = [
        key
        for known, found in ((_MODEL, model), (_VISION, vision), (_TEXT, text))
        for key in found.keys() - known
        if found[key] not in (None, False)
    ]
    numbers = [model.get("embed_dim"), *vision.values(), *text.values()]
    if unknown or not all(isinstance(value, int | float) for value in numbers if value is not None):
        asked = f"asks for {', '.join(sorted(unknown))}" if unknown else "is of no transformer"
        raise UserError(f"{CONFIG} {asked}; supported: CLIP of two plain transformers")
    act = "quick_gelu" if model.get("quick_gelu") else "gelu"
    wide, deep = vision.get("width", 768), text.get("width", 512)
    return {
        "projection_dim": model.get("embed_dim"),
        "vision_config": {
            "hidden_act": act,
            "hidden_size": wide,
            "image_size": vision.get("image_size", 224),
            "intermediate_size": int(wide * vision.get("mlp_ratio", 4.0)),
            "num_attention_heads": wide // vision.get("head_width", 64),
            "num_hidden_layers": vision.get("layers", 12),
            "patch_size": vision.get("patch_size", 16),
        },
        "text_config": {
            "eos_token_id": 2,  # the largest id of a prompt, as open_clip finds it
            "hidden_act": act,
            "hidden_size": deep,
            "intermediate_size": int(deep * text.get("mlp_ratio", 4.0)),
            "max_position_embeddings": text.get("context_length", 77),
            "num_attention_heads": text.get("heads", 8),
            "num_hidden_layers": text.get("layers", 12),
            "vocab_size": text.get("vocab_size", 49408),
        },
    }
