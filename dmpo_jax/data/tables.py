"""Parsers of JSON, JSON lines, CSV and TSV files; cells of CSV and TSV stay strings."""

import bisect
import collections
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv

from dmpo_jax.errors import UserError

BOM = b"\xef\xbb\xbf"
_LARGEST_BLOCK = 2**31 - 1  # of pyarrow, in bytes
_MOST_DIGITS = 4300  # that Python converts to an integer
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[][{},]', re.DOTALL)
# Tab-separated values of which each that begins with a quotation mark is quoted as in CSV.
_QUOTED_TSV = re.compile(rb'(?:(?:"(?:[^"]++|"")*+"|[^"\t\r\n][^\t\r\n]*+)?(?:\t|\r\n?|\n|\Z))*+')


class Rows(Sequence[Any]):
    """Rows, parsed on access by `parse(i)`; in place of a row that cannot be parsed, the error."""

    def __init__(self, count: int, parse: Callable[[int], Any]):
        self._count, self._parse = count, parse

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        try:
            return self._parse(index)
        except (ValueError, RecursionError) as error:
            return error


def read_json(content: bytes) -> list[Any]:
    """Returns the items of a JSON list; in place of one nested too deeply, a RecursionError.

    Raises:
        ValueError: the content is not UTF-8, not JSON, or not a list.
    """
    try:
        rows = parse_json(content)
    except RecursionError:
        rows = list(_parse_items(content.removeprefix(BOM).decode()))
    if not isinstance(rows, list):
        raise UserError(f"should hold a JSON list, but holds {type(rows).__name__}")
    return rows


def read_json_lines(content: bytes) -> Rows:
    """Returns the values of the lines that are not blank; each must be UTF-8 and JSON."""
    lines = [line for line in content.removeprefix(BOM).split(b"\n") if line.strip()]
    return Rows(len(lines), lambda i: parse_json(lines[i]))


def parse_json(content: bytes) -> Any:
    """Returns a JSON value; raises ValueError if it is not UTF-8 or not JSON."""
    text = content.removeprefix(BOM).decode()  # json.loads guesses the encoding of bytes
    return json.loads(text, parse_int=_to_number)


def read_delimited(
    content: bytes,
    delimiter: str,
    *,
    columns: Callable[[Sequence[str]], list[str]] | None = None,
) -> Rows:
    """Returns the rows of a CSV or TSV file with a header, as texts; an empty cell is None.

    Each must be UTF-8 and have as many cells as the header. Cells are quoted as in CSV. But in a
    TSV file that cannot be quoted so, such as one with the cell `"Hi" on a wall`, quotation marks
    are text, and a line is a row.

    columns: the names in the header -> those to read; None reads all.

    Raises:
        ValueError: a column occurs twice, a quotation mark is not closed, or `columns` raises it.
        pa.ArrowException: the content is not a valid CSV or TSV file.
    """
    # pyarrow sees Latin-1, in which any bytes are text: a cell that is no UTF-8 is then the fault
    # of its row alone. `_decoded` reverts it.
    content = content.removeprefix(BOM).decode("latin-1").encode()
    bad: dict[int, str] = {}
    quote: Any = '"' if delimiter != "\t" or _QUOTED_TSV.fullmatch(content) else False
    # A row must fit into one block. In one thread, pyarrow knows the numbers of bad rows.
    block = min(max(len(content), 1), _LARGEST_BLOCK)
    read = pyarrow.csv.ReadOptions(use_threads=False, block_size=block)

    def parse(handler: Callable[[Any], str]) -> pyarrow.csv.ParseOptions:
        return pyarrow.csv.ParseOptions(
            delimiter=delimiter,
            quote_char=quote,
            newlines_in_values=bool(quote),
            invalid_row_handler=handler,
        )

    def skip(row: pyarrow.csv.InvalidRow) -> str:
        said = f"has {row.actual_columns} cells, but the header has {row.expected_columns}"
        shown = row.text.encode("latin-1").decode(errors="replace")
        bad[row.number - 2] = f"{said}: {shown!r:.80}"  # numbered from 1, with the header
        return "error" if "\n" in row.text.strip() else "skip"  # a quotation mark is not closed

    head = parse(lambda row: "skip")
    with pyarrow.csv.open_csv(pa.BufferReader(content), read, head) as reader:
        stored = {name: _decoded(name.encode()) for name in reader.schema.names}
        count = collections.Counter(reader.schema.names)
    if twice := sorted(stored[name] for name in count if count[name] > 1):
        raise UserError(f"has the columns {twice} twice: keep one of each")
    wanted = columns(list(stored.values())) if columns else stored.values()
    # Bytes only: "007" is a prompt, not 7, and "2024-01-01" is not a date.
    convert = pyarrow.csv.ConvertOptions(
        column_types=dict.fromkeys(stored, pa.binary()),
        include_columns=[name for name in stored if stored[name] in wanted],
    )
    table = pyarrow.csv.read_csv(pa.BufferReader(content), read, parse(skip), convert)
    last = table.slice(table.num_rows - 1).to_pylist() if table.num_rows else [{}]
    if quote and any(b"\n" in cell for cell in last[0].values()):
        _check_quotes(content, delimiter)
    table, numbers = table.combine_chunks(), sorted(bad)

    def parse_row(i: int) -> dict[str, str | None]:
        if i in bad:
            raise ValueError(bad[i])
        row = i - bisect.bisect(numbers, i)
        cells = zip(table.column_names, table.columns, strict=True)
        return {stored[name]: _decoded(column[row].as_py()) or None for name, column in cells}

    return Rows(table.num_rows + len(bad), parse_row)


def _decoded(cell: bytes) -> str:
    return cell.decode().encode("latin-1").decode()


def _check_quotes(content: bytes, delimiter: str) -> None:
    """Raises ValueError if the last quotation mark is not closed, which pyarrow does not tell."""
    text = io.StringIO(content.decode(), newline="")
    try:
        for _ in csv.reader(text, delimiter=delimiter, strict=True):
            pass
    except csv.Error as error:
        raise ValueError(f"a quotation mark is not closed: {error}") from error


def _to_number(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MOST_DIGITS else float(digits)


def _parse_items(text: str) -> Iterator[Any]:
    """Yields the items of a JSON list one by one, for lists that cannot be parsed at once."""
    depth = start = 0
    for token in _TOKEN.finditer(text):
        depth += (token[0] in ("[", "{")) - (token[0] in ("]", "}"))
        if depth == 1 and not start:
            start = token.end()
        elif depth == 0 or (depth == 1 and token[0] == ","):
            try:
                yield parse_json(text[start : token.start()].encode())
            except RecursionError as error:
                yield error
            start = token.end()
        if depth == 0:
            break
    if depth or text[start:].strip() or text.lstrip()[:1] != "[":
        raise ValueError("should hold a JSON list, and nothing after it")
