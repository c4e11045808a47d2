"""Pairs in parquet files."""

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from dmpo_jax.data.sources import columns
from dmpo_jax.data.sources.files import find_files, load_image
from dmpo_jax.data.sources.rows import Row, SkipError
from dmpo_jax.data.sources.source import UNIT_PAIRS, Source, Unit, make_unit
from dmpo_jax.errors import UserError


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

    def __init__(self, path: epath.PathLike, ties: str = "keep", allow_outside: bool = False):
        super().__init__(ties, allow_outside)
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

    def rows(self, unit: Unit, *, images: bool) -> Iterator[Row]:
        return self._rows(unit, self._layout_of(unit).wanted(images=images))

    def __len__(self) -> int:
        rows = sum(sum(groups) for groups in self._groups.values())
        if len(self.layout.images) == 2:
            return rows
        return sum(
            self._most_pairs(unit, row)
            for unit in self.units()
            for row in self._rows(unit, map(self._layout_of(unit).columns.get, self.layout.values))
        )

    def _layout_of(self, unit: Unit) -> columns.Layout:
        return self._layouts[unit.file]

    def _find_layout(self, schema: pa.Schema, where: str) -> columns.Layout:
        return columns.find_layout(schema.names, where)

    def _admit(self, row: Mapping[str, Any]) -> None:
        """Raises SkipError if other columns exclude the row."""

    def _rows(self, unit: Unit, wanted: Iterable[Any]) -> Iterator[Row]:
        file = epath.Path(unit.file)
        load = functools.partial(load_image, folder=file.parent, allow_outside=self.allow_outside)
        wanted = (*wanted, *self.flags)
        for number, row in _read_rows(file, unit, wanted, self._groups[unit.file]):
            yield Row(f"{file.name}:{number}", functools.partial(self._fetch, row), load)

    def _fetch(self, row: pa.RecordBatch | SkipError) -> dict[str, Any]:
        if isinstance(row, SkipError):
            raise row
        (cells,) = row.to_pylist()
        self._admit(cells)
        return cells


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
        except UserError:
            raise
        except MemoryError as error:
            raise UserError(f"to read {file} needs more memory than there is: {error}") from error
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise UserError(f"{file} is not a complete parquet file: {error}") from error


def _read_rows(
    file: epath.Path, unit: Unit, wanted: Iterable[str], groups: list[int]
) -> Iterator[tuple[int, pa.RecordBatch | SkipError]]:
    """Yields (row number, row) of a unit, with those of the wanted columns that the file has.

    Reads one row at a time, which is no slower: a file of 2 kB can hold a million cells of 20 MB.
    """
    with _opened(file) as parquet:
        names = set(parquet.schema_arrow.names)
        present = [name for name in dict.fromkeys(wanted) if name in names]
        edges = itertools.pairwise(itertools.accumulate(groups, initial=0))
        for group, (number, stop) in enumerate(edges):
            if number >= unit.stop or stop <= unit.start:
                continue
            stop = min(stop, unit.stop)
            try:
                for row in parquet.iter_batches(1, row_groups=[group], columns=present):
                    if unit.start <= number < stop:
                        yield number, row
                    number += row.num_rows
                    if number >= stop:
                        break
            except MemoryError as error:  # rows after a cell that does not fit cannot be reached
                skip = SkipError("out of memory", f"the rest of row group {group}: {error}")
                yield from ((n, skip) for n in range(max(number, unit.start), stop))
                number = stop
            if number < stop:
                raise UserError(
                    f"{file} is not a complete parquet file: it should hold rows {unit.start} to "
                    f"{unit.stop}, but ends after {number}"
                )
