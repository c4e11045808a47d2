"""Pairs in parquet files."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from dmpo_jax.data.sources import columns
from dmpo_jax.data.sources.source import (
    UNIT_PAIRS,
    RawPair,
    SkipError,
    Skipped,
    Source,
    Unit,
    find_files,
    load_bytes,
    make_unit,
)
from dmpo_jax.errors import UserError

ROWS_AT_ONCE = 64  # of about 200 kB each; row groups may hold gigabytes


class ParquetSource(Source):
    """Pairs in a parquet file, a folder of them, or a pattern, in the columns of `FORMS`.

    A unit holds complete row groups, up to about UNIT_PAIRS rows, or a part of a larger group.
    Reading such a part also reads the group's earlier rows and drops them: write row groups of
    about 100 rows.

    Raises:
        FileNotFoundError: there is no parquet file.
        ValueError: a file is damaged, or lacks columns; raised before any image is read.
    """

    flags: tuple[str, ...] = ()  # further columns to read, for `_admit`

    def __init__(self, path: epath.PathLike, ties: str = "keep"):
        super().__init__(ties)
        self._groups: dict[str, list[int]] = {}  # file -> rows of each row group
        layouts = []
        for file in find_files(epath.Path(path), ".parquet"):
            with _opened(file) as parquet:
                meta = parquet.metadata
                rows = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
                layouts.append(self._find_layout(parquet.schema_arrow, str(file)))
            if min(rows, default=0) < 0 or sum(rows) != meta.num_rows:
                raise UserError(f"{file} is not a complete parquet file: row groups of {rows} rows")
            self._groups[str(file)] = rows
        self.layout = layouts[0]
        for file, layout in zip(self._groups, layouts, strict=True):
            if layout.images != self.layout.images or layout.values != self.layout.values:
                raise UserError(
                    f"all files should hold the same columns, but {next(iter(self._groups))} has "
                    f"{list(self.layout.columns.values())} and {file} has "
                    f"{list(layout.columns.values())}: give each by itself"
                )
        self._layouts = dict(zip(self._groups, layouts, strict=True))
        self.given = frozenset().union(*(layout.given for layout in layouts))

    def units(self) -> list[Unit]:
        # A ranked list makes several pairs: rarely more than 45, of ten images.
        size = UNIT_PAIRS if len(self.layout.images) == 2 else UNIT_PAIRS // 45
        return [
            make_unit(epath.Path(file).name, file, start, stop)
            for file, groups in self._groups.items()
            for start, stop in _ranges(groups, size)
        ]

    def read(self, unit: Unit) -> Iterator[RawPair | Skipped]:
        layout, folder = self._layouts[unit.file], epath.Path(unit.file).parent
        for name, row in self._rows(unit, layout.wanted(images=True)):
            if isinstance(row, Skipped):
                yield row
                continue
            yield from layout.pairs(name, row, lambda cell: load_bytes(cell, folder), self.ties)

    def prompts(self, unit: Unit) -> Iterator[str]:
        layout = self._layouts[unit.file]
        for _, row in self._rows(unit, layout.wanted(images=False)):
            if not isinstance(row, Skipped):
                yield from layout.prompts(row, self.ties)

    def __len__(self) -> int:
        rows = sum(sum(groups) for groups in self._groups.values())
        if len(self.layout.images) == 2:
            return rows
        total = 0
        for unit in self.units():
            layout = self._layouts[unit.file]
            for _, row in self._rows(unit, [layout.columns[name] for name in layout.values]):
                total += 1 if isinstance(row, Skipped) else layout.most_pairs(row)
        return total

    def _find_layout(self, schema: pa.Schema, where: str) -> columns.Layout:
        return columns.find_layout(schema.names, where)

    def _admit(self, row: Mapping[str, Any]) -> None:
        """Raises SkipError if other columns exclude the row."""

    def _rows(
        self, unit: Unit, wanted: Iterable[str]
    ) -> Iterator[tuple[str, dict[str, Any] | Skipped]]:
        """Yields (id, row or Skipped), with only a few rows in memory."""
        file = epath.Path(unit.file)
        for number, row in _read_rows(file, unit, (*wanted, *self.flags), self._groups[unit.file]):
            name = f"{file.name}:{number}"
            try:
                if isinstance(row, SkipError):
                    raise row
                self._admit(row)
            except SkipError as skip:
                yield name, skip.at(name)
            else:
                yield name, row


def _ranges(groups: list[int], size: int) -> Iterator[tuple[int, int]]:
    """Yields row ranges of about `size`: complete row groups, or equal parts of a large one."""
    start = stop = 0
    for rows in groups:
        if stop > start and stop - start + rows > size:
            yield start, stop
            start = stop
        stop += rows
        if rows > size:  # alone: the groups before it are already yielded
            parts = max(rows // size, 1)
            edges = [start + rows * i // parts for i in range(parts + 1)]
            yield from itertools.pairwise(edges)
            start = stop
    if stop > start:
        yield start, stop


@contextlib.contextmanager
def _opened(file: epath.Path) -> Iterator[pq.ParquetFile]:
    """Opens a parquet file; raises ValueError if the file, or data read from it, is damaged."""
    with file.open("rb") as stream:
        try:
            yield pq.ParquetFile(stream, page_checksum_verification=True)
        except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
            raise UserError(f"{file} is not a complete parquet file: {error}") from error


def _read_rows(
    file: epath.Path, unit: Unit, wanted: Iterable[str], groups: list[int]
) -> Iterator[tuple[int, dict[str, Any] | SkipError]]:
    """Yields (row number, row) of a unit, with those of the wanted columns that the file has."""
    start, chosen, first = 0, [], None
    for i, rows in enumerate(groups):
        if start < unit.stop and start + rows > unit.start:
            chosen.append(i)
            first = start if first is None else first
        start += rows
    number = first or 0
    with _opened(file) as parquet:
        names = set(parquet.schema_arrow.names)
        present = [name for name in dict.fromkeys(wanted) if name in names]
        for batch in parquet.iter_batches(ROWS_AT_ONCE, row_groups=chosen, columns=present):
            skip = min(max(unit.start - number, 0), batch.num_rows)
            take = max(min(unit.stop - number, batch.num_rows) - skip, 0)
            for i, row in enumerate(_to_rows(batch.slice(skip, take))):
                yield number + skip + i, row
            number += batch.num_rows
            if number >= unit.stop:
                return
        if number < unit.stop:
            raise UserError(
                f"{file} is not a complete parquet file: it should hold rows {unit.start} to "
                f"{unit.stop}, but ends after {number}"
            )


def _to_rows(batch: pa.RecordBatch) -> list[Any]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:  # a text is not UTF-8: find its row
        rows = []
        for i in range(batch.num_rows):
            try:
                rows += batch.slice(i, 1).to_pylist()
            except UnicodeDecodeError as error:
                rows.append(SkipError("not UTF-8", str(error)))
        return rows
