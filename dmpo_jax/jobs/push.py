"""Sends an export to the Hugging Face hub, or lists what would be sent."""

import logging
from typing import Any

from etils import epath

from dmpo_jax.export import hub
from dmpo_jax.parallel import processes

LOG = logging.getLogger(__name__)


def push(*, out: epath.PathLike, repository: str, api: Any = None) -> str:
    """Sends the export in `out` to `repository` in one commit.

    Args:
        repository: ORG/NAME. It is made, private, if it is not there.
        api: of `hub.log_in`; None prints the files, their sizes and the card, and sends nothing.

    Returns:
        The repository's address; for None, what was printed.

    Raises:
        ValueError: `out` holds no complete export, or sending failed.
    """
    parcel = hub.pack(out, repository)
    if api is None:
        found = hub.described(parcel)
        print(found)
        LOG.info("nothing was sent: the same command without --push_dry_run sends it")
        return found
    total = sum(parcel.files.values())
    LOG.info("sending %d files, %.2f GB, to %s", len(parcel.files), total / 1e9, repository)
    with processes.writing(out, "push"):  # nothing may change while it is read
        address, private = hub.send(api, parcel)
    visible = "private; its settings there make it public" if private else "public"
    LOG.info("the export is at %s, which is %s", address, visible)
    return address
