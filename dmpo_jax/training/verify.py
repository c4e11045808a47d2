"""Verifies the checkpoints in a folder without knowing the run that wrote them."""

import collections
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dmpo_jax.training import checksums
from dmpo_jax.training.orbax_handler import array_registry


def verify_checkpoints(folder: epath.PathLike) -> Iterator[tuple[int, str]]:
    """Yields (step, fault) of each checkpoint, oldest first; the fault of a valid one is "".

    Every array is read, on the host, and compared with the checksum that it was saved with. Holds
    one checkpoint in memory.
    """
    folder = epath.Path(folder)
    for step in sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()):
        try:
            fault = _fault(folder / str(step))
        except Exception as error:  # Orbax, tensorstore and json raise many types
            fault = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
        yield step, fault


def _fault(folder: epath.Path) -> str:
    leaves = checksums.load_index(folder / "index")
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=array_registry())
    arrays = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), _tree(handler, folder)
    )
    state = handler.restore(folder / "state", args=ocp.args.PyTreeRestore(restore_args=arrays))
    # A list of leaves by name here, a tree of dicts there: equal are their contents.
    wanted = collections.Counter(
        (tuple(leaf["shape"]), leaf["dtype"], leaf["checksum"]) for leaf in leaves.values()
    )
    found = collections.Counter(
        (x.shape, str(x.dtype), int(checksums.checksum(x))) for x in jax.tree.leaves(state)
    )
    if wrong := wanted - found:
        shape, dtype, checksum = next(iter(wrong))
        names = [name for name, leaf in leaves.items() if leaf["checksum"] == checksum]
        return f"the values of {names[0]} ({dtype}{list(shape)}) are not those that were saved"
    return ""


def _tree(handler: Any, folder: epath.Path) -> Any:
    found = handler.metadata(folder / "state")
    return getattr(found, "tree", found)
