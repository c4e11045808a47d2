"""Pairs of a TFDS dataset built by dmpo_jax.data.tfds."""

import functools
from collections.abc import Iterator
from typing import Any

from etils import epath

from dmpo_jax import storage
from dmpo_jax.data.sources.columns import Layout
from dmpo_jax.data.sources.rows import Row, SkipError
from dmpo_jax.data.sources.source import Source, Unit, cut
from dmpo_jax.data.tfds_folder import open_builder
from dmpo_jax.errors import MissingFileError, UserError

STATISTICS = "statistics.json"
FEATURES = ("id", "prompt", "image_0", "image_1", "preference", "source", "mask")


class BuiltSource(Source):
    """Pairs of all splits, train first, in stored order.

    Args:
        path: the folder of the build, with dataset_info.json; local or gs://, as ArrayRecord
            reads no other.

    Raises:
        FileNotFoundError: the folder has no dataset_info.json.
        ValueError: the dataset lacks a feature.
    """

    layout = Layout(
        ("image_0", "image_1"),
        ("label_0",),
        {**{name: name for name in FEATURES}, "label_0": "preference"},
    )

    def __init__(self, path: epath.PathLike, ties: str = "keep", allow_outside: bool = False):
        super().__init__(ties, allow_outside)  # a build names no other files
        self._folder = epath.Path(path)
        if not (self._folder / "dataset_info.json").exists():
            deeper = sorted(p.parent for p in self._folder.glob("*/*/dataset_info.json"))
            raise MissingFileError(
                f"no TFDS dataset in {self._folder}: give the folder with dataset_info.json"
                + (f", such as {deeper[0]}" if deeper else "")
            )
        builder = open_builder(self._folder)
        found = sorted(builder.info.features or ())
        if missing := [name for name in FEATURES if name not in found]:
            raise UserError(
                f"{self._folder} holds no pairs: it needs the features {list(FEATURES)}, lacks "
                f"{missing} and has {found}"
            )
        # Every build has both features; STATISTICS names those that the source had.
        statistics = storage.read_json(self._folder / STATISTICS)
        given = statistics.get("given") if isinstance(statistics, dict) else None
        if not isinstance(given, list) or not {*map(str, given)} <= {"source", "mask"}:
            raise UserError(f"{self._folder / STATISTICS} should list what is given: build again")
        self.given = frozenset(given)
        self._splits = {name: builder.as_data_source(name) for name in sorted(builder.info.splits)}

    def units(self) -> list[Unit]:
        return [
            unit._replace(file=name)  # name of the split: a unit may span several files
            for name, split in self._splits.items()
            for unit in cut(name, self._folder, len(split))
        ]

    def rows(self, unit: Unit, *, images: bool) -> Iterator[Row]:
        for i in range(unit.start, unit.stop):
            fetch = functools.partial(_fetch, self._splits[unit.file], i)
            yield Row(f"{unit.file}:{i}", fetch, _load)

    def __len__(self) -> int:
        return sum(map(len, self._splits.values()))


def _fetch(split: Any, i: int) -> dict[str, Any]:
    row = dict(split[i])
    return row | {name: row[name].decode() for name in ("id", "prompt")}


def _load(cell: Any) -> bytes:
    if not cell:
        raise SkipError("no image")
    return cell
