"""Pairs in a data set of the Hugging Face hub, or in a folder that `datasets` saved to disk."""

import functools
import logging
import re
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

LOG = logging.getLogger(__name__)
ROWS_AT_ONCE = 64
_HUB = re.compile(
    r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w-][\w./-]*))?(:(?P<split>[\w.-]+))?"
)


class HuggingFaceSource(Source):
    """Pairs of a hub's data set, or of `dataset.save_to_disk(path)`, in the columns of `FORMS`.

    Image columns are read as stored, undecoded. Requires the `data` extra.

    Args:
        path: a folder, or `org/name`, `org/name@revision`, `org/name:split`, which `datasets`
            fetches into its cache, a split as a whole: rows are read in any order, and again after
            a kill. The commit is part of the rows' names: a later one is another source.

    Raises:
        ImportError: `datasets` is not installed.
        FileNotFoundError: the folder does not exist.
        ValueError: `save_to_disk` did not write the folder, the data set cannot be fetched, there
            are several splits and none is named, or it lacks columns. Raised before any image is
            read, and the last two before it is fetched.
    """

    def __init__(self, path: epath.PathLike, ties: str = "keep", allow_outside: bool = False):
        super().__init__(ties, allow_outside)
        folder, hub = epath.Path(path), _HUB.fullmatch(str(path))
        if hub and not folder.is_dir():
            if not hub["revision"] and folder.parent.is_dir():
                # A name typed wrong must not be fetched from whoever has registered it.
                raise MissingFileError(
                    f"no folder at {folder}, though {folder.parent} is there; if the hub's data "
                    f"set of that name is meant, add a revision: hf:{hub['id']}@main"
                )
            self._name, self._data = _fetch(hub)
            files = self._data.cache_files
            self._folder = epath.Path(files[0]["filename"]).parent if files else folder
        elif folder.is_dir():
            self._name, self._folder, self._data = folder.name, folder, _load(folder)
        else:
            raise MissingFileError(f"no folder at {folder}")
        self.layout = columns.find_layout(self._data.column_names, str(path))
        self.given = self.layout.given

    def units(self) -> list[Unit]:
        size = UNIT_PAIRS if len(self.layout.images) == 2 else UNIT_PAIRS // 45
        return cut(self._name, self._folder, self._data.num_rows, size)

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
                yield Row(f"{self._name}:{start + i}", fetch, load)


def _to_row(table: pa.Table, i: int) -> dict[str, Any]:
    row = table.slice(i, 1)
    row.validate(full=True)  # otherwise Arrow trusts the file's offsets
    return row.to_pylist()[0]


def _import() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingPackageError(
            f"hf: needs Hugging Face's datasets: {install_hint('data')}"
        ) from error
    return datasets


def _fetch(hub: re.Match[str]) -> tuple[str, Any]:
    """Returns a name with the commit, and the data of a match of `_HUB`."""
    datasets, repository, split = _import(), hub["id"], hub["split"]
    from huggingface_hub import HfApi

    try:
        commit = str(HfApi().dataset_info(repository, revision=hub["revision"]).sha)
        # Streams know splits and, of most formats, columns, and have read no row yet.
        streams = datasets.load_dataset(repository, revision=commit, streaming=True)
    except Exception as error:  # of the network, the login, or the data set's form
        raise UserError(_cannot_fetch(repository, error)) from error
    if split not in streams and (split or len(streams) > 1):
        example = next(iter(streams))
        raise UserError(
            f"hf:{repository} has the splits {sorted(streams)}: name one, such as "
            f"hf:{repository}:{example}, but got {split or 'none'}"
        )
    split = split or next(iter(streams))
    names = streams[split].column_names
    if names and {"jpg_0", "jpg_1"} <= set(names):
        raise UserError(
            f"hf:{repository} has Pick-a-Pic's schema: fetch its files, hf download {repository} "
            "--repo-type=dataset --local-dir=DIR, and give 'pickapic:DIR/data/"
            f"{split}-*.parquet'"
        )
    if names:
        columns.find_layout(names, f"hf:{repository}")
    LOG.info("fetching the split %s of %s at commit %s from the hub", split, repository, commit)
    try:
        data = datasets.load_dataset(repository, split=split, revision=commit)
    except Exception as error:
        raise UserError(_cannot_fetch(repository, error)) from error
    return f"{repository}@{commit[:12]}:{split}", data


def _cannot_fetch(repository: str, error: Exception) -> str:
    return (
        f"hf:{repository} is no local folder, and fetching it as a data set of the hub failed: "
        f"{' '.join(str(error).split())[:600]}. Check the name, the network and the login "
        "(`hf auth login`). Or load it in Python where that works, datasets.load_dataset("
        f"{repository!r}, split='train').save_to_disk('DIR'), and give hf:DIR"
    )


def _load(folder: epath.Path) -> Any:
    datasets = _import()
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
