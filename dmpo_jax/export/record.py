"""The record of an export, `export.json` in its folder: which step's weights it holds."""

from typing import Any

import jax
from etils import epath

from dmpo_jax import diffusers_io, storage

FILE = "export.json"


def write_record(folder: epath.Path, *, step: int, ema: bool) -> None:
    """Writes the record of a complete export. ema: it holds the moving average."""
    if jax.process_index() == 0:
        about = {"step": step, "ema": ema, "weights": diffusers_io.digest_model(folder)}
        storage.write_json(folder / FILE, about)


def describe(folder: epath.PathLike, variant: str | None = None) -> dict[str, Any]:
    """Returns `weights`, a digest, and for a run's export its `step` and `ema`.

    folder: a pipeline, or its trained component's own. variant: of its weight files.
    """
    path = diffusers_io.find_folder(folder)
    found, weights = storage.find_json(path / FILE), diffusers_io.digest_model(path, variant)
    # The folder may have got other weights since.
    return found if found and found.get("weights") == weights else {"weights": weights}
