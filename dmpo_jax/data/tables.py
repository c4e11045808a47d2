"""The rows of JSON, JSON lines, CSV and TSV files, as texts and numbers say them."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv

BOM = b"\xef\xbb\xbf"


def read_json(content: bytes) -> list[Any]:
    """The items of a JSON list.

    Raises:
        ValueError: it is not UTF-8, not JSON, or holds no list.
    """
    rows = json.loads(content.decode("utf-8-sig"))
    if not isinstance(rows, list):
        raise ValueError(f"should hold a JSON list, but holds {type(rows).__name__}")
    return rows


def split_lines(content: bytes) -> list[bytes]:
    """The lines of a JSON lines file that are not blank."""
    return [line for line in content.removeprefix(BOM).split(b"\n") if line.strip()]


def read_line(line: bytes) -> Any:
    """The value of one of `split_lines`; ValueError where it is not UTF-8 or not JSON."""
    return json.loads(line.decode("utf-8"))  # from bytes it would guess the encoding


def read_delimited(
    content: bytes,
    delimiter: str,
    *,
    columns: Callable[[Sequence[str]], list[str]] | None = None,
) -> pa.Table:
    """A CSV or TSV file with a header: all cells are texts.

    columns: the names in the header -> those to read; None reads all.

    Raises:
        ValueError: a column is there twice, or `columns` raises.
        pa.ArrowException: it is no such file.
    """
    parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with pyarrow.csv.open_csv(pa.BufferReader(content), parse_options=parse) as reader:
        names = reader.schema.names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"has the columns {twice} twice: keep one of each")
    # All texts: "007" is a prompt, not 7, and "2024-01-01" no date.
    convert = pyarrow.csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()),
        include_columns=columns(names) if columns else None,
    )
    source = pa.BufferReader(content)
    return pyarrow.csv.read_csv(source, parse_options=parse, convert_options=convert)
