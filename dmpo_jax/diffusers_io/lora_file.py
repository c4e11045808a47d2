"""Reads and writes adapters in the one file that diffusers' `load_lora_weights` takes.

Its names are diffusers' or, of UNets, those of kohya's scripts (`kohya`), which ComfyUI reads too.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dmpo_jax import storage
from dmpo_jax.diffusers_io import kohya, placement, tensor_files
from dmpo_jax.diffusers_io.layout import to_jax, to_torch, torch_name
from dmpo_jax.errors import UserError
from dmpo_jax.models.lora import MAGNITUDE
from dmpo_jax.parallel import processes

FILE = "pytorch_lora_weights.safetensors"

KEYS = ("diffusers", "kohya")
SUFFIX = ".safetensors"
METADATA = "lora_adapter_metadata"  # key of the file's metadata: peft's config, as JSON
_SIDES = {
    **{"lora_A": "A", "lora_B": "B", "lora.down": "A", "lora.up": "B"},
    **{"lora_down": "A", "lora_up": "B"},
}
_OTHER = r"(?P<alpha>alpha)|(?P<dora>lora_magnitude_vector(\.weight)?|dora_scale)"
_NAME = re.compile(
    r"(?P<component>[^.]+)\.(?P<layer>.+)\."
    rf"((?P<side>lora_A|lora_B|lora\.down|lora\.up)\.weight|{_OTHER})"
)
_KOHYA_NAME = re.compile(
    rf"(?P<key>{kohya.PREFIX}[^.]+)\.((?P<side>lora_down|lora_up)\.weight|{_OTHER})"
)


def save_lora(
    adapters: dict[str, Any],
    folder: epath.PathLike,
    *,
    scale: float | int,
    component: str = "unet",
    keys: Mapping[str, str] | None = None,
) -> None:
    """Writes `folder/pytorch_lora_weights.safetensors` atomically, in float32.

    Every process must call it; process 0 writes.

    Args:
        adapters: by our paths, `....to_q.lora_A.kernel`.
        scale: alpha / rank, multiplied into B. Every program reads the file with alpha = rank:
            diffusers' keys state no alpha, kohya's this one.
        component: of the pipeline, that the adapters belong to (`Family.component`).
        keys: {layer: kohya's key}, of `kohya.written`; None writes diffusers' keys.
    """
    folder, writes = epath.Path(folder), jax.process_index() == 0
    paths = {_name(path, component, keys): path for path in adapters}
    specs = {
        name: jax.ShapeDtypeStruct(to_torch(path, _blank(adapters[path])).shape, jnp.float32)
        for name, path in paths.items()
    }
    alphas = {} if keys is None else _alphas(adapters, keys)
    specs |= {name: jax.ShapeDtypeStruct((), jnp.float32) for name in alphas}

    def produce(name: str) -> np.ndarray | None:
        if name in alphas:
            return np.asarray(alphas[name], np.float32)
        path = paths[name]
        if not writes and not placement.takes_all(adapters[path]):
            return None
        factor = np.float32(scale if ".lora_B." in path else 1)
        return to_torch(path, factor * placement.gather(adapters[path]).astype(np.float32))

    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        with storage.replacing(folder / FILE) as part:
            tensor_files.write(part, specs, produce)
    else:
        tensor_files.write(None, specs, produce)
    processes.barrier(f"saved {folder}")


def _name(path: str, component: str, keys: Mapping[str, str] | None) -> str:
    if keys is None:
        return f"{component}.{torch_name(path)}"
    layer, _, side = path.removesuffix(".kernel").partition(".lora_")
    return f"{keys[layer]}.lora_{'down' if side == 'A' else 'up'}.weight"


def _alphas(adapters: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, int]:
    """Returns {name of a layer's alpha: its rank}."""
    downs = {path: x for path, x in adapters.items() if ".lora_A." in path}
    return {f"{keys[path.partition('.lora_')[0]]}.alpha": x.shape[-1] for path, x in downs.items()}


def load_lora(
    folder: epath.PathLike, *, component: str = "unet", model: Any = None
) -> dict[str, np.ndarray]:
    """Reads adapters as {our path: float32 array}: the inverse of `save_lora`, the scale in B.

    Args:
        folder: what a LoRA run wrote, or the file itself. Names may be peft's (`lora_A.weight`),
            those of diffusers' scripts (`lora.down.weight`) or of kohya's (`lora_unet_...`); an
            alpha beside the weights, or in the file's metadata, is honoured. DoRA's magnitudes
            are `....to_q.lora_magnitude`, [out].
        model: that the file is for, or its shapes. Only kohya's names need it.

    Raises:
        ValueError: the file is missing, cannot be read, or holds tensors other than the
            component's adapters.
    """
    file = file_in(folder)
    if not file.exists():
        raise UserError(f"{file} is missing: is {folder} what a LoRA run wrote?")
    adapters, alphas = {}, {}
    with tensor_files.opened({file: frozenset()}) as holders:
        metadata = next((holder.metadata() for holder in holders.values()), {})
        places = _places(file, list(holders), component, model)
        for name, (layer, side) in places.items():
            holder = holders[name]
            array = holder.read(name, tuple((0, n) for n in holder.names[name]))
            if side is None:
                alphas[layer] = float(array.reshape(-1)[0])
                continue
            if side == MAGNITUDE:
                adapters[f"{layer}.{MAGNITUDE}"] = _magnitude(file, name, array)
                continue
            path = f"{layer}.lora_{side}.kernel"
            adapters[path] = np.asarray(to_jax(path, array), np.float32)
    _check_pairs(file, adapters, alphas)
    about = _peft_config(file, metadata)
    for path, array in adapters.items():
        if ".lora_B." in path:
            layer, rank = path.partition(".lora_")[0], array.shape[-2]
            scale = _scale(layer, rank, alphas, about, component)
            adapters[path] = array if scale == 1 else np.float32(scale) * array
    return adapters


def file_in(folder: epath.PathLike) -> epath.Path:
    """Returns the LoRA file of a folder; a file is itself."""
    path = epath.Path(folder)
    return path if path.suffix == SUFFIX else path / FILE


def check_layers(
    adapters: Mapping[str, np.ndarray],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    *,
    named: str,
    folder: epath.PathLike,
) -> None:
    """Raises UserError unless a model has each adapted layer, in the adapter's shape.

    Args:
        shapes: of the model's parameters.
        named: the option and the file, for messages. folder: the model's.
    """
    for path, down in adapters.items():
        if ".lora_A." not in path:
            continue
        layer = path.removesuffix(".lora_A.kernel")
        kernel = shapes.get(f"{layer}.kernel")
        up = adapters[f"{layer}.lora_B.kernel"]
        made = (*down.shape[:-1], up.shape[-1])
        if kernel is None or kernel.shape != made:
            has = "has no such layer" if kernel is None else f"has {kernel.shape}"
            raise UserError(
                f"{named} adapts the layer {layer}, {made}, but the model in {folder} {has}: take "
                "a LoRA file of this model"
            )


def _places(
    file: epath.Path, names: Sequence[str], component: str, model: Any
) -> dict[str, tuple[str, str | None]]:
    """Returns {name of a tensor: (layer, side of its adapter)}.

    The side of an alpha is None, that of DoRA's magnitudes MAGNITUDE.

    Raises:
        UserError: a name is none of the component's adapters; `load_lora`.
    """
    for name in names:
        if name.startswith(kohya.TEXT_PREFIXES):
            raise UserError(
                f"{file} holds {name!r}, an adapter of a text encoder; only adapters of its "
                f"{component} are read ({kohya.PREFIX}...): take a file without those of text "
                "encoders, or merge it into a pipeline and name that folder"
            )
    layers = {}
    if any(name.startswith(kohya.PREFIX) for name in names):
        layers = _of_kohya(file, component, model)
    places, taken = {}, set()
    for name in names:
        if found := _KOHYA_NAME.fullmatch(name):
            if found["key"] not in layers:
                raise UserError(
                    f"{file} adapts {found['key']!r}, a layer that the model does not have: take "
                    "a LoRA file of this model"
                )
            layer = layers[found["key"]]
        elif (found := _NAME.fullmatch(name)) and found["component"] == component:
            layer = found["layer"]
        else:
            raise UserError(f"{file} holds {name!r}; only adapters of its {component} are read")
        side = _SIDES[found["side"]] if found["side"] else None
        place = (layer, MAGNITUDE if found["dora"] else side)
        if place in taken:
            raise UserError(f"{file} holds the adapter of {layer} twice, by two names")
        taken.add(place)
        places[name] = place
    return places


def _of_kohya(file: epath.Path, component: str, model: Any) -> dict[str, str]:
    """Returns {kohya's key: layer} of a model."""
    said = f"{file} has kohya's keys ({kohya.PREFIX}...), which"
    if component != "unet":
        kind = f", a {type(model).__name__}" if model is not None else ""
        raise UserError(
            f"{said} are read for UNets (SD 1, SD 2, SDXL), but the model is a {component}{kind}: "
            "take a file in diffusers' keys"
        )
    if model is None:
        raise UserError(f"{said} name the layers of a model: pass load_lora(..., model=...)")
    return kohya.read(model)


def _magnitude(file: epath.Path, name: str, array: np.ndarray) -> np.ndarray:
    """Returns DoRA's magnitudes of a layer, [out].

    array: [out], [out, 1, ...] or, of peft's convolutions, [1, out, 1, 1].

    Raises:
        UserError: they are of the layer's inputs, [1, in], as LyCORIS may write them.
    """
    axis = 1 if "lora_magnitude_vector" in name and array.ndim > 2 else 0
    if array.ndim == 0 or array.shape[axis] != array.size:
        raise UserError(
            f"{file} holds {name!r} of shape {array.shape}; DoRA is read with one magnitude per "
            "output: merge the file into a pipeline with the program that made it"
        )
    return np.asarray(array.reshape(-1), np.float32)


def _check_pairs(file: epath.Path, adapters: Any, alphas: Any) -> None:
    """Raises UserError for half an adapter, for two sides of different rank, or for none at all."""
    layers = {path.partition(".lora_")[0] for path in adapters} | set(alphas)
    if not layers:
        raise UserError(f"{file} holds no adapters")
    for layer in sorted(layers):
        down, up = (adapters.get(f"{layer}.lora_{side}.kernel") for side in "AB")
        if down is None or up is None:
            raise UserError(f"{file} holds only a part of the adapter of {layer}: copy it again")
        if down.ndim != up.ndim or down.shape[-1] != up.shape[-2]:
            raise UserError(
                f"{file}: the sides of {layer}'s adapter do not fit each other: "
                f"{down.shape} and {up.shape}"
            )
        magnitude = adapters.get(f"{layer}.{MAGNITUDE}")
        if magnitude is not None and magnitude.size != up.shape[-1]:
            raise UserError(
                f"{file}: {layer} has {magnitude.size} magnitudes of DoRA for {up.shape[-1]} "
                "outputs: copy it again"
            )


def _peft_config(file: epath.Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns peft's config that a file's metadata holds; {} if there is none."""
    try:
        found = json.loads(metadata.get(METADATA) or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{file}: its metadata ({METADATA}) is not a JSON object: copy it anew")
    return found


def _scale(
    layer: str, rank: int, alphas: Mapping[str, float], about: Mapping[str, Any], component: str
) -> float:
    """Returns alpha / rank of a layer's adapter; 1 where the file states no alpha.

    about: `_peft_config`.

    Source: huggingface/diffusers, loaders/lora_base.py; huggingface/peft, tuners/lora/layer.py.
    """
    pattern = about.get(f"{component}.alpha_pattern") or {}
    patterned = [alpha for end, alpha in pattern.items() if f".{layer}".endswith(f".{end}")]
    alpha = alphas.get(layer, (patterned or [about.get(f"{component}.lora_alpha", rank)])[0])
    return alpha / (math.sqrt(rank) if about.get(f"{component}.use_rslora") else rank)


def _blank(array: Any) -> np.ndarray:
    """Returns an array of the same shape that takes no memory."""
    return np.broadcast_to(np.float32(0), array.shape)
