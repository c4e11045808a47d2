"""Pairs in a folder that Hugging Face `datasets` saved to disk."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from etils import epath

from dmpo_jax.data.sources import columns
from dmpo_jax.data.sources.source import UNIT_PAIRS, RawPair, Skipped, Source, Unit, cut, load_bytes
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

    def __init__(self, path: epath.PathLike, ties: str = "keep"):
        super().__init__(ties)
        self._folder = epath.Path(path)
        if not self._folder.exists():
            raise MissingFileError(f"no folder at {self._folder}")
        self._data = _load(self._folder)
        self.layout = columns.find_layout(self._data.column_names, str(self._folder))
        self.given = self.layout.given

    def units(self) -> list[Unit]:
        size = UNIT_PAIRS if len(self.layout.images) == 2 else UNIT_PAIRS // 45
        return cut(self._folder.name, self._folder, self._data.num_rows, size)

    def read(self, unit: Unit) -> Iterator[RawPair | Skipped]:
        for number, row in self._rows(unit, self.layout.wanted(images=True)):
            yield from self.layout.pairs(
                f"{self._folder.name}:{number}",
                row,
                lambda cell: load_bytes(cell, self._folder),
                self.ties,
            )

    def prompts(self, unit: Unit) -> Iterator[str]:
        for _, row in self._rows(unit, self.layout.wanted(images=False)):
            yield from self.layout.prompts(row, self.ties)

    def __len__(self) -> int:
        if len(self.layout.images) == 2:
            return self._data.num_rows
        names = [self.layout.columns[name] for name in self.layout.values]
        every = cut("", self._folder, self._data.num_rows, self._data.num_rows)
        return sum(self.layout.most_pairs(row) for u in every for _, row in self._rows(u, names))

    def _rows(self, unit: Unit, names: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        # In Arrow format an image stays a struct of bytes and path, as stored.
        data = self._data.select_columns(names).with_format("arrow")
        for start in range(unit.start, unit.stop, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, unit.stop)
            try:
                table = data[start:stop]
                table.validate(full=True)  # otherwise Arrow trusts the file's offsets
                rows = table.to_pylist()
            except (pa.ArrowException, UnicodeDecodeError) as error:
                raise UserError(
                    f"{self._folder}, rows {start} to {stop}: damaged: {error}"
                ) from error
            yield from enumerate(rows, start)


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
