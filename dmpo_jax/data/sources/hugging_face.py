"""Pairs in a folder that Hugging Face `datasets` saved to disk."""

import functools
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from etils import epath

from dmpo_jax.data.sources import columns
from dmpo_jax.data.sources.files import load_image
from dmpo_jax.data.sources.rows import Row
from dmpo_jax.data.sources.source import UNIT_PAIRS, Source, Unit, cut, make_unit
from dmpo_jax.errors import MissingFileError, MissingPackageError, UserError
from dmpo_jax.extras import install_hint

ROWS_AT_ONCE = 64


class HuggingFaceSource(Source):
    """Pairs of `dataset.save_to_disk(path)`, in the columns of `FORMS`.

    Image columns are read as stored, undecoded. Requires the `data` extra.

    Raises:
        ImportError: `datasets` is not installed.
        FileNotFoundError: the folder does not exist.
        ValueError: `save_to_disk` did not write the folder, it holds several splits, or it lacks
            columns. Raised before any image is read.
    """

    def __init__(self, path: epath.PathLike, ties: str = "keep", allow_outside: bool = False):
        super().__init__(ties, allow_outside)
        self._folder = epath.Path(path)
        if not self._folder.is_dir():
            raise MissingFileError(f"no folder at {self._folder}")
        self._data = _load(self._folder)
        self.layout = columns.find_layout(self._data.column_names, str(self._folder))
        self.given = self.layout.given

    def units(self) -> list[Unit]:
        size = UNIT_PAIRS if len(self.layout.images) == 2 else UNIT_PAIRS // 45
        return cut(self._folder.name, self._folder, self._data.num_rows, size)

    def rows(self, unit: Unit, *, images: bool) -> Iterator[Row]:
        return self._rows(unit, self.layout.wanted(images=images))

    def __len__(self) -> int:
        if len(self.layout.images) == 2:
            return self._data.num_rows
        names = [self.layout.columns[name] for name in self.layout.values]
        every = make_unit("", self._folder, 0, self._data.num_rows)
        return sum(self._most_pairs(every, row) for row in self._rows(every, names))

    def _rows(self, unit: Unit, names: list[str]) -> Iterator[Row]:
        # In Arrow format an image stays a struct of bytes and path, as stored.
        data = self._data.select_columns(names).with_format("arrow")
        load = functools.partial(load_image, folder=self._folder, allow_outside=self.allow_outside)
        for start in range(unit.start, unit.stop, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, unit.stop)
            try:
                table = data[start:stop]
            except (pa.ArrowException, OSError, ValueError) as error:
                raise UserError(
                    f"{self._folder}, rows {start} to {stop}: damaged: {error}"
                ) from error
            for i in range(stop - start):
                fetch = functools.partial(_to_row, table, i)
                yield Row(f"{self._folder.name}:{start + i}", fetch, load)


def _to_row(table: pa.Table, i: int) -> dict[str, Any]:
    row = table.slice(i, 1)
    row.validate(full=True)  # otherwise Arrow trusts the file's offsets
    return row.to_pylist()[0]


def _load(folder: epath.Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingPackageError(
            f"hf:PATH needs Hugging Face's datasets: {install_hint('data')}"
        ) from error
    try:
        data = datasets.load_from_disk(str(folder))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} cannot be read as a folder of datasets' save_to_disk: {error}"
        ) from error
    if isinstance(data, datasets.DatasetDict):
        raise UserError(
            f"{folder} holds the splits {sorted(data)}: give one, such as hf:"
            f"{folder / str(next(iter(data)))}"
        )
    return data
