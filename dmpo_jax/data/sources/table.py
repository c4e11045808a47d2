"""Pairs in a table of texts (JSON lines, JSON, CSV, TSV), with the images in files."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from etils import epath

from dmpo_jax.data import tables
from dmpo_jax.data.sources import columns
from dmpo_jax.data.sources.parquet import ParquetSource
from dmpo_jax.data.sources.source import (
    UNIT_PAIRS,
    RawPair,
    SkipError,
    Skipped,
    Source,
    Unit,
    cut,
    load_bytes,
)
from dmpo_jax.errors import MissingFileError, UserError

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def open_table(path: epath.PathLike, ties: str = "keep") -> Source:
    """Opens a table of any of FORMATS, by its suffix; a folder is one of parquet files.

    Raises:
        ValueError, FileNotFoundError: as `TableSource` and `ParquetSource`.
    """
    file = epath.Path(path)
    suffix = file.suffix.lower()
    if suffix == ".parquet" or not suffix:
        return ParquetSource(file, ties)
    if suffix not in FORMATS:
        raise UserError(f"a table should be one of {', '.join(FORMATS)}, but is {file}")
    return TableSource(file, ties)


class TableSource(Source):
    """Pairs of a table that fits in memory, in the columns of `FORMS`, with images in files.

    JSON lines hold an object each, JSON a list of them. Rows are counted from 0, without blank
    lines. Image paths are relative to the table's folder, absolute, or with a scheme.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the table lacks columns, or cannot be read; raised before any image is read.
    """

    def __init__(self, path: epath.PathLike, ties: str = "keep"):
        super().__init__(ties)
        self._file = epath.Path(path)
        if not self._file.exists():
            raise MissingFileError(f"no table at {self._file}")
        content = self._file.read_bytes()
        try:
            self._rows = _READERS[self._file.suffix.lower()](content)
        except (pa.ArrowException, ValueError, RecursionError) as error:
            raise UserError(
                f"{self._file} cannot be read as {self._file.suffix}: {error}"
            ) from error
        names = next((list(row) for row in self._rows if isinstance(row, Mapping)), [])
        # JSON's objects may omit keys: a column counts if one of the first 100 rows has it.
        for row in self._rows[:100]:
            names += [name for name in row if name not in names] if isinstance(row, dict) else []
        self.layout = columns.find_layout(names, str(self._file))
        self.given = self.layout.given

    def units(self) -> list[Unit]:
        most = max((self._most_pairs(row) for row in self._rows[:100]), default=1)
        size = UNIT_PAIRS // max(most, 1)
        return cut(self._file.name, self._file, len(self._rows), size)

    def read(self, unit: Unit) -> Iterator[RawPair | Skipped]:
        folder = self._file.parent
        for number in range(unit.start, unit.stop):
            name, row = f"{self._file.name}:{number}", self._rows[number]
            if isinstance(row, SkipError):
                yield row.at(name)
                continue
            yield from self.layout.pairs(
                name, row, lambda cell: load_bytes(cell, folder), self.ties
            )

    def prompts(self, unit: Unit) -> Iterator[str]:
        for row in self._rows[unit.start : unit.stop]:
            if not isinstance(row, SkipError):
                yield from self.layout.prompts(row, self.ties)

    def __len__(self) -> int:
        return sum(map(self._most_pairs, self._rows))

    def _most_pairs(self, row: Mapping[str, Any] | SkipError) -> int:
        return 1 if isinstance(row, SkipError) else self.layout.most_pairs(row)


class _Cells(Sequence):
    """Rows of an Arrow table of strings, created on access; an empty cell is None."""

    def __init__(self, table: pa.Table):
        self._table = table.combine_chunks()

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        names, cells = self._table.column_names, self._table.columns
        return {n: column[index].as_py() or None for n, column in zip(names, cells, strict=True)}


def _read_json_lines(content: bytes) -> list[dict[str, Any] | SkipError]:
    return [_read_line(line) for line in tables.split_lines(content)]


def _read_line(line: bytes) -> dict[str, Any] | SkipError:
    try:
        return _as_row(tables.read_line(line))
    except UnicodeDecodeError as error:
        return SkipError("not UTF-8", str(error))
    except (ValueError, RecursionError) as error:
        return SkipError("not JSON", str(error))


def _as_row(row: Any) -> dict[str, Any] | SkipError:
    return row if isinstance(row, dict) else SkipError("not JSON", f"not an object: {row!r:.80}")


_READERS = {
    ".jsonl": _read_json_lines,
    ".json": lambda content: [_as_row(row) for row in tables.read_json(content)],
    ".csv": lambda content: _Cells(tables.read_delimited(content, ",")),
    ".tsv": lambda content: _Cells(tables.read_delimited(content, "\t")),
}
