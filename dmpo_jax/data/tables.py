"""Parsers of JSON, JSON lines, CSV and TSV files; cells of CSV and TSV stay strings."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv

BOM = b"\xef\xbb\xbf"


def read_json(content: bytes) -> list[Any]:
    """Returns the items of a JSON list.

    Raises:
        ValueError: the content is not UTF-8, not JSON, or not a list.
    """
    rows = json.loads(content.decode("utf-8-sig"))
    if not isinstance(rows, list):
        raise ValueError(f"should hold a JSON list, but holds {type(rows).__name__}")
    return rows


def split_lines(content: bytes) -> list[bytes]:
    """Returns the lines of a JSON lines file that are not blank."""
    return [line for line in content.removeprefix(BOM).split(b"\n") if line.strip()]


def read_line(line: bytes) -> Any:
    """Returns the value of one line; raises ValueError if it is not UTF-8 or not JSON."""
    return json.loads(line.decode("utf-8"))  # json.loads guesses the encoding of bytes


def read_delimited(
    content: bytes,
    delimiter: str,
    *,
    columns: Callable[[Sequence[str]], list[str]] | None = None,
) -> pa.Table:
    """Returns a CSV or TSV file with a header as a table of strings.

    columns: the names in the header -> those to read; None reads all.

    Raises:
        ValueError: a column occurs twice, or `columns` raises it.
        pa.ArrowException: the content is not a valid CSV or TSV file.
    """
    parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with pyarrow.csv.open_csv(pa.BufferReader(content), parse_options=parse) as reader:
        names = reader.schema.names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"has the columns {twice} twice: keep one of each")
    # Strings only: "007" is a prompt, not 7, and "2024-01-01" is not a date.
    convert = pyarrow.csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()),
        include_columns=columns(names) if columns else None,
    )
    source = pa.BufferReader(content)
    return pyarrow.csv.read_csv(source, parse_options=parse, convert_options=convert)
