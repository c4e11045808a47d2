"""Writes a page about raw pairs, to check them before hours of encoding."""

import logging

from etils import epath

from dmpo_jax.config.configs import Config
from dmpo_jax.inspection.look import inspect_source

LOG = logging.getLogger(__name__)


def inspect(config: Config, *, out: epath.PathLike) -> epath.Path:
    """Reads some pairs of data.source and writes `out/index.html`; returns its path.

    Raises:
        ValueError: data.source cannot be opened, or no row that was read is a pair.
    """
    data = config.data
    page = inspect_source(data.source, out, ties=data.ties, allow_outside=data.allow_outside)
    LOG.info("the pairs are shown in %s", page)
    return page
