"""Names of a UNet's layers in LoRA files as kohya's scripts write them.

A key is `lora_unet_`, a path and `.lora_down.weight`, `.lora_up.weight` or `.alpha`. Paths have
underscores for dots, so a key is looked up among the layers of the model that it is for.

Paths of SD 1 and SD 2 are diffusers' own. SDXL's are written as in Stability's repository: kohya's
scripts write them so, and diffusers, ComfyUI and kohya's scripts all read them. Both are read.

Source: kohya-ss/sd-scripts, networks/lora.py; huggingface/diffusers,
loaders/lora_conversion_utils.py; Stability-AI/generative-models, openaimodel.py.
"""

import re
from collections.abc import Collection, Iterator
from typing import Any

from dmpo_jax.models import parameters

PREFIX = "lora_unet_"
TEXT_PREFIXES = ("lora_te_", "lora_te1_", "lora_te2_")
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_INSIDE = re.compile(
    r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|\w+samplers)\.(\d+)\.(.+)"
)


def written(model: Any) -> dict[str, str]:
    """Returns {path of a layer: its key, without an end}. model: a UNet, or its shapes."""
    layers = _layers(model)
    if any(layer.startswith("add_embedding.") for layer in layers):  # SDXL
        return dict(_of_stability(layers))
    return {layer: _key(layer) for layer in layers}


def read(model: Any) -> dict[str, str]:
    """Returns {key without an end: path of its layer}, of SDXL in both spellings."""
    return {
        **{_key(layer): layer for layer in _layers(model)},
        **{key: layer for layer, key in written(model).items()},
    }


def _layers(model: Any) -> list[str]:
    ends = ".kernel"
    return [path.removesuffix(ends) for path in parameters.shapes(model) if path.endswith(ends)]


def _key(path: str) -> str:
    return PREFIX + path.replace(".", "_")


def _of_stability(layers: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yields (layer, key) by Stability's numbering: a block of layers and one resampler a level."""
    found = {layer: _INSIDE.fullmatch(layer) for layer in layers}
    first = [m for m in found.values() if m and m.group(1, 2, 3) == ("down", "0", "resnets")]
    level = len({m[4] for m in first}) + 1
    attended = {m.group(1, 2) for m in found.values() if m and m[3] == "attentions"}
    for layer, match in found.items():
        if match is None:
            yield layer, _key(_OUTSIDE[layer])
            continue
        side, block, kind, i, rest = match.groups()
        at = int(block or 0) * level + int(i)
        if kind == "resnets":
            rest = _RESNET[rest]
        inner = int(kind == "attentions")
        if side == "mid":
            yield layer, _key(f"middle_block.{2 * int(i) + inner}.{rest}")
        elif kind == "downsamplers":
            yield layer, _key(f"input_blocks.{at + level}.0.op")
        elif kind == "upsamplers":
            inner = 1 + ((side, block) in attended)
            yield layer, _key(f"output_blocks.{at + level - 1}.{inner}.{rest}")
        elif side == "down":
            yield layer, _key(f"input_blocks.{at + 1}.{inner}.{rest}")
        else:
            yield layer, _key(f"output_blocks.{at}.{inner}.{rest}")
