"""Converts one checkpoint file, as model sites distribute it, to a diffusers pipeline folder."""

import logging

from etils import epath

from dmpo_jax.export.single_file import convert_single_file
from dmpo_jax.parallel import processes

LOG = logging.getLogger(__name__)


@processes.writes_out
def single_file(*, file: epath.PathLike, out: epath.PathLike, like: str = "") -> epath.Path:
    """Writes the pipeline that `file` holds into `out`; returns `out`.

    Args:
        file: a .safetensors file in the original layout of its model's repository.
        like: a pipeline folder of the same architecture that provides the configs and
            tokenizers; "" lets diffusers fetch them from the hub.

    Raises:
        ValueError: PyTorch diffusers is missing; the file is a pickle or cannot be
            converted; `out` already holds a pipeline.
    """
    kind = convert_single_file(file, out, like=like)
    LOG.info("%s is in %s: give it as --model or --config.model.folder", kind, out)
    return epath.Path(out)
