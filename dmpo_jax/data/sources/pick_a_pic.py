"""Reader and writer of Pick-a-Pic's parquet schema."""

import collections
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from dmpo_jax import storage
from dmpo_jax.data.sources.columns import Layout
from dmpo_jax.data.sources.parquet import ParquetSource
from dmpo_jax.data.sources.rows import SkipError
from dmpo_jax.errors import UserError

ROWS_AT_ONCE = 64  # that are written, each of about 400 kB
REQUIRED = ("caption", "jpg_0", "jpg_1", "label_0")
FLAGS = ("has_label", "are_different", "label_1")
GIVEN = {"source": "jpg_source", "mask": "mask"}  # field of RawPair -> optional column

PICK_A_PIC = pa.schema(
    {
        "caption": pa.string(),
        "jpg_0": pa.binary(),
        "jpg_1": pa.binary(),
        "label_0": pa.float64(),
        "label_1": pa.float64(),
        "image_0_uid": pa.string(),
        "image_1_uid": pa.string(),
        "best_image_uid": pa.string(),
        "model_0": pa.string(),
        "model_1": pa.string(),
        "has_label": pa.bool_(),
        "are_different": pa.bool_(),
        # Our additions; null where a model is given no image, and where no scorer labelled.
        "jpg_source": pa.binary(),
        "mask": pa.binary(),
        "score_0": pa.float64(),
        "score_1": pa.float64(),
        "scorer": pa.string(),
    }
)


class PickAPic(ParquetSource):
    """Pairs in the parquet schema of the hub's Pick-a-Pic datasets.

    Columns: caption, jpg_0, jpg_1 and label_0 (1: image 0 preferred, 0: image 1, 0.5: a tie).
    Optional: has_label and are_different, where rows with either false are skipped, and label_1,
    which should be 1 - label_0. Editing models also need jpg_source, inpainting models jpg_source
    and mask.

    Args:
        path: a parquet file, a folder of them, or a pattern (`data/train-*.parquet`: the
            hub keeps all splits in one folder).
        ties: "keep", with a preference of 0.5, or "drop".

    Raises:
        FileNotFoundError: there is no parquet file.
        ValueError: a file lacks a column, has one of another type or is not parquet; raised
            before any image is read.
    """

    flags = FLAGS

    def _find_layout(self, schema: pa.Schema, where: str) -> Layout:
        found = schema.names
        if missing := [name for name in REQUIRED if name not in found]:
            raise UserError(
                f"{where} is not in Pick-a-Pic's schema: it needs the columns "
                f"{list(REQUIRED)}, lacks {missing} and has {sorted(found)}"
            )
        count = collections.Counter(found)
        if twice := sorted(name for name in count if count[name] > 1):
            raise UserError(f"{where} has the columns {twice} twice: keep one of each")
        for names, types, wanted in _TYPES:
            for name in names:
                if name in found and not any(check(schema.field(name).type) for check in types):
                    raise UserError(
                        f"{where} is not in Pick-a-Pic's schema: column {name} should be "
                        f"{wanted}, but is {schema.field(name).type}"
                    )
        own = {"prompt": "caption", "image_0": "jpg_0", "image_1": "jpg_1", "label_0": "label_0"}
        given = {field: column for field, column in GIVEN.items() if column in found}
        return Layout(("image_0", "image_1"), ("label_0",), own | given)

    def _admit(self, row: Mapping[str, Any]) -> None:
        if row.get("has_label") is False:
            raise SkipError("no label", bad=False)
        if row.get("are_different") is False:
            raise SkipError("equal images", bad=False)
        first, second = row["label_0"], row.get("label_1")
        if first is not None and second is not None and not abs(first + second - 1) < 1e-3:
            raise SkipError("bad label", f"label_0 is {first}, but label_1 is {second}")


# (columns, checks of their Arrow type, description)
_TYPES = (
    (("caption",), (pa.types.is_string, pa.types.is_large_string), "a text"),
    (
        ("jpg_0", "jpg_1", *GIVEN.values()),
        # A mirror made with `datasets` may hold structs of bytes and path.
        (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_struct, pa.types.is_null),
        "binary",
    ),
    (
        ("label_0", "label_1"),
        (pa.types.is_floating, pa.types.is_integer, pa.types.is_null),
        "a number",
    ),
    (("has_label", "are_different"), (pa.types.is_boolean, pa.types.is_null), "a boolean"),
)


def write_pick_a_pic(path: epath.PathLike, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes rows in the hub's schema, as `PickAPic(path)` reads it.

    Args:
        path: the parquet file; written atomically.
        rows: with caption, jpg_0, jpg_1, label_0 and any other column of PICK_A_PIC. label_1, the
            uids, has_label and are_different are derived from these if absent.

    Returns:
        The number of rows written.

    Raises:
        ValueError: a row lacks a required column, has an unknown one, or its label lies outside
            [0, 1].
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    count, chunk = 0, []
    with (
        storage.replacing(path) as part,
        part.open("wb") as file,
        pq.ParquetWriter(file, PICK_A_PIC, write_page_checksum=True) as writer,
    ):

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(chunk, schema=PICK_A_PIC))
            chunk.clear()

        for count, row in enumerate(rows, start=1):  # noqa: B007
            chunk.append(_full_row(row))
            if len(chunk) == ROWS_AT_ONCE:
                flush()
        flush()
    return count


def _full_row(row: Mapping[str, Any]) -> dict[str, Any]:
    missing = [name for name in REQUIRED if row.get(name) is None]
    unknown = sorted(set(row) - set(PICK_A_PIC.names))
    if missing or unknown:
        raise UserError(
            f"a row needs {list(REQUIRED)} and may have {PICK_A_PIC.names}, but lacks "
            f"{missing} and has {unknown}"
        )
    label = row["label_0"]
    if not 0 <= label <= 1:
        raise UserError(f"label_0 must lie in [0, 1], but got {label}")
    # Content hashes: the same image has the same uid in every file.
    uids = [hashlib.sha256(row[name]).hexdigest()[:32] for name in ("jpg_0", "jpg_1")]
    derived = {
        "label_1": 1 - label,
        "image_0_uid": uids[0],
        "image_1_uid": uids[1],
        "best_image_uid": "tie" if label == 0.5 else uids[int(label < 0.5)],
        "has_label": True,
        "are_different": row["jpg_0"] != row["jpg_1"],
    }
    return derived | dict(row)
