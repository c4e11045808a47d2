"""Pairs of a TFDS dataset built by dmpo_jax.data.tfds."""

import json
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from dmpo_jax.data.sources.source import RawPair, Skipped, Source, Unit, cut
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

    def __init__(self, path: epath.PathLike, ties: str = "keep"):
        super().__init__(ties)
        self._folder = epath.Path(path)
        if not (self._folder / "dataset_info.json").exists():
            deeper = sorted(p.parent for p in self._folder.glob("*/*/dataset_info.json"))
            raise MissingFileError(
                f"no TFDS dataset in {self._folder}: give the folder with dataset_info.json"
                + (f", such as {deeper[0]}" if deeper else "")
            )
        builder: Any = tfds.builder_from_directory(self._folder)
        found = sorted(builder.info.features or ())
        if missing := [name for name in FEATURES if name not in found]:
            raise UserError(
                f"{self._folder} holds no pairs: it needs the features {list(FEATURES)}, lacks "
                f"{missing} and has {found}"
            )
        # Every build has both features; STATISTICS names those that the source had.
        self.given = frozenset(json.loads((self._folder / STATISTICS).read_text())["given"])
        self._splits = {name: builder.as_data_source(name) for name in sorted(builder.info.splits)}

    def units(self) -> list[Unit]:
        return [
            unit._replace(file=name)  # name of the split: a unit may span several files
            for name, split in self._splits.items()
            for unit in cut(name, self._folder, len(split))
        ]

    def read(self, unit: Unit) -> Iterator[RawPair | Skipped]:
        for row in self._rows(unit):
            pair = RawPair(
                row["id"].decode(),
                row["prompt"].decode(),
                (row["image_0"], row["image_1"]),
                float(row["preference"]),
                row["source"],
                row["mask"],
            )
            if self.ties == "drop" and pair.preference == 0.5:
                yield Skipped(pair.id, "tie", bad=False)
            else:
                yield pair

    def prompts(self, unit: Unit) -> Iterator[str]:
        for pair in self.read(unit):
            if not isinstance(pair, Skipped):
                yield pair.prompt

    def __len__(self) -> int:
        return sum(map(len, self._splits.values()))

    def _rows(self, unit: Unit) -> Iterator[dict[str, Any]]:
        split = self._splits[unit.file]
        for i in range(unit.start, unit.stop):
            yield split[i]
