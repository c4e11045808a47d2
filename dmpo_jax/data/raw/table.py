"""Pairs in a table of texts, the images in files beside it: JSON lines, JSON, CSV, TSV."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from etils import epath

from dmpo_jax.data import tables
from dmpo_jax.data.raw import columns
from dmpo_jax.data.raw.parquet import ParquetSource
from dmpo_jax.data.raw.source import (
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
    """Pairs of a table of any of FORMATS, by its ending; a folder is one of parquet files.

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
    """Pairs of a table that fits in memory, the images in files, by the columns of `FORMS`.

    JSON lines hold an object each, JSON a list of them. Rows are counted from 0, without
    blank lines. Images are paths relative to the table's folder, absolute, or with a scheme.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its columns are not what was expected, or it cannot be read at all,
            before any image is read.
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
        # JSON's objects may leave keys out: all count that are in one of the first.
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
    """The rows of an Arrow table of texts, made when asked for; an empty cell says nothing."""

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
