"""Converts a scorer's published pickle to a folder of safetensors."""

import logging

from etils import epath

from dmpo_jax.parallel import processes
from dmpo_jax.scoring.convert import convert_scorer as convert

LOG = logging.getLogger(__name__)


@processes.writes_out
def convert_scorer(*, scorer: str, out: epath.PathLike, like: str = "") -> epath.Path:
    """Writes the scorer `KIND:FILE` into `out`; returns `out`.

    Args:
        scorer: such as hpsv2:HPS_v2_compressed.pt, a file of PyTorch.
        like: a folder or hub id whose tokenizer to copy; for aesthetic, the CLIP-L model.

    Raises:
        ValueError: PyTorch is missing; the file would run code, or is not such a scorer's; `out`
            holds weights already; `like` lacks what is needed.
    """
    path = convert(scorer, out, like=like)
    LOG.info("the scorer is in %s: give it as --scorer=%s:%s", path, scorer.partition(":")[0], path)
    return path
