"""Sources of raw pairs. Every source yields `RawPair`.

To add one, write a subclass of `Source` and add a line to SOURCES.
"""

from collections.abc import Callable
from typing import Any

from dmpo_jax.data.sources.built import BuiltSource
from dmpo_jax.data.sources.hugging_face import HuggingFaceSource
from dmpo_jax.data.sources.images import BadImageError, decode_image, decode_mask, encode_image
from dmpo_jax.data.sources.pick_a_pic import GIVEN, PICK_A_PIC, PickAPic, write_pick_a_pic
from dmpo_jax.data.sources.rows import MAX_PIXELS, RawPair, Skipped, guard
from dmpo_jax.data.sources.source import Source, Unit
from dmpo_jax.data.sources.table import open_table
from dmpo_jax.data.sources.web_dataset import WebDatasetSource
from dmpo_jax.errors import UserError

__all__ = [
    "GIVEN",
    "MAX_PIXELS",
    "PICK_A_PIC",
    "SOURCES",
    "BadImageError",
    "PickAPic",
    "RawPair",
    "Skipped",
    "Source",
    "Unit",
    "decode_image",
    "decode_mask",
    "encode_image",
    "guard",
    "open_source",
    "write_pick_a_pic",
]

SOURCES: dict[str, Callable[..., Source]] = {
    "pickapic": PickAPic,
    "webdataset": WebDatasetSource,
    "hf": HuggingFaceSource,
    "table": open_table,
    "tfds": BuiltSource,
}


def open_source(
    spec: str, ties: str = "keep", *, allow_outside: bool = False, **options: Any
) -> Source:
    """Opens `KIND:PATH`, such as `pickapic:gs://bucket/data`.

    Args:
        ties: "keep", with a preference of 0.5, or "drop".
        allow_outside: also read images that lie outside the folder of the table that names them.
        options: of the kind of source.

    Raises:
        ValueError: the kind is unknown or the path missing; lists the known kinds.
    """
    kind, _, path = spec.partition(":")
    if kind not in SOURCES or not path:
        raise UserError(
            f"a source is KIND:PATH with KIND one of {sorted(SOURCES)}, but got {spec!r}"
        )
    return SOURCES[kind](path, ties=ties, allow_outside=allow_outside, **options)
