"""LoRA files that are merged into a pipeline's model, each by a factor."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from etils import epath

from dmpo_jax import storage
from dmpo_jax.diffusers_io import components, lora_file
from dmpo_jax.errors import UserError
from dmpo_jax.models import lora, parameters


class Lora(NamedTuple):
    """A LoRA file. scale: factor on its change of the weights, besides the file's own alpha.

    name: as given, for messages.
    """

    name: str
    file: epath.Path
    scale: float

    def about(self) -> dict[str, Any]:
        """Identity of the change that it makes."""
        return {"content": storage.sample_file(self.file), "scale": self.scale}


def parse_loras(named: str | Sequence[str]) -> tuple[Lora, ...]:
    """Parses `FILE` or `FILE:SCALE` of each; a file may be the folder of a LoRA run.

    Raises:
        ValueError: a file is missing, or a scale is not finite.
    """
    return tuple(map(_parse, [named] if isinstance(named, str) else named))


def _parse(name: str) -> Lora:
    path, _, end = name.rpartition(":")
    try:
        scale = float(end)
    except ValueError:  # a colon of the path's own, or none
        path, scale = name, 1.0
    if not path or not math.isfinite(scale):
        raise UserError(f"--lora={name} should be FILE or FILE:SCALE, SCALE a finite number")
    file = lora_file.file_in(path)
    if not file.is_file():
        raise UserError(f"--lora={name} should be a LoRA file, but {file} does not exist")
    return Lora(name, file, scale)


def check_loras(loras: Sequence[Lora], model: Any, folder: epath.PathLike) -> None:
    """Raises ValueError unless each file holds adapters of the model, or of its shapes.

    folder: the pipeline's.
    """
    for found in loras:
        _read(found, model, folder)


def merge_loras(
    loras: Sequence[Lora], params: parameters.Params, model: Any, folder: epath.PathLike
) -> None:
    """Merges files into a model's parameters, in place and in their order; dtypes are kept.

    model: its shapes. folder: the pipeline's.
    """
    for found in loras:
        adapters = {path: jnp.asarray(x) for path, x in _read(found, model, folder).items()}
        lora.fold_in(params, adapters, found.scale)


def _read(found: Lora, model: Any, folder: epath.PathLike) -> dict[str, Any]:
    _, family = components.load_family(folder)
    adapters = lora_file.load_lora(found.file, component=family.component, model=model)
    shapes = parameters.shapes(model)
    lora_file.check_layers(adapters, shapes, named=f"--lora={found.name}", folder=folder)
    return adapters
