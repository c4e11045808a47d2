"""Reads and writes adapters in the one file that diffusers' `load_lora_weights` takes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dmpo_jax import storage
from dmpo_jax.diffusers_io import placement, tensor_files
from dmpo_jax.diffusers_io.layout import to_jax, to_torch, torch_name
from dmpo_jax.errors import UserError
from dmpo_jax.parallel import processes

FILE = "pytorch_lora_weights.safetensors"


def save_lora(
    adapters: dict[str, Any],
    folder: epath.PathLike,
    *,
    scale: float | int,
    component: str = "unet",
) -> None:
    """Writes `folder/pytorch_lora_weights.safetensors` atomically, in float32.

    Every process must call it; process 0 writes.

    Args:
        adapters: by our paths, `....to_q.lora_A.kernel`.
        scale: alpha / rank, multiplied into B. The file states no alpha, so every program
            reads it with alpha = rank.
        component: of the pipeline, that the adapters belong to (`Family.component`).
    """
    folder, writes = epath.Path(folder), jax.process_index() == 0
    paths = {f"{component}.{torch_name(path)}": path for path in adapters}
    specs = {
        name: jax.ShapeDtypeStruct(to_torch(path, _blank(adapters[path])).shape, jnp.float32)
        for name, path in paths.items()
    }

    def produce(name: str) -> np.ndarray | None:
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


def load_lora(folder: epath.PathLike, *, component: str = "unet") -> dict[str, np.ndarray]:
    """Reads adapters as {our path: array}: the inverse of `save_lora`, with the scale left in B.

    Raises:
        ValueError: the file is missing, cannot be read, or holds tensors other than the
            component's adapters.
    """
    file = epath.Path(folder) / FILE
    if not file.exists():
        raise UserError(f"{file} is missing: is {folder} what a LoRA run wrote?")
    adapters = {}
    with tensor_files.opened({file: frozenset()}) as holders:
        for name, holder in holders.items():
            prefix = f"{component}."
            head, _, leaf = name.removeprefix(prefix).rpartition(".lora_")
            if not name.startswith(prefix) or leaf not in ("A.weight", "B.weight"):
                raise UserError(f"{file} holds {name!r}; only adapters of its {component} are read")
            path = f"{head}.lora_{leaf[0]}.kernel"
            whole = tuple((0, n) for n in holder.names[name])
            adapters[path] = to_jax(path, holder.read(name, whole))
    return adapters


def _blank(array: Any) -> np.ndarray:
    """Returns an array of the same shape that takes no memory."""
    return np.broadcast_to(np.float32(0), array.shape)
