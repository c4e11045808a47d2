"""Pairs in a table of texts (JSON lines, JSON, CSV, TSV), with the images in files."""

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from etils import epath

from dmpo_jax.data import tables
from dmpo_jax.data.sources import columns
from dmpo_jax.data.sources.files import check_regular, load_image
from dmpo_jax.data.sources.parquet import ParquetSource
from dmpo_jax.data.sources.rows import Row, SkipError, Skipped, guard
from dmpo_jax.data.sources.source import UNIT_PAIRS, Source, Unit, cut, make_unit
from dmpo_jax.errors import MissingFileError, UserError

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def open_table(path: epath.PathLike, ties: str = "keep", allow_outside: bool = False) -> Source:
    """Opens a table of any of FORMATS, by its suffix; a folder is one of parquet files.

    Raises:
        ValueError, FileNotFoundError: as `TableSource` and `ParquetSource`.
    """
    file = epath.Path(path)
    suffix = file.suffix.lower()
    if suffix == ".parquet" or not suffix:
        return ParquetSource(file, ties, allow_outside)
    if suffix not in FORMATS:
        raise UserError(f"a table should be one of {', '.join(FORMATS)}, but is {file}")
    return TableSource(file, ties, allow_outside)


class TableSource(Source):
    """Pairs of a table that fits in memory, in the columns of `FORMS`, with images in files.

    JSON lines hold an object each, JSON a list of them. Rows are counted from 0, without blank
    lines. Image paths are relative to the table's folder, absolute, or with a scheme (gs://,
    s3://), and lie in that folder, unless `allow_outside` is set.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the table lacks columns, or cannot be read; raised before any image is read.
    """

    def __init__(self, path: epath.PathLike, ties: str = "keep", allow_outside: bool = False):
        super().__init__(ties, allow_outside)
        self._file = epath.Path(path)
        if not self._file.exists():
            raise MissingFileError(f"no table at {self._file}")
        check_regular(self._file)
        content = self._file.read_bytes()
        try:
            self._rows = _READERS[self._file.suffix.lower()](content)
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise UserError(
                f"{self._file} cannot be read as {self._file.suffix}: {error}"
            ) from error
        # JSON's objects may omit keys: a column counts if one of the first 100 objects has it.
        rows = (guard("", functools.partial(self._fetch, i)) for i in range(len(self._rows)))
        objects = (row for row in rows if not isinstance(row, Skipped))
        names = dict.fromkeys(itertools.chain.from_iterable(itertools.islice(objects, 100)))
        self.layout = columns.find_layout(list(names), str(self._file))
        self.given = self.layout.given

    def units(self) -> list[Unit]:
        first = make_unit("", self._file, 0, min(100, len(self._rows)))
        rows = self.rows(first, images=False)
        most = max((self._most_pairs(first, row) for row in rows), default=1)
        size = UNIT_PAIRS // max(most, 1)
        return cut(self._file.name, self._file, len(self._rows), size)

    def rows(self, unit: Unit, *, images: bool) -> Iterator[Row]:
        load = functools.partial(
            load_image, folder=self._file.parent, allow_outside=self.allow_outside
        )
        for number in range(unit.start, unit.stop):
            yield Row(f"{self._file.name}:{number}", functools.partial(self._fetch, number), load)

    def __len__(self) -> int:
        every = make_unit("", self._file, 0, len(self._rows))
        return sum(self._most_pairs(every, row) for row in self.rows(every, images=False))

    def _fetch(self, number: int) -> Mapping[str, Any]:
        row = self._rows[number]
        if isinstance(row, json.JSONDecodeError):
            raise SkipError("not JSON", str(row))
        if isinstance(row, Exception):
            raise row
        if not isinstance(row, Mapping):
            raise SkipError("not JSON", f"not an object: {row!r:.80}")
        return row


_READERS: dict[str, Callable[[bytes], Sequence[Any]]] = {
    ".jsonl": tables.read_json_lines,
    ".json": tables.read_json,
    ".csv": lambda content: tables.read_delimited(content, ","),
    ".tsv": lambda content: tables.read_delimited(content, "\t"),
}
